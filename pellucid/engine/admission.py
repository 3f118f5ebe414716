"""What can be said of a request before the engine sees it: its tokens, and whether its values are allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pellucid.api.hidden_states import HiddenStatesLimits
from pellucid.api.request_options import NO_OPTIONS, RequestOptions
from pellucid.api.sampling_params import SamplingParams, check_vocabulary, check_well_formed
from pellucid.api.structured_outputs import CustomStructure, Grammar
from pellucid.config import EngineConfig
from pellucid.contract.executor import KVCacheSize
from pellucid.contract.facts import ModelFacts
from pellucid.errors import InvalidRequestError, shown, shown_number
from pellucid.scheduling.limits import RequestLimits
from pellucid.scheduling.policies import limits_of
from pellucid.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Admitted:
    """What an engine has to know of a request that it can run."""

    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    capture: tuple[str, ...] = ()  # names of activations, resolved
    num_state_bytes: int = 0  # that its hidden states and activations may take, all choices together


@dataclass(frozen=True)
class RequestChecker:
    """Tokenises prompts and refuses what can never run. Safe to share between threads."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    hidden_states: HiddenStatesLimits | None = None  # None: they are not handed out
    limits: RequestLimits | None = None  # None: the model's length alone

    @classmethod
    def of(
        cls, config: EngineConfig, facts: ModelFacts, kv_cache: KVCacheSize, tokenizer: Tokenizer | None
    ) -> RequestChecker:
        """For a model and a cache under these settings."""
        hidden_states = None
        if config.hidden_states:
            max_bytes = config.hidden_states_max_mb * 1_000_000
            hidden_states = HiddenStatesLimits(
                facts.num_layers, facts.hidden_size, max_bytes, facts.activations, facts.steerable
            )
        limits = limits_of(
            config,
            max_model_len=facts.max_model_len,
            num_blocks=kv_cache.num_blocks,
            block_size=kv_cache.block_size,
        )
        return cls(tokenizer, facts.vocab_size, facts.max_model_len, facts.eos_token_ids, hidden_states, limits)

    def tokenise(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The text, where it is one, and the token ids: all prompts come through here, whoever made their ids.

        Raises:
            InvalidRequestError: a text without a tokenizer, or an id that is none.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("prompt", "is text, but the model has no tokenizer: give token ids")
            check_well_formed("prompt", prompt)
            token_ids = self.tokenizer.encode(prompt)
            if token_ids and max(token_ids) >= self.vocab_size:
                self._refuse_ids(token_ids, prompt)
            return prompt, token_ids
        try:
            if isinstance(prompt, (bytes, bytearray, memoryview, Mapping)):
                raise TypeError
            # what may have no end is read as far as a prompt may go
            token_ids = list(prompt if isinstance(prompt, Sized) else islice(prompt, self.max_model_len))
        except TypeError:
            raise InvalidRequestError(
                "prompt", f"is a {type(prompt).__name__}", limit="it must be a text or a list of token ids"
            ) from None
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            self._refuse_ids(token_ids)
        return None, token_ids

    def _refuse_ids(self, token_ids: Sequence[int], text: str | None = None, field: str = "prompt") -> None:
        """Names the first id that is none, of a list or of what the tokenizer made of `text`; there may be none, as in an empty
        list."""
        for index, token in enumerate(token_ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidRequestError(f"{field}[{index}]", "is", token, "token ids are integers")
            if 0 <= token < self.vocab_size:
                continue
            limit = f"token ids are in [0, {self.vocab_size:,})"
            if text is None or self.tokenizer is None:
                raise InvalidRequestError(f"{field}[{index}]", f"is {shown_number(token)}", limit=limit)
            spelling = self.tokenizer.raw_token(token)
            raise InvalidRequestError(
                field,
                f": the tokenizer makes {shown(spelling)} token {token:,}, which the model has not",
                limit=limit,
            )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each bad word as it is tokenised at the start of a text and behind a space."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise InvalidRequestError("bad_words", "need a tokenizer, and the model has none")
        found: dict[tuple[int, ...], None] = {}
        for text in (text for word in params.bad_words for text in (word, " " + word.lstrip())):
            token_ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            self._refuse_ids(token_ids, text, "bad_words")
            found[token_ids] = None
        return tuple(found)

    def check(
        self,
        token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
    ) -> Admitted:
        """Checks lengths and what the parameters ask of the model.

        Raises:
            InvalidRequestError: naming the field, the value and the limit.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("params", f"is a {type(params).__name__}", limit="it must be SamplingParams")
        self._limits.refuse_impossible(len(token_ids), self.max_tokens(len(token_ids), params))
        check_vocabulary(params, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop", "strings need a tokenizer, and the model has none")
        bad_words = self._bad_words(params)
        hidden_states, capture, steering = options.hidden_states, options.capture, options.steering
        asked = {"return_hidden_states": hidden_states, "capture": capture, "steering": steering}
        fields = [name for name, value in asked.items() if value is not None]
        if not fields:
            return Admitted(bad_words)
        if self.hidden_states is None:
            raise InvalidRequestError(fields[0], ": this engine hands out no hidden states")
        if steering is not None:
            steering.check(self.hidden_states)
        limits, num_prompt, max_tokens = self.hidden_states, len(token_ids), self.max_tokens(len(token_ids), params)
        num_values, names = 0, tuple[str, ...]()
        if hidden_states is not None:
            num_values = hidden_states.check(num_prompt, max_tokens, params.n, limits)
        if capture is not None:
            names = capture.resolve(limits)
            rows, width = num_prompt + max_tokens - 1, sum(limits.activations[name] for name in names)
            told = f"the activations take up to {{}} bytes ({rows:,} rows of {width:,} values"
            told += f", {num_values:,} values of hidden states" if num_values else ""
            num_values += rows * width  # both together may take no more
            limits.refuse_when_large(told, num_values, params.n, "capture")
        return Admitted(bad_words, names, limits.num_bytes(num_values, params.n))

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """The structure that is asked for, compiled; the last ones are kept, so that a server does it before its engine asks.

        Raises:
            InvalidRequestError: it cannot be compiled, or the model has no tokenizer.
        """
        if params.structured_outputs is None:
            return None
        from pellucid.structure.grammar import grammar_of

        return grammar_of(params, self.tokenizer, self.vocab_size, self.eos_token_ids)

    def check_first_token(
        self, params: SamplingParams, grammar: Grammar | None, bad_words: tuple[tuple[int, ...], ...]
    ) -> None:
        """Refuses `allowed_token_ids` that contradict the other parameters from the first token on.

        Raises:
            InvalidRequestError: no token can be sampled, whatever the logits are.
        """
        if params.allowed_token_ids is None or isinstance(params.structured_outputs, CustomStructure):
            return  # what a custom structure says is found out step by step: it may raise
        from pellucid.sampling.reference import edit
        from pellucid.sampling.sampler import SamplingRow

        matcher = None if grammar is None else grammar.matcher()
        row = SamplingRow(params, 0, bad_words_token_ids=bad_words, eos_token_ids=self.eos_token_ids, matcher=matcher)
        logits_V = np.zeros(self.vocab_size, np.float32)
        edit(row, logits_V)
        if np.isneginf(logits_V).all():
            raise InvalidRequestError("allowed_token_ids", (row.nothing_left(self.vocab_size),))

    def has_grammar(self, params: SamplingParams) -> bool:
        """True when `grammar` has nothing to compile."""
        if params.structured_outputs is None or self.tokenizer is None:
            return True
        from pellucid.structure.grammar import is_compiled

        return is_compiled(
            params.structured_outputs, self.tokenizer, vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids
        )

    def max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """How many tokens a prompt can bring at most."""
        return self._limits.max_tokens(num_prompt_tokens, params.max_tokens)

    @property
    def _limits(self) -> RequestLimits:
        length = self.max_model_len
        return RequestLimits(length, length, 1) if self.limits is None else self.limits

"""Grammars that outputs must follow: compiled once, then a matcher for each output, which says what token may come next.

The work is done by llguidance (https://github.com/guidance-ai/llguidance), which is imported when the first structure is asked
for. A mask is a function of the grammar and the output's tokens alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import FIELD, CustomStructure, Grammar, StructuredOutputsParams
from pellucid.errors import EXITS, InvalidRequestError, PellucidError
from pellucid.owners import Home
from pellucid.structure.grammar_trial import LIMITS, GrammarTrial, first_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from pellucid.text.tokenizer import Tokenizer

MAX_CACHED_GRAMMARS = 64
# Made from lists of texts within narrow caps: nothing in them can explode.
_NEEDS_NO_TRIAL = ("choice", "json_object")

Made = TypeVar("Made")


class GrammarError(PellucidError, RuntimeError):
    """The library that follows grammars failed."""


def _guarded(call: Callable[[], Made]) -> Made:
    """Calls the library. A panic in it is no `Exception`: it would end whoever catches only those."""
    try:
        return call()
    except (*EXITS, MemoryError):
        raise
    except BaseException as error:
        raise GrammarError(str(error)[:300]) from error


class CompiledGrammar:
    """A grammar over one vocabulary. Immutable to its users; safe to share between threads.

    Copies of llguidance's matcher share the states of its lexer, of which there may only be so many. When they are used up the
    grammar is built anew, so that no output depends on what others have used up.
    """

    def __init__(self, spec: StructuredOutputsParams, vocab_size: int, build: Callable[[], LLMatcher]) -> None:
        self.spec, self.vocab_size = spec, vocab_size
        self._build, self._pristine = build, _guarded(build)
        self._lock = Lock()
        self._generation = 0

    def matcher(self, output_token_ids: Sequence[int] = ()) -> GrammarMatcher:
        """A matcher for one output, which has these tokens already."""
        made = GrammarMatcher(self)
        for token_id in output_token_ids:
            made.accept(token_id)
        return made

    def copy(self, *, unlike: int | None = None) -> tuple[LLMatcher, int]:
        """llguidance's matcher at the beginning, and the number of its generation: another one than `unlike`.

        Raises:
            GrammarError: the library failed.
        """
        with self._lock:
            if self._generation == unlike:
                self._pristine = _guarded(self._build)
                self._generation += 1
            return _guarded(self._pristine.deep_copy), self._generation


class GrammarMatcher:
    """Follows one output. For one thread at a time.

    `mask` [ceil(V / 32)] has bit i % 32 of word i / 32 set where token i may come next, as of the last `fill`. When the
    grammar is complete and nothing can follow, `is_complete` holds and the mask has the tokens that end an output. An error
    stays: the mask is then empty and `error` says why.
    """

    __slots__ = ("_accepted", "_address", "_generation", "_grammar", "_matcher", "error", "is_complete", "mask")

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._matcher, self._generation = grammar.copy()
        self._accepted: list[int] = []
        self.mask: npt.NDArray[np.uint32] = np.zeros((grammar.vocab_size + 31) // 32, np.uint32)
        self._address = self.mask.ctypes.data
        self.is_complete = False
        self.error: str | None = None

    def fill(self) -> None:
        """Brings `mask` and `is_complete` to where the output stands."""
        if self.error is None:
            self._do(lambda: self._matcher.unsafe_compute_mask_ptr(self._address, self.mask.nbytes))
        if self.error is not None:
            self.mask[:] = 0

    def accept(self, token_id: int) -> bool:
        """Takes the output's next token. False when it does not fit; what follows the end of the output is passed over."""
        if self.error is None and not self.is_complete:
            self._do(lambda: self._matcher.consume_token(token_id))
            self._accepted.append(token_id)
        return self.error is None

    def _do(self, call: Callable[[], object]) -> None:
        """An error is this output's alone, once it has come on a lexer of its own too."""
        problem = self._problem_of(call)
        if problem is not None:
            try:
                self._matcher, self._generation = self._grammar.copy(unlike=self._generation)
            except GrammarError as error:
                self.error, self.is_complete = f"{FIELD} cannot go on: {error}", False
                return
            self._problem_of(lambda: self._matcher.consume_tokens(self._accepted))
            problem = self._problem_of(call)
        if problem is not None:
            self.error = f"{FIELD} cannot go on: {problem}"
        self.is_complete = problem is None and bool(self._matcher.is_stopped())

    def _problem_of(self, call: Callable[[], object]) -> str | None:
        try:
            _guarded(call)
            return _guarded(lambda: first_line(self._matcher.get_error()) if self._matcher.is_error() else None)
        except GrammarError as error:
            return str(error)


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of each token, byte by byte as the detokeniser gives them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from pellucid.text.detokenizer import token_bytes_of

        special = tokenizer.special_token_ids | set(eos_token_ids)
        self.tokens = token_bytes_of(tokenizer, vocab_size)
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)
        self.eos_token_id = eos_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        raise InvalidRequestError(f"{FIELD}.grammar", f"asks for the tokens of {text!r}, which is not done")


class _Cache:
    """Results by key, the least recently used dropped first; each is made once, however many ask at once, and a grammar not again
    while somebody holds it, such as the engine of a request that waits. A forked process begins anew: where another thread was
    making one, the locks would never be free."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._begin()

    def _begin(self) -> None:
        self._home, self._lock = Home("this cache of grammars"), Lock()
        self._made: OrderedDict[object, tuple[Lock, list[Any]]] = OrderedDict()
        self._held: WeakValueDictionary[object, Any] = WeakValueDictionary()

    def get(self, key: object, make: Callable[[], Made]) -> Made:
        if self._home.is_left:
            self._begin()
        with self._lock:
            lock, made = self._made.setdefault(key, (Lock(), []))
            self._made.move_to_end(key)
            while len(self._made) > self._most:
                self._made.popitem(last=False)
        with lock:
            if not made:
                held = self._held.get(key)
                made.append(make() if held is None else held)
                if isinstance(made[0], CompiledGrammar):
                    self._held[key] = made[0]
            result: Made = made[0]
            return result

    def has(self, key: object) -> bool:
        """True when it is made, so that `get` does not wait."""
        if self._home.is_left:
            return False
        with self._lock:
            return bool(self._made.get(key, (None, ()))[1]) or key in self._held


_TRIAL = GrammarTrial()
_grammars = _Cache(MAX_CACHED_GRAMMARS)
_vocabularies = _Cache(4)


def grammar_of(
    params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> Grammar | None:
    """What outputs of a request are matched with; None: they are free. As `compile_grammar`, which keeps what it made.

    Raises:
        InvalidRequestError: the structure cannot be compiled, or the model has no tokenizer.
    """
    structure = params.structured_outputs
    if structure is None:
        return None
    if isinstance(structure, CustomStructure):
        return structure.compile(vocab_size)
    if tokenizer is None:
        raise InvalidRequestError(FIELD, "need a tokenizer, and the model has none")
    return compile_grammar(structure, tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def compile_grammar(
    spec: StructuredOutputsParams,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> CompiledGrammar:
    """The grammar of a structure over a model's vocabulary; compiled once and kept. May be called from any thread.

    `vocab_size` is the width of the model's logits, `eos_token_ids` what ends its outputs; both are the tokenizer's by default.
    Takes some milliseconds, the first one of a vocabulary about a second.

    Raises:
        InvalidRequestError: the structure is malformed, not supported, cannot be satisfied, or too costly to compile; or the
            model has no end token, or a tokenizer whose tokens are not bytes. `param` names the field.
    """
    width, eos = _vocabulary_of(tokenizer, vocab_size, eos_token_ids)
    if not eos:
        raise InvalidRequestError(FIELD, "needs a model with an end token, and this one has none")
    key = (spec, (tokenizer.fingerprint, width, eos))
    made = _grammars.get(key, lambda: _compile(spec, tokenizer, width, eos))
    if isinstance(made, str):
        raise InvalidRequestError(f"{FIELD}.{spec.kind}", f": {made}")
    return made


def is_compiled(
    spec: StructuredOutputsParams,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> bool:
    """True when `compile_grammar` knows its answer, and gives it at once."""
    width, eos = _vocabulary_of(tokenizer, vocab_size, eos_token_ids)
    return _grammars.has((spec, (tokenizer.fingerprint, width, eos)))


def _vocabulary_of(
    tokenizer: Tokenizer, vocab_size: int | None, eos_token_ids: Sequence[int] | None
) -> tuple[int, tuple[int, ...]]:
    width = tokenizer.vocab_size if vocab_size is None else vocab_size
    eos = tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
    return width, tuple(token_id for token_id in eos if 0 <= token_id < width)


def _tokenizer(tokenizer: Tokenizer, vocab_size: int, eos: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer

    return _vocabularies.get(
        (tokenizer.fingerprint, vocab_size, eos),
        lambda: _guarded(
            lambda: LLTokenizer(_Vocabulary(tokenizer, vocab_size, eos), eos_token=list(eos))  # type: ignore[arg-type]
        ),
    )


def _compile(
    spec: StructuredOutputsParams, tokenizer: Tokenizer, vocab_size: int, eos: tuple[int, ...]
) -> CompiledGrammar | str:
    """The grammar, or why there is none: that is kept too."""
    from llguidance import LLMatcher, LLParserLimits

    from pellucid.structure.grammar_source import grammar_source

    vocabulary = _tokenizer(tokenizer, vocab_size, eos)
    special = {tokenizer.id_to_token(token_id): token_id for token_id in tokenizer.special_token_ids}
    problem = None if spec.kind in _NEEDS_NO_TRIAL else _TRIAL.run(spec, vocab_size, special)
    if problem is not None:
        return problem
    source, limits = grammar_source(spec, special), LLParserLimits(**LIMITS)
    try:
        grammar = CompiledGrammar(spec, vocab_size, lambda: LLMatcher(vocabulary, source, log_level=0, limits=limits))
        first = grammar.matcher()
    except GrammarError as error:
        return str(error)
    first.fill()
    problem = first.error or (None if first.mask.any() else "no text satisfies it")
    return grammar if problem is None else problem

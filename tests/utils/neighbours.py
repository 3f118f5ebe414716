"""Requests beside one that fails: what they get in its company is compared, bit by bit, with what they get alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from utils.tiny_models import build_tiny_checkpoint

from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import NO_OPTIONS, RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import StructuredOutputsParams
from pellucid.config import EngineConfig
from pellucid.engine.admission import Prompt, RequestChecker
from pellucid.engine.engine import LLMEngine
from pellucid.executor.uniproc import UniProcExecutor
from pellucid.text.tokenizer import Tokenizer as PellucidTokenizer

VOCAB = 300
NAN_TOKEN = 299  # its row of the embedding is NaN
BEYOND = "<x19>"  # a token of the tokenizer that the embedding has not: 309
BLOCK = 4
BASE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "num_blocks": 256,
    "block_size": BLOCK,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
    "num_threads": 1,
}
# In whose company, and how planned.
COMPANIES: dict[str, dict[str, Any]] = {
    "step by step": {},
    "plans ahead": {"async_scheduling": True},
    "chunks of 8": {"max_num_batched_tokens": 8},
    "plans ahead, chunks of 8": {"async_scheduling": True, "max_num_batched_tokens": 8},
    "drafts": {"speculative_method": "ngram", "prompt_lookup_min": 1, "speculative_max_num_seqs": 12},
    "drafts, plans ahead": {
        "speculative_method": "ngram",
        "prompt_lookup_min": 1,
        "speculative_max_num_seqs": 3,
        "async_scheduling": True,
    },
    "slots": {"kv_layout": "slot", "num_blocks": 1024, "block_size": 1},
    "few blocks": {"num_blocks": 34, "max_num_batched_tokens": 24},
    "few blocks, plans ahead": {"num_blocks": 34, "max_num_batched_tokens": 24, "async_scheduling": True},
    "three at once": {"max_num_seqs": 3},
    "no prefix cache": {"enable_prefix_caching": False},
    "prefill first": {"policy": "prefill_first"},
    "padded": {"policy": "padded", "block_size": 64, "num_blocks": 64},
}


def build_model(folder: Path, **sizes: int) -> Path:
    """A tiny model with one token that makes NaN of whatever reads it, and a tokenizer with tokens that it has not."""
    made = build_tiny_checkpoint(folder, "llama", **sizes)
    weights = load_file(made / "model.safetensors")
    weights["model.embed_tokens.weight"][NAN_TOKEN] = float("nan")
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<x{index}>" for index in range(20)])
    tokenizer.save(str(made / "tokenizer.json"))
    return made


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: str | list[int]
    params: SamplingParams
    options: RequestOptions = NO_OPTIONS


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 290, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


CHOICE = StructuredOutputsParams(choice=("the fox", "the dog"))
SHARED = prompt_of(24, 1)  # how some neighbours, and some that fail, begin


def asked() -> list[Asked]:
    """Neighbours of all kinds: greedy and drawn, with penalties, structure, states, prompt logprobs, repetition, stop strings."""
    base: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True, "logprobs": 3}
    drawn: dict[str, Any] = {**base, "temperature": 0.9, "seed": 11}
    hidden = RequestOptions(hidden_states=HiddenStatesParams(positions=(0, 3, -1)))
    return [
        Asked(prompt_of(3, 2), SamplingParams(temperature=0, **base)),
        Asked([*SHARED, 7, 8], SamplingParams(top_p=0.9, **drawn)),
        Asked(prompt_of(17, 3), SamplingParams(**drawn, repetition_penalty=1.3, presence_penalty=0.4)),
        Asked(SHARED[:20], SamplingParams(temperature=0, prompt_logprobs=2, **base)),
        Asked(prompt_of(5, 4), SamplingParams(**{**drawn, "ignore_eos": False}, structured_outputs=CHOICE)),
        Asked(prompt_of(9, 5), SamplingParams(**drawn), hidden),
        Asked([10, 20, 10, 20, 10], SamplingParams(**drawn, allowed_token_ids=(10, 20))),
        Asked("the quick brown", SamplingParams(**drawn, stop=["zzz", "qqq"], n=2)),
    ]


@dataclass(frozen=True)
class Bits:
    """All that a choice was given."""

    tokens: torch.Tensor
    values: torch.Tensor  # of logprobs and prompt logprobs
    states: torch.Tensor
    text: str
    reason: str | None


def bits_of(output: RequestOutput) -> list[Bits]:
    found = []
    for choice in output.outputs:
        rows = [*(choice.logprobs or []), *(output.prompt_logprobs or [])]
        values = [(token, row[token].logprob) for row in rows if row for token in sorted(row)]
        states = np.zeros(0, np.float32) if choice.hidden_states is None else choice.hidden_states
        found.append(
            Bits(
                torch.tensor(choice.token_ids),
                torch.tensor(values, dtype=torch.float64),
                torch.tensor(states),
                choice.text,
                choice.finish_reason,
            )
        )
    return found


def assert_same_bits(found: RequestOutput, expected: RequestOutput, which: str) -> None:
    pairs = list(zip(bits_of(found), bits_of(expected), strict=True))
    for index, (one, other) in enumerate(pairs):
        error = found.outputs[index].error
        assert torch.equal(one.tokens, other.tokens), f"tokens of {which} differ: {error}"
        assert torch.equal(one.values, other.values), f"logprobs of {which} differ: {error}"
        assert torch.equal(one.states, other.states), f"states of {which} differ: {error}"
        assert (one.text, one.reason) == (other.text, other.reason), f"{which}: {error}"


class World:
    """An engine whose requests come at chosen steps."""

    def __init__(self, model: Path, **settings: Any) -> None:
        config = EngineConfig.from_kwargs(model, {**BASE, **settings})
        self.executor = UniProcExecutor(config)
        tokenizer = PellucidTokenizer.of(self.executor.facts)
        self.engine = LLMEngine(config, self.executor, tokenizer, check_every_step=True)
        self.outputs: dict[str, RequestOutput] = {}

    def submit(self, request: Asked, request_id: str, *, stream: bool = True) -> str:
        return self.engine.add_request(
            request.prompt, request.params, request_id=request_id, options=request.options, stream=stream
        )

    def step(self) -> None:
        for output in self.engine.step().finished:
            assert output.request_id not in self.outputs, "every request ends exactly once"
            self.outputs[output.request_id] = output

    def run(self) -> dict[str, RequestOutput]:
        """Until all have ended and nothing is left of them."""
        while self.engine.can_step or self.engine.has_unfinished:
            self.step()
        self.engine.scheduler.check_invariants()
        assert self.engine.block_manager.num_used_blocks == 0
        assert not self.engine.output.requests
        assert not self.engine._choice_ids
        return self.outputs

    def close(self) -> None:
        self.engine.close()


def alone(model: Path) -> list[RequestOutput]:
    """What each neighbour gets from an engine of its own."""
    found = []
    for request in asked():
        world = World(model)
        world.submit(request, "alone")
        found.append(world.run()["alone"])
        world.close()
    assert all(choice.finish_reason in ("length", "stop") for output in found for choice in output.outputs)
    return found


class Blind(RequestChecker):
    """An admission that lets all ids pass."""

    def tokenise(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            return prompt, self.tokenizer.encode(prompt)
        return None, list(prompt)


def past_the_checks(params: SamplingParams, **values: Any) -> SamplingParams:
    """Parameters with values that no constructor takes."""
    made = replace(params)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def patched(target: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replaces a method of one object by what `make` makes of it."""
    setattr(target, name, make(getattr(target, name)))

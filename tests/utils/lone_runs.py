"""Requests of many kinds with the outputs that each has alone, and a check that an output among others is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pellucid import LLM, SamplingParams
from pellucid.api.outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk

Rows = Sequence[Mapping[int, Logprob] | None] | None


@dataclass(frozen=True)
class Job:
    """A request that a test makes again and again; `options` are keywords of `LLM.generate`."""

    prompt: str | list[int]
    params: SamplingParams
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, llm: LLM) -> RequestOutput:
        """Its output."""
        prompts: Any = self.prompt if isinstance(self.prompt, str) else [self.prompt]
        return llm.generate(prompts, self.params, use_tqdm=False, **self.options)[0]


_SHARED = [(7 * i) % 280 + 5 for i in range(40)]
JOBS: tuple[Job, ...] = (
    Job([5, 6], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2)),
    Job([9, 6, 12], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)),
    Job("the quick brown fox", SamplingParams(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True, logprobs=1)),
    Job([*_SHARED, 11], SamplingParams(temperature=1.1, seed=2, max_tokens=10, n=3, ignore_eos=True, logprobs=1)),
    Job([*_SHARED, 12, 13], SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=1, ignore_eos=True)),
    Job("jumps over", SamplingParams(temperature=0.9, seed=3, max_tokens=40, stop=["a", "th"], ignore_eos=True)),
    Job([3], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0)),
    Job(_SHARED[:17], SamplingParams(temperature=0.7, seed=4, max_tokens=25, repetition_penalty=1.2, logprobs=0)),
    Job("hello", SamplingParams(temperature=1.0, seed=5, max_tokens=8, structured_outputs={"regex": "[a-z]{3,6}"})),  # type: ignore[arg-type]
    Job([8, 9, 10], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), {"return_hidden_states": True}),
    Job([8, 9], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), {"capture": ["layers.1.mlp"]}),
)


def lone_runs(llm: LLM, jobs: Sequence[Job] = JOBS) -> list[RequestOutput]:
    """The output of each job with nothing beside it."""
    return [job.run(llm) for job in jobs]


def check_same(output: RequestOutput, alone: RequestOutput) -> None:
    """Tokens, log-probabilities, states, texts and ends are equal."""
    assert output.prompt_token_ids == alone.prompt_token_ids
    _check_logprobs(output.prompt_logprobs, alone.prompt_logprobs)
    for choice, other in zip(output.outputs, alone.outputs, strict=True):
        _check_choice(choice, other)


def _check_choice(choice: CompletionOutput, other: CompletionOutput) -> None:
    assert choice.error is None
    assert torch.equal(torch.tensor(choice.token_ids), torch.tensor(other.token_ids)), "tokens"
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (
        other.text,
        other.finish_reason,
        other.stop_reason,
    )
    _check_logprobs(choice.logprobs, other.logprobs)
    assert (choice.hidden_states is None) == (other.hidden_states is None)
    if choice.hidden_states is not None:
        assert torch.equal(choice.hidden_states, other.hidden_states), "hidden states"  # type: ignore[arg-type]
    assert (choice.captured is None) == (other.captured is None)
    for name, rows in (choice.captured or {}).items():
        assert torch.equal(rows, (other.captured or {})[name]), name  # type: ignore[arg-type]


def check_chunks(chunks: Sequence[StreamChunk], alone: RequestOutput) -> None:
    """All chunks of a request, joined, are its output; each choice ends once."""
    for other in alone.outputs:
        own = [chunk for chunk in chunks if chunk.index == other.index]
        assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == [other.finish_reason]
        assert own[-1].finish_reason is not None
        tokens = [token for chunk in own for token in chunk.token_ids]
        assert torch.equal(torch.tensor(tokens), torch.tensor(other.token_ids)), "tokens"
        assert "".join(chunk.text for chunk in own) == other.text
        if other.logprobs is not None:
            _check_logprobs([row for chunk in own for row in chunk.logprobs or ()], other.logprobs)


def _check_logprobs(rows: Rows, others: Rows) -> None:
    assert (rows is None) == (others is None)
    for row, other in zip(rows or (), others or (), strict=True):
        assert (row is None) == (other is None)
        if row is not None and other is not None:
            assert list(row) == list(other)
            found = torch.tensor([entry.logprob for entry in row.values()], dtype=torch.float64)
            assert torch.equal(found, torch.tensor([entry.logprob for entry in other.values()], dtype=torch.float64))

"""Random prompts of exact lengths, run through an `LLM` step by step with everything timed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.api.outputs import RequestOutput
from pellucid.api.sampling_params import SamplingParams
from pellucid.bench.figures import Spread
from pellucid.errors import EngineDeadError, InvalidRequestError
from pellucid.llm import LLM
from pellucid.trace.records import StepRecord

# Low ids are special tokens in most vocabularies.
FIRST_TOKEN = 100


@dataclass(frozen=True)
class Workload:
    """Token ids of each prompt, and how many tokens are made of each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def random(cls, input_lens: Sequence[int], output_lens: Sequence[int], vocab_size: int, seed: int) -> Workload:
        """Ids drawn evenly from the vocabulary; the same for the same seed."""
        draw = random.Random(seed)
        low = min(FIRST_TOKEN, vocab_size - 1)
        prompts = [[draw.randrange(low, vocab_size) for _ in range(length)] for length in input_lens]
        return cls(prompts, list(output_lens))

    def check(self, max_model_len: int) -> None:
        """Raises InvalidRequestError when a request would be cut short or refused."""
        for prompt, output_len in zip(self.prompts, self.output_lens, strict=True):
            if min(len(prompt), output_len) < 1:
                raise InvalidRequestError(
                    None, f"a request has {len(prompt)} + {output_len} tokens", limit="both must be at least 1"
                )
            if len(prompt) + output_len > max_model_len:
                raise InvalidRequestError(
                    None,
                    f"a request has {len(prompt):,} + {output_len:,} tokens",
                    limit=f"max_model_len is {max_model_len:,}",
                )


@dataclass(frozen=True)
class Measured:
    """One run of a workload. Times in seconds."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    first_token: list[float]  # of each request, since it was submitted
    between_tokens: list[float]  # mean time from a token to the next, of each request with more than one
    step_seconds: list[float]  # of each step, with what the host does around it
    records: list[StepRecord]  # of the last steps, as many as the trace holds

    @property
    def recorded_seconds(self) -> float:
        """Wall time of the steps in `records`: all of it, or the last steps alone where the trace has let go of the first."""
        is_whole = len(self.records) == len(self.step_seconds)
        return self.seconds if is_whole else sum(self.step_seconds[-len(self.records) :])


def run(llm: LLM, workload: Workload) -> Measured:
    """All requests at once, greedy, end tokens ignored, exact lengths.

    Raises:
        InvalidRequestError: a request does not fit the model.
        EngineDeadError: a request failed or made another number of tokens.
    """
    workload.check(llm.engine.max_model_len)
    clock = time.perf_counter
    step_seconds: list[float] = []
    finished: list[RequestOutput] = []
    began = clock()
    for prompt, count in zip(workload.prompts, workload.output_lens, strict=True):
        llm.client.submit(prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=count))
    while llm.client.has_unfinished:
        at = clock()
        finished += llm.client.step()
        step_seconds.append(clock() - at)
    seconds = clock() - began
    records = llm.engine.trace.records[-len(step_seconds) :]
    for output in finished:
        llm.client.release(output.request_id)
        if output.outputs[0].error:
            raise EngineDeadError(f"{output.request_id} failed: {output.outputs[0].error}")
    made = sum(len(output.outputs[0].token_ids) for output in finished)
    if made != sum(workload.output_lens):
        raise EngineDeadError(f"{made:,} tokens were made; {sum(workload.output_lens):,} were asked for")
    timed = [(output.metrics, len(output.outputs[0].token_ids)) for output in finished if output.metrics is not None]
    first = [metrics.time_to_first_token or 0.0 for metrics, _ in timed]
    whole = [metrics.e2e_time or 0.0 for metrics, _ in timed]
    return Measured(
        seconds=seconds,
        prompt_tokens=sum(map(len, workload.prompts)),
        output_tokens=made,
        first_token=first,
        between_tokens=[(e - f) / (n - 1) for e, f, (_, n) in zip(whole, first, timed, strict=True) if n > 1],
        step_seconds=step_seconds,
        records=records,
    )


def spread_of(values: Sequence[float]) -> dict[str, Any] | None:
    """A `Spread` as plain data; None without values."""
    return vars(Spread.of(values)).copy() if values else None

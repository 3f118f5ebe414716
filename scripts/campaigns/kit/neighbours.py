"""Well-behaved requests beside whatever a fuzzer sends: each has a lone run, and must never differ from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from kit.bits import OutputBits, difference
from kit.campaign import Report
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams


@dataclass(frozen=True)
class Neighbour:
    """A request and what it brings when it is alone."""

    prompt: list[int]
    params: SamplingParams
    options: RequestOptions
    alone: OutputBits

    def judge(self, output: Any, report: Report, where: str) -> None:
        """Reports what differs from the lone run."""
        told = difference(OutputBits.of(output), self.alone)
        if told is not None:
            report(f"a neighbour was hurt: {told[0]}", f"{told[1]}\n{self.params}\n{where}")


def make_neighbours(model: Path, count: int, *, vocab_size: int, longest: int) -> list[Neighbour]:
    """`count` requests of at most `longest` positions and their lone runs, on one thread."""
    from pellucid import LLM

    settings: dict[str, Any] = {"max_model_len": longest, "num_blocks": longest, "num_threads": 1, "max_num_seqs": 1}
    with LLM(model, enable_prefix_caching=False, max_num_batched_tokens=512, **settings) as llm:
        return [_make(llm, Random(f"neighbour/{number}"), vocab_size, longest) for number in range(count)]


def _make(llm: Any, draw: Random, vocab_size: int, longest: int) -> Neighbour:
    prompt = draw.choices(range(5, vocab_size), k=draw.randint(1, longest // 2))
    asked: dict[str, Any] = {
        "max_tokens": draw.randint(3, longest // 4),
        "ignore_eos": True,
        "logprobs": draw.choice((0, 2)),
    }
    if draw.random() < 0.5:
        asked |= {"temperature": 0.0}
    else:
        asked |= {"temperature": 0.8, "seed": draw.randrange(2**40), "top_p": draw.choice((0.8, 1.0))}
    if draw.random() < 0.2:
        asked |= {"repetition_penalty": 1.2, "n": 2}
    states = HiddenStatesParams() if draw.random() < 0.2 else None
    params, options = SamplingParams(**asked), RequestOptions(hidden_states=states)
    return Neighbour(prompt, params, options, run_alone(llm, prompt, params, options))


def run_alone(llm: Any, prompt: Sequence[int], params: SamplingParams, options: RequestOptions) -> OutputBits:
    """The bits of a request on an engine that has nothing else to do."""
    client = llm.client
    request_id = client.submit(list(prompt), params, options=options, stream=False)
    while not client.is_finished(request_id):
        client.step()
    bits = OutputBits.of(client.collect(request_id))
    client.release(request_id)
    return bits

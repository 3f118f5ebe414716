"""A plan is plain data: all of it can be sent to an executor in another process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid import config as settings
from pellucid.api.hidden_states import HiddenStatesParams, SteeringParams
from pellucid.config import EngineConfig
from pellucid.contract.plan import ModelRunnerOutput, NewRequest, PlanEntry, RequestSampling, StepPlan, WaitingReasons
from pellucid.executor.uniproc import UniProcExecutor
from pellucid.service.wire import decoder, encode
from pellucid.structure import grammar
from pellucid.testing import GoldenTokens

STRUCTURES: dict[str, dict[str, Any]] = {
    "regex": {"regex": "[ab]{3,9}"},
    "json": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    "choice": {"choice": ["yes", "no", "perhaps"]},
    "grammar": {"grammar": "start: /[xyz]+/"},
    "json_object": {"json_object": True},
}
_PLANS = decoder(StepPlan)


def _new(**given: Any) -> NewRequest:
    sampling = RequestSampling(given.pop("params", SamplingParams()), 5, 0, ((8, 9), (10,)), (2,))
    return NewRequest("r", (1, 2), (3,), (6, 7), sampling, **given)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_plan_with_a_structure_when_sent_then_it_comes_back_equal(kind: str) -> None:
    params = SamplingParams(structured_outputs=STRUCTURES[kind], logit_bias={3: 0.5}, stop=["x"], allowed_token_ids=[1])
    plan = StepPlan(
        *(7, "mixed", (PlanEntry("r", 0, 2, True, (8,), 1, (4,)),), (_new(params=params),)),
        *(("p",), ("f",), WaitingReasons(("w", "v"), "no block")),
    )
    back = _PLANS.decode(encode(plan))
    assert back == plan
    assert back.waiting == {"w": "no block", "v": "head of the queue waits"}


def test_plan_with_states_and_vectors_when_sent_then_every_bit_comes_back() -> None:
    steering = SteeringParams({"layers.0": [0.1, -3.5e-41, 1e30]})
    hidden = HiddenStatesParams((0, -1), (0, -1), stream=True)
    plan = StepPlan(1, "prefill", (), (_new(hidden_states=hidden, capture=("a", "b"), steering=steering),))
    (back,) = _PLANS.decode(encode(plan)).new_requests
    (sent,) = plan.new_requests
    assert (back.hidden_states, back.capture, back.sampling) == (hidden, ("a", "b"), sent.sampling)
    assert back.steering.digest == steering.digest


class Sending:
    """An executor that gets each plan as bytes."""

    def __init__(self, config: EngineConfig, progress: Any = None) -> None:
        self._behind = UniProcExecutor(config, progress)
        self.facts, self.kv_cache = self._behind.facts, self._behind.kv_cache
        self.verify, self.close = self._behind.verify, self._behind.close

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        return self._behind.execute(_PLANS.decode(encode(plan)))


def test_engine_when_its_plans_are_sent_then_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_checkpoint(tmp_path / "m", "llama")
    monkeypatch.setitem(settings.EXECUTORS, ("cpu", "sending"), f"{__name__}:Sending")
    params = [
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=2, structured_outputs=spec)
        for spec in STRUCTURES.values()
    ]
    params += [SamplingParams(temperature=0.7, seed=1, max_tokens=20, bad_words=["a"], repetition_penalty=1.3)]
    prompts = [[5 + i, 6, 7] for i in range(len(params))]
    found = {}
    for backend in ("uniproc", "sending"):
        base = {"num_threads": 1, "num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 8}
        with LLM(model, distributed_executor_backend=backend, **base) as llm:
            found[backend] = llm.generate(
                prompts, params, return_hidden_states=True, steering={"layers.0.mlp": [0.01] * 64}
            )
    for one, other in zip(found["sending"], found["uniproc"], strict=True):
        assert one.outputs[0].error is None
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].text == other.outputs[0].text
        assert torch.equal(
            torch.as_tensor(one.outputs[0].hidden_states), torch.as_tensor(other.outputs[0].hidden_states)
        )


def test_structure_that_is_code_when_sent_then_refused_by_name() -> None:
    params = SamplingParams(structured_outputs=GoldenTokens([1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a GoldenTokens cannot be sent"):
        encode(RequestSampling(params, 0))


def test_grammars_when_more_are_in_use_than_are_kept_then_each_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_checkpoint(tmp_path / "m", "llama")
    compiled: list[Any] = []
    real = grammar._compile
    monkeypatch.setattr(grammar, "_compile", lambda spec, *rest: compiled.append(spec) or real(spec, *rest))
    monkeypatch.setattr(grammar, "_grammars", grammar._Cache(2))
    wanted = [
        SamplingParams(max_tokens=4, structured_outputs={"choice": [word]}) for word in ("ab", "ba", "aa", "bb", "abab")
    ]  # type: ignore[arg-type]
    with LLM(model, num_threads=1, num_blocks=16, max_num_seqs=2) as llm:
        texts = [output["text"] for output in llm.generate([[5, 6]] * len(wanted), wanted, use_tqdm=False)]
        assert texts == ["ab", "ba", "aa", "bb", "abab"]
        assert len(compiled) == len(wanted)
        gc.collect()
        llm.generate([[5, 6]], wanted[0], use_tqdm=False)
    assert len(compiled) == len(wanted) + 1, "what nobody holds is forgotten"

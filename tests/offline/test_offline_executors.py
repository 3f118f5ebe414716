"""The table of executors: one that is registered runs the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid import config as settings
from pellucid.config import EngineConfig, register_executor
from pellucid.contract.plan import ModelRunnerOutput, StepPlan
from pellucid.errors import ConfigError
from pellucid.executor.uniproc import UniProcExecutor

BASE: dict[str, Any] = {"num_threads": 1, "num_blocks": 64, "max_num_batched_tokens": 8}
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, logprobs=2)


class Remote:
    """An executor that has nothing but what the contract names."""

    made: ClassVar[list[Remote]] = []

    def __init__(self, config: EngineConfig, progress: Any = None) -> None:
        self._behind = UniProcExecutor(config, progress)
        self.facts, self.kv_cache = self._behind.facts, self._behind.kv_cache
        self.num_plans, self.is_closed = 0, False
        Remote.made.append(self)

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        self.num_plans += 1
        return self._behind.execute(plan)

    def verify(self, on_damage: Any) -> None:
        return None

    def close(self) -> None:
        self.is_closed = True
        self._behind.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_checkpoint(tmp_path / "m", "llama")


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(settings.EXECUTORS)
    monkeypatch.setattr(Remote, "made", [])
    yield
    settings.EXECUTORS.clear()
    settings.EXECUTORS.update(before)


def test_executor_when_registered_then_it_runs_the_engine_with_the_same_bits(model: Path) -> None:
    prompts = [[5, 6, 7], list(range(3, 40))]
    with LLM(model, **BASE) as llm:
        expected = llm.generate(prompts, PARAMS, return_hidden_states=True)
    register_executor("cpu", "remote", f"{__name__}:Remote")
    with LLM(model, distributed_executor_backend="remote", **BASE) as llm:
        found = llm.generate(prompts, PARAMS, return_hidden_states=True)
        assert llm.engine.verification is None
    (executor,) = Remote.made
    assert executor.num_plans > 12
    assert executor.is_closed
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert torch.equal(
            torch.as_tensor(one.outputs[0].hidden_states), torch.as_tensor(other.outputs[0].hidden_states)
        )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown device": ({"device": "cuda"}, "device is 'cuda'; it must be one of: cpu"),
    "an unknown backend": ({"distributed_executor_backend": "ray"}, "distributed_executor_backend is 'ray'; .*uniproc"),
    "a pair that nobody registered": (
        {"device": "cpu", "distributed_executor_backend": "far"},
        "device is 'cpu' with distributed_executor_backend 'far'; registered: cpu with uniproc, tpu with far",
    ),
    "a module that is none": (
        {"device": "tpu", "distributed_executor_backend": "far"},
        "no_such_module.*cannot be imported",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_executor_when_it_cannot_be_had_then_refused_by_name(model: Path, case: str) -> None:
    wanted, said = WRONG[case]
    if case not in ("an unknown device", "an unknown backend"):
        register_executor("tpu", "far", "no_such_module:Far")
    with pytest.raises(ConfigError, match=said):
        LLM(model, **BASE, **wanted)


@pytest.mark.parametrize("target", ["", "module", "module:", ":Class", "module:not a name", 5, None])
def test_target_when_it_names_no_class_then_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="target is"):
        register_executor("cpu", "mine", target)

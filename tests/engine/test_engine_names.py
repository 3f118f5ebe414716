"""The names that callers of the layers use: constructor fields, tensors on access, news of a choice, outputs that are dicts."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils.async_engines import SETTINGS, build_model, start_engine
from utils.children import finished

from pellucid import LLM, RequestOutput, SamplingParams, StreamChunk
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.outputs import EngineCoreOutput
from pellucid.api.request_options import RequestOptions
from pellucid.contract.plan import ModelRunnerOutput
from pellucid.errors import InvalidRequestError
from pellucid.scheduling.request import EngineCoreRequest

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
KEYS = ["request_id", "status", "finish_reason", "token_ids", "text", "usage"]


def test_request_when_made_with_the_fields_of_hidden_states_then_both_forms_say_the_same() -> None:
    given = {"return_hidden_states": True, "hidden_states_for_tokens": [0, -1], "hidden_states_layers": [1]}
    one = EngineCoreRequest("r", [1, 2], PARAMS, **given)
    other = EngineCoreRequest("r", (1, 2), PARAMS, hidden_states=HiddenStatesParams((0, -1), (1,)))
    assert one == other
    assert (other.return_hidden_states, other.hidden_states_for_tokens, other.hidden_states_layers) == (
        True,
        [0, -1],
        [1],
    )
    assert (one.prompt_token_ids, one.max_tokens, one.seed) == ((1, 2), 4, 0)
    none = EngineCoreRequest("r", (1,), PARAMS)
    assert (none.return_hidden_states, none.hidden_states_for_tokens, none.hidden_states) == (False, None, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"return_hidden_states": 1}, "return_hidden_states is 1"),
        ({"hidden_states_for_tokens": [0]}, "hidden_states_for_tokens needs return_hidden_states"),
        ({"return_hidden_states": True, "hidden_states_layers": ["a"]}, "hidden_states_layers"),
        ({"return_hidden_states": True, "hidden_states": HiddenStatesParams((0,))}, "the three fields say"),
    ],
)
def test_request_when_its_fields_are_wrong_or_disagree_then_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        EngineCoreRequest("r", (1,), PARAMS, **given)


def test_runner_output_when_read_then_tensors_on_the_memory_of_its_arrays() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    output = ModelRunnerOutput({}, last_hidden_states={"r": rows}, hidden_states_positions={"r": [4]})
    found = output.last_hidden_states["r"]
    assert isinstance(found, torch.Tensor)
    assert found.data_ptr() == rows.ctypes.data
    assert output.hidden_rows["r"] is rows
    given = ModelRunnerOutput({}, last_hidden_states={"r": torch.ones(2, 3)})
    assert isinstance(given.hidden_rows["r"], np.ndarray)
    nothing = ModelRunnerOutput({})
    assert nothing.last_hidden_states is None
    assert nothing.hidden_states_positions is None
    assert nothing.hidden_rows == {}
    with pytest.raises(AttributeError):
        output.last_hidden_states = {}  # type: ignore[misc]


def test_news_of_a_choice_are_one_class_under_two_names() -> None:
    assert StreamChunk is EngineCoreOutput
    made = EngineCoreOutput(request_id="r", new_token_ids=[1], hidden_states=np.zeros(2, np.float32))
    assert (made.token_ids, made.new_logprobs, made.logprobs, made.text, made.index) == ([1], None, None, "", 0)
    assert made.has_states
    assert not EngineCoreOutput("r").has_states


# ---- outputs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("names") / "m")


def _offline(model: Path, wants: bool) -> list[RequestOutput]:
    with LLM(model, **SETTINGS) as llm:
        return [llm.generate([[5, 6, 7]], PARAMS, return_hidden_states=wants)[0] for _ in range(2)]


async def _asynchronous(kind: str, model: Path, wants: bool) -> list[RequestOutput]:
    engine = start_engine(kind, model)
    options = RequestOptions(hidden_states=HiddenStatesParams() if wants else None)
    try:
        return [await engine.wait(await engine.submit([5, 6, 7], PARAMS, options=options)) for _ in range(2)]
    finally:
        engine.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("kind", ["offline", "thread", "process"])
async def test_output_when_used_as_a_dict_then_it_is_one_and_the_rest_are_attributes(
    model: Path, kind: str, wants: bool
) -> None:
    outputs = _offline(model, wants) if kind == "offline" else await _asynchronous(kind, model, wants)
    out, again = outputs
    assert isinstance(out, dict)
    assert isinstance(out, RequestOutput)
    assert list(out) == list(dict(out)) == KEYS
    assert len(out) == 6
    plain = {**out}
    assert json.loads(json.dumps(out)) == plain == out
    assert (out["token_ids"], out["text"], out["finish_reason"]) == (
        out.outputs[0].token_ids,
        out.outputs[0].text,
        "length",
    )
    assert out["usage"] == out.usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert "outputs" not in out
    with pytest.raises(KeyError):
        out["outputs"]
    assert out.prompt_token_ids == [5, 6, 7]
    assert out.finished
    assert out.metrics is not None
    assert out == out
    assert out != again, "another request has another id"
    assert {**again, "request_id": out.request_id} == out
    for made in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(made) is type(out)
        assert made == out
        assert made.metrics == out.metrics
        states, expected = made.outputs[0].hidden_states, out.outputs[0].hidden_states
        assert (expected is None) == (not wants)
        assert states is None if expected is None else np.array_equal(np.asarray(states), np.asarray(expected))
    shallow = copy.copy(out)
    assert shallow.outputs is out.outputs
    assert copy.deepcopy(out).outputs[0] is not out.outputs[0]
    replaced = dataclasses.replace(out, request_id="other", prompt="p")
    assert (type(replaced), list(replaced), replaced.prompt) == (type(out), KEYS, "p")
    assert replaced == {**out, "request_id": "other"}


def test_server_when_states_are_asked_for_then_it_imports_no_torch(model: Path) -> None:
    code = f"""
import asyncio, sys
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.request_options import RequestOptions
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine
async def main():
    engine = AsyncLLMEngine.start(EngineConfig({str(model)!r}, num_threads=1, num_blocks=64))
    out = await engine.wait(await engine.submit([5, 6], options=RequestOptions(hidden_states=HiddenStatesParams())))
    assert out.outputs[0].hidden_states is not None
    engine.close()
asyncio.run(main())
print("torch" in sys.modules)
"""
    with LLM(model, num_threads=1, num_blocks=64):  # packs it: the first start reads model code
        pass
    done = finished([sys.executable, "-c", code], check=True)
    assert done.stdout.strip() == "False"

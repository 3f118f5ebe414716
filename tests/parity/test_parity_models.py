"""Every family against transformers on the CPU: hidden states of every layer, logits, prefill and decode, in float32 and bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from utils.hidden_parity import assert_close, assert_states_are_transformers
from utils.tiny_models import FAMILIES, build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.contract.batch import single_sequence_batch
from pellucid.core import abi
from pellucid.executor.eager import load_eager
from pellucid.executor.loader import open_module
from pellucid.ops import reference
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend
from pellucid.weights.checkpoint import open_checkpoint

PROMPT_LENGTHS = (70, 3, 33, 16, 1)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def load_reference(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager"
    ).eval()


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def residual_streams(model: Any, input_ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The embedding's output and the residual stream behind each block, and the final hidden states, of an eager module."""
    streams: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output[0] + output[1]))
        for layer in model.model.layers
    ]
    first = model.model.layers[0].register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].clone()))
    hidden = model(input_ids, torch.arange(len(input_ids), dtype=torch.int32))
    for hook in (*hooks, first):
        hook.remove()
    return streams, hidden


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_each_layer_when_run_eagerly_then_hidden_states_are_transformers(checkpoint: Path, backend: str) -> None:
    context = abi.Context(num_threads=1)
    opened = open_checkpoint(checkpoint)
    _, model = open_module(opened)
    load_eager(model, NativeBackend(context), "float32", {})
    config = model.config
    prompt = random_prompts()[0]
    batch = single_sequence_batch(prompt, 16)
    shape = {
        "n_layers": config.num_hidden_layers,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }
    if backend == "native":
        kv = abi.KVCache(**shape, block_size=16, n_blocks=8, dtype=abi.F32)
        step = Step(NativeBackend(context), batch, kv)
    else:
        step = Step(
            reference.run, batch, reference.ReferenceKV(**shape, n_cells=128, block_size=16, dtype=torch.float32)
        )
    with torch.no_grad(), step_scope(step):
        streams, hidden = residual_streams(model, torch.tensor(prompt, dtype=torch.int32))
        logits = model.compute_logits(hidden)
        expected = load_reference(checkpoint)(torch.tensor([prompt]), output_hidden_states=True)
    states = [state[0] for state in expected.hidden_states]
    assert len(streams) == len(states)
    for layer, (found, state) in enumerate(zip(streams[:-1], states[:-1], strict=True)):
        assert_close(found, state, f"residual stream {layer}")
    assert_close(hidden, states[-1], "final hidden states")
    assert_close(logits, expected.logits[0], "logits")


def test_program_when_prompts_of_unequal_lengths_are_decoded_together_then_logprobs_are_transformers(
    checkpoint: Path,
) -> None:
    prompts = random_prompts()
    model = load_reference(checkpoint)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5, prompt_logprobs=0)
    with LLM(checkpoint, dtype="float32", max_model_len=128, num_blocks=64, max_num_batched_tokens=48) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0]
        logprobs = logits.log_softmax(-1)
        for position, token in enumerate(tokens):
            row = logprobs[len(prompt) - 1 + position]
            top, runner_up = row.topk(2).values.tolist()
            assert token == int(row.argmax()) or top - runner_up < 1e-4
            for candidate, found in (output.outputs[0].logprobs or [])[position].items():
                assert found.logprob == pytest.approx(row[candidate].item(), abs=1e-3)
        for position, found_row in enumerate(output.prompt_logprobs or []):
            if found_row is not None:
                expected = logprobs[position - 1, prompt[position]].item()
                assert found_row[prompt[position]].logprob == pytest.approx(expected, abs=1e-3)


def test_hidden_states_when_asked_of_the_engine_then_every_layer_and_position_is_transformers(checkpoint: Path) -> None:
    with LLM(checkpoint, dtype="float32", max_model_len=128, num_blocks=64, max_num_batched_tokens=48) as llm:
        assert_states_are_transformers(llm, load_reference(checkpoint), random_prompts(), max_tokens=12)


def test_bfloat16_when_decoded_greedily_then_tokens_equal_or_their_logprobs_close(
    checkpoint: Path, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference suite's rule: up to the first other token all are equal, and there the two logprobs lie close."""
    model = load_reference(checkpoint, torch.bfloat16)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
    differences = []
    with LLM(checkpoint, dtype="bfloat16", max_model_len=128, num_blocks=64) as llm:
        outputs = llm.generate(random_prompts(), params)
    for prompt, output in zip(random_prompts(), outputs, strict=True):
        tokens = output["token_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + tokens])).logits[0].float().log_softmax(-1)
        for position, token in enumerate(tokens):
            row = logprobs[len(prompt) - 1 + position]
            found = (output.outputs[0].logprobs or [])[position][token].logprob
            differences.append(abs(found - row[token].item()))
            assert token == int(row.argmax()) or row.max().item() - row[token].item() < 0.35
    mean = sum(differences) / len(differences)
    record_property("mean_logprob_difference", mean)
    with capsys.disabled():
        print(f" [bfloat16 mean logprob difference {mean:.4f}]", end="")
    assert mean < 0.08


@pytest.mark.parametrize("act", ["swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "linear"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_activation_of_any_name_when_run_then_logprobs_are_transformers(tmp_path: Path, family: str, act: str) -> None:
    key = "hidden_activation" if family == "gemma3" else "hidden_act"
    checkpoint = build_tiny_checkpoint(tmp_path, family, **{key: act})
    prompt = random_prompts()[0]
    with torch.no_grad():
        logits = load_reference(checkpoint)(torch.tensor([prompt])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    with LLM(checkpoint, dtype="float32", num_threads=1, num_blocks=32) as llm:
        found = torch.tensor(llm.score([prompt[:1]], [prompt[1:]])[0], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=3e-5, rtol=0)

"""What a module with operations outside `pellucid.ops` may do beside calling them, and what of it the log names."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams, ops
from pellucid.config import EngineConfig
from pellucid.contract.batch import single_sequence_batch
from pellucid.core import abi
from pellucid.errors import InvalidRequestError, UnsupportedModelError
from pellucid.executor.eager import materialise
from pellucid.executor.loader import open_model
from pellucid.models.llama import LlamaForCausalLM
from pellucid.models.registry import ModelRegistry
from pellucid.ops import reference
from pellucid.ops.dispatch import Step, step_scope
from pellucid.program.runner import NativeProgram
from pellucid.replay import replay
from pellucid.weights.tensor import TensorView

SETTINGS: dict[str, Any] = {"num_threads": 1, "num_blocks": 32, "max_num_seqs": 4, "max_model_len": 128}
NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32]]
NUM_LAYERS, WIDTH, VOCAB = 3, 64, 300


class TanhLlama(LlamaForCausalLM):
    """Llama with functions of torch on its hidden states and on its logits."""

    def forward(self, input_ids: Any, positions: Any) -> Any:
        hidden = self.model(input_ids, positions)
        return torch.tanh(hidden / 2) * 1.5 + hidden

    def compute_logits(self, hidden_LD: Any) -> Any:
        return self.lm_head(hidden_LD).clamp(-30.0, 30.0)


class Bigrams(nn.Module):
    """A module of torch alone that loads itself: a token is told by the one before it."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 96), nn.Dropout(0.5), nn.GELU(), nn.Linear(96, config.hidden_size)
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        x = self.embed(input_ids)
        x += self.mlp(x)  # in place: whoever kept x must have a copy
        return x

    def compute_logits(self, hidden: Any) -> Any:
        return self.head(hidden)

    def load_weights(self, weights: Iterable[tuple[str, TensorView]]) -> set[str]:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=generator)
        names = dict(weights)
        embedding = names["model.embed_tokens.weight"].to_float32()
        with torch.no_grad():
            self.embed.weight.copy_(torch.from_numpy(np.array(embedding)))
        return {"embed.weight"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("foreign"), "llama")


@pytest.fixture
def serve(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Path]]:
    """Registers a class for the checkpoint, until the test ends."""
    monkeypatch.setattr(ModelRegistry, "_registered", {})
    path = tiny / "config.json"
    original = path.read_text()

    def register(model_class: Any) -> Path:
        ModelRegistry.register_model("MyModelForCausalLM", model_class)
        path.write_text(json.dumps({**json.loads(original), "architectures": ["MyModelForCausalLM"]}))
        return tiny

    yield register
    path.write_text(original)


def plain_module(path: Path) -> Any:
    """The registered module with its values, for torch."""
    module = open_model(path, EngineConfig(model=str(path))).module.eval()
    context = abi.Context(num_threads=1)
    materialise(module, context, torch.float32)
    context.close()
    return module


def torch_loop(module: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the hidden states of all positions but the last: all positions anew for each token, ops in plain torch."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        kv = reference.ReferenceKV(NUM_LAYERS, 2, 16, n_cells=64, block_size=64, dtype=torch.float32)
        batch = single_sequence_batch(tokens, 64)
        positions = torch.arange(len(tokens), dtype=torch.int32)
        with torch.no_grad(), step_scope(Step(reference.run, batch, kv)):
            hidden = module(torch.tensor(tokens, dtype=torch.int32), positions)
            tokens.append(int(module.compute_logits(hidden)[-1].argmax()))
    return tokens[len(prompt) :], hidden


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "runs eagerly" in record.getMessage()]


@pytest.mark.parametrize("model_class", [TanhLlama, Bigrams])
@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 4}], ids=str)
def test_module_with_foreign_ops_when_served_then_tokens_and_states_are_those_of_a_torch_loop(
    serve: Callable[[Any], Path], model_class: Any, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = serve(model_class)
    module = plain_module(path)
    with caplog.at_level(logging.WARNING), LLM(path, **SETTINGS, **settings) as llm:
        for prompt in PROMPTS:
            tokens, hidden = torch_loop(module, prompt)
            rows = list(range(len(hidden)))
            options = {"return_hidden_states": True, "hidden_states_for_tokens": rows}
            output = llm.generate([prompt], GREEDY, use_tqdm=False, **options)[0].outputs[0]  # type: ignore[arg-type]
            assert list(output.token_ids) == tokens
            torch.testing.assert_close(output.hidden_states, hidden, rtol=1e-4, atol=1e-4)
        together = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [list(output["token_ids"]) for output in together] == [torch_loop(module, ids)[0] for ids in PROMPTS]
    (line,) = lines_of(caplog)
    assert ("torch.tanh" if model_class is TanhLlama else "torch.nn.functional.gelu") in line


def test_activations_of_a_module_with_foreign_ops_when_captured_and_steered_then_those_of_the_module(
    serve: Callable[[Any], Path],
) -> None:
    path, prompt = serve(TanhLlama), PROMPTS[0]
    one = SamplingParams(temperature=0, max_tokens=1)
    vector = torch.linspace(-1, 1, WIDTH)
    module = plain_module(path)
    seen: dict[str, torch.Tensor] = {}
    kept = module.model.layers[1].register_forward_hook(lambda m, i, o: seen.update({"layers.1": o[0] + o[1]}))
    plain = torch_loop(module, prompt)
    layer_1 = seen["layers.1"][: len(prompt)]
    kept.remove()
    module.model.layers[1].register_forward_hook(lambda m, i, o: (o[0] + vector, o[1]))
    steered = torch_loop(module, prompt)
    assert steered[0] != plain[0]
    with LLM(path, **SETTINGS) as llm:
        found = llm.generate([prompt], one, capture=["layers.1"], use_tqdm=False)[0].outputs[0]
        torch.testing.assert_close(torch.as_tensor(found.captured["layers.1"]), layer_1, rtol=1e-4, atol=1e-4)
        output = llm.generate([prompt], GREEDY, steering={"layers.1": vector.tolist()}, use_tqdm=False)[0]
        assert list(output["token_ids"]) == steered[0]


def test_names_of_a_module_with_foreign_ops_when_told_then_those_of_its_program(
    serve: Callable[[Any], Path], tiny: Path
) -> None:
    found = []
    for model_class in (LlamaForCausalLM, TanhLlama):
        with LLM(serve(model_class), **SETTINGS) as llm:
            facts = llm.engine.executor.facts
            found.append((facts.activations, facts.steerable))
    assert found[0] == found[1]
    assert set(found[0][1]) < set(found[0][0]), "parts of fused matrices cannot be steered"


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_module_that_is_called_twice_when_captured_then_its_first_call_has_the_name(
    serve: Callable[[Any], Path], enforce_eager: bool
) -> None:
    path = serve(mixed(lambda self, x: self.model.layers[1].mlp(x)))
    one, asked = (
        SamplingParams(temperature=0, max_tokens=1),
        {"capture": ["layers.1.mlp"], "return_hidden_states": True},
    )
    with LLM(path, **SETTINGS, enforce_eager=enforce_eager) as llm:
        captured = llm.generate([PROMPTS[0]], one, **asked, use_tqdm=False)[0].outputs[0].captured["layers.1.mlp"]
    with LLM(serve(LlamaForCausalLM), **SETTINGS) as llm:
        expected = llm.generate([PROMPTS[0]], one, **asked, use_tqdm=False)[0].outputs[0].captured["layers.1.mlp"]
    assert torch.equal(torch.as_tensor(captured), torch.as_tensor(expected))


class OwnHead(LlamaForCausalLM):
    """A layer of torch's own has random values until its pieces are read: tracing must not take them for constants."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__(config, prefix)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def compute_logits(self, hidden_LD: Any) -> Any:
        return ops.linear(hidden_LD, self.lm_head.weight.flip(0))


def test_weight_that_is_computed_from_a_layer_of_torch_when_served_then_from_its_loaded_values(
    serve: Callable[[Any], Path],
) -> None:
    path = serve(OwnHead)
    expected = torch_loop(plain_module(path), PROMPTS[0])[0]
    with LLM(path, **SETTINGS) as llm:
        assert list(llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)[0]["token_ids"]) == expected


def test_activation_when_the_module_changes_it_in_place_then_as_it_was_made(serve: Callable[[Any], Path]) -> None:
    path, prompt = serve(Bigrams), PROMPTS[0]
    expected = plain_module(path).embed(torch.tensor(prompt)).detach()
    with LLM(path, **SETTINGS) as llm:
        found = llm.generate([prompt], SamplingParams(max_tokens=1), capture=["embed"], use_tqdm=False)[0].outputs[0]
        assert torch.equal(torch.as_tensor(found.captured["embed"]), expected)
        with pytest.raises(InvalidRequestError, match=r"layer 1; the model has no activation 'layers.0'"):
            llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_layers=[1])


def test_trace_of_a_module_with_foreign_ops_when_replayed_then_equal(
    serve: Callable[[Any], Path], tmp_path: Path
) -> None:
    path = serve(TanhLlama)
    with LLM(path, **SETTINGS, trace_path=str(tmp_path / "run.jsonl")) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    ModelRegistry.register_model("AnotherForCausalLM", Bigrams)  # says nothing of this model
    report = replay(tmp_path / "run.jsonl")
    assert report.difference is None
    assert report.num_tokens == NUM_TOKENS * len(PROMPTS)


# ---- what falls back, and what does not --------------------------------------------------------------------------------

W = torch.ones(WIDTH, WIDTH)
FOREIGN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a function of torch": (lambda self, x: torch.tanh(x), "torch.tanh"),
    "a function of torch.nn": (lambda self, x: nn.functional.silu(x), "torch.nn.functional.silu"),
    "an operator": (lambda self, x: x * 2, "torch.Tensor.mul"),
    "a tensor's operator": (lambda self, x: W[:1] + x, "torch.Tensor.add"),
    "a method": (lambda self, x: x.relu(), "torch.Tensor.relu"),
    "indexing": (lambda self, x: x[:, list(range(WIDTH))], "torch.Tensor.__getitem__"),
    "the number of rows": (lambda self, x: ops.add(x, torch.zeros(x.shape[0], WIDTH)), "torch.zeros"),
    "rows and width": (lambda self, x: ops.add(x, torch.zeros(x.shape)), "torch.zeros"),
    "unpacking a shape": (lambda self, x: ops.add(x, torch.zeros(*x.shape)), "torch.zeros"),
    "a branch": (lambda self, x: x if x.shape[0] > 0 else None, "Tensor.shape"),
    "numpy": (lambda self, x: torch.from_numpy(np.tanh(x.numpy())), "torch.Tensor.numpy"),
    "a tensor among activations": (lambda self, x: ops.add(x, torch.zeros_like(x)), "torch.zeros_like"),
    "a tensor before activations": (lambda self, x: ops.add(torch.zeros(1, WIDTH).expand(len(x), -1).contiguous(), x), "expand"),
    "an op of a tensor alone": (lambda self, x: ops.add(x, ops.scale(torch.ones_like(x), 0.5)), "torch.ones_like"),
    "a weight made of weights": (lambda self, x: ops.linear(x, self.mix.T), "torch.Tensor.T"),
    "iteration": (lambda self, x: torch.stack([row for row in x]), "torch.stack"),  # noqa: C416
    "a comparison": (lambda self, x: x * (x == x), "torch.Tensor.__eq__"),
}  # fmt: skip


def mixed(mix: Callable[[Any, Any], Any]) -> Any:
    """A class whose hidden states go through `mix`."""

    class Mixed(LlamaForCausalLM):
        mix = property(lambda self: self.model.layers[0].self_attn.o_proj.weight)

        def forward(self, input_ids: Any, positions: Any) -> Any:
            return mix(self, self.model(input_ids, positions))

    return Mixed


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_operation_when_loaded_then_eager_and_the_log_names_it(
    serve: Callable[[Any], Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    mix, op = FOREIGN[name]
    path = serve(mixed(mix))
    expected = torch_loop(plain_module(path), PROMPTS[0])[0]
    with caplog.at_level(logging.WARNING), LLM(path, **SETTINGS) as llm:
        assert list(llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)[0]["token_ids"]) == expected
    (line,) = lines_of(caplog)
    assert op in line


def test_module_of_ops_alone_when_loaded_then_a_program_and_nothing_is_said(
    serve: Callable[[Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    ones = [np.full(WIDTH, 1.0, np.float32)]

    def scaled(self: Any, x: Any) -> Any:
        x = ops.rms_norm(x, np.full(WIDTH, 2.0, np.float32), 1e-6)  # constants that nothing else keeps alive
        x = ops.rms_norm(x, np.full(WIDTH, 0.5, np.float32), 1e-6)
        parts = ops.add(x, ops.rms_norm(x, ones[0], 1e-6)).split(WIDTH // 2, dim=-1)
        return ops.linear(parts[1], np.eye(WIDTH, WIDTH // 2, dtype=np.float32))

    path = serve(mixed(scaled))
    expected = torch_loop(plain_module(path), PROMPTS[0])[0]
    with caplog.at_level(logging.WARNING):
        for settings in ({}, {"enforce_eager": True}):
            with LLM(path, **SETTINGS, **settings) as llm:
                assert isinstance(llm.engine.executor.runner.executable, NativeProgram) == (not settings)  # type: ignore[attr-defined]
                assert list(llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)[0]["token_ids"]) == expected
    assert lines_of(caplog) == []


class OwnError(Exception):
    """Of a module's own code."""


def _raise(self: Any, x: Any) -> Any:
    raise OwnError("this is mine")


OWN_ERRORS: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "an error": (_raise, OwnError, "^this is mine$"),
    "a wrong call": (lambda self, x: len(), TypeError, r"^len\(\) takes exactly one argument"),  # type: ignore[call-arg]
    "a wrong name": (lambda self, x: self.no_such_thing, AttributeError, "no_such_thing"),
    "no hidden states": (lambda self, x: None, TypeError, "Mixed.forward gave NoneType, which no op gave"),
    "an activation of no name": (lambda self, x: ops.act(x, "wave"), UnsupportedModelError, "activation is 'wave'"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_ERRORS)
def test_error_of_a_modules_own_code_when_loaded_then_it_is_shown_as_it_is(
    serve: Callable[[Any], Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    mix, kind, text = OWN_ERRORS[name]
    with pytest.raises(kind, match=text), LLM(serve(mixed(mix)), **SETTINGS):
        pass
    assert lines_of(caplog) == []


def test_module_that_insists_on_tensors_when_enforced_eager_then_served_and_else_its_error(
    serve: Callable[[Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    def insist(self: Any, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            raise OwnError("no tensor")
        return x

    path = serve(mixed(insist))
    with pytest.raises(OwnError), LLM(path, **SETTINGS):
        pass
    expected = torch_loop(plain_module(path), PROMPTS[0])[0]
    with caplog.at_level(logging.WARNING), LLM(path, **SETTINGS, enforce_eager=True) as llm:
        assert list(llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)[0]["token_ids"]) == expected
    (line,) = lines_of(caplog)
    assert "cannot be traced (OwnError: no tensor)" in line


def test_module_with_foreign_ops_when_it_fails_eagerly_then_its_error_is_shown_as_it_is(
    serve: Callable[[Any], Path],
) -> None:
    def wrong(self: Any, x: Any) -> Any:
        return torch.tanh(x) @ torch.ones(3, 3)

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"), LLM(serve(mixed(wrong)), **SETTINGS):
        pass


SHAPES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "another width": (lambda self, x: torch.tanh(x)[:, :8], r"Mixed.forward gave float32 \[1, 8\]; it must give"),
    "another type": (lambda self, x: torch.tanh(x).double(), r"gave float64 \[1, 64\]; it must give float32 \[1, 64\]"),
    "a tuple": (lambda self, x: (torch.tanh(x), x), "gave a tuple; it must"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_module_with_foreign_ops_when_it_gives_other_sizes_then_refused_by_name(
    serve: Callable[[Any], Path], name: str
) -> None:
    mix, text = SHAPES[name]
    with pytest.raises(UnsupportedModelError, match=text), LLM(serve(mixed(mix)), **SETTINGS):
        pass

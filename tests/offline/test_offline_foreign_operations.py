"""A module that uses operations outside `pellucid.ops` is served eagerly, and says so once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM as HFLlama
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams, ops
from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.errors import ConfigError, ForeignOperationError, InvalidRequestError, UnsupportedModelError
from pellucid.models.llama import LlamaForCausalLM
from pellucid.models.registry import ModelRegistry

BASE: dict[str, Any] = {"num_threads": 1, "num_blocks": 64, "block_size": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(3, 40)), [9]]
LAYERS = [0, 1, 2, -1]
NAME = "ForeignForCausalLM"


class Sine(LlamaForCausalLM):
    """An activation that no op has, written with torch."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__(config, prefix)
        for layer in self.model.layers:
            layer.mlp.forward = _sine_mlp(layer.mlp)


def _sine_mlp(mlp: Any) -> Any:
    def forward(x: Any) -> Any:
        both = mlp.gate_up_proj(x)
        gate, up = both if isinstance(both, tuple) else both.split([both.shape[1] // 2] * 2, -1)
        return mlp.down_proj(torch.sin(gate) * up)

    return forward


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(ModelRegistry._registered)
    yield
    ModelRegistry._registered.clear()
    ModelRegistry._registered.update(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_checkpoint(tmp_path / "m", "llama", num_hidden_layers=2)


class _Sin(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def _named(model: Path, architecture: str = NAME) -> Path:
    """The checkpoint for a class of the test's own."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return model


def _reference(model: Path) -> HFLlama:
    """transformers' model of the same weights, with the same activation."""
    hf = HFLlama.from_pretrained(model, dtype=torch.float32).eval()
    for layer in hf.model.layers:
        layer.mlp.act_fn = _Sin()
    return hf


@torch.no_grad()
def _greedy(hf: HFLlama, prompt: list[int], count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Tokens, and hidden states [rows, D] by layer of prompt and output but the last token."""
    tokens = list(prompt)
    for _ in range(count):
        out = hf(torch.tensor([tokens]), output_hidden_states=True)
        states = [state[0] for state in out.hidden_states]
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens[len(prompt) :], states


@pytest.mark.parametrize(
    "settings", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 5}, {"kv_layout": "slot", "num_blocks": 1024}]
)
def test_foreign_module_when_served_then_tokens_and_states_of_a_plain_torch_loop(
    model: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    hf = _reference(model)
    ModelRegistry.register_model(NAME, Sine)
    with caplog.at_level(logging.WARNING), LLM(_named(model), **{**BASE, **settings}) as llm:
        found = llm.generate(
            PROMPTS, GREEDY, return_hidden_states=True, hidden_states_layers=LAYERS, hidden_states_for_tokens=[0, -1]
        )
    said = [record.getMessage() for record in caplog.records if "runs eagerly" in record.getMessage()]
    assert len(said) == 1
    assert "torch.sin" in said[0]
    for output, prompt in zip(found, PROMPTS, strict=True):
        tokens, states = _greedy(hf, prompt, GREEDY.max_tokens)
        assert list(output.outputs[0].token_ids) == tokens
        rows = torch.as_tensor(output.outputs[0].hidden_states)
        assert rows.shape[:2] == (2, len(LAYERS))
        for layer in (0, 1, -1):
            expected = states[layer][[0, -1]]
            torch.testing.assert_close(rows[:, LAYERS.index(layer)], expected, rtol=1e-4, atol=1e-4)


def test_foreign_module_when_captured_and_steered_then_as_a_program_would(model: Path) -> None:
    ModelRegistry.register_model(NAME, Sine)
    with LLM(_named(model), **BASE) as llm:
        width = llm.engine.executor.facts.hidden_size
        assert llm.engine.executor.facts.activations["layers.0.mlp"] == width
        plain = llm.generate([PROMPTS[1]], GREEDY, capture=["layers.*.mlp"])[0]
        assert plain.outputs[0].captured["layers.1.mlp"].shape == (len(PROMPTS[1]) + 11, width)
        steering = {"layers.0.mlp": [0.5] * width}
        steered = llm.generate([PROMPTS[1]], GREEDY, capture=["layers.0.mlp"], steering=steering)[0]
        first = torch.as_tensor(plain.outputs[0].captured["layers.0.mlp"])[: len(PROMPTS[1])]
        moved = torch.as_tensor(steered.outputs[0].captured["layers.0.mlp"])[: len(PROMPTS[1])]
        assert torch.equal(moved, first + 0.5)


class Own(nn.Module):
    """As little as a class must have, with torch's own layers; keys and values go through the op."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.embed = nn.Embedding(config.vocab_size, width)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = nn.Linear(self.heads * self.head_dim, width)
        self.head = nn.Linear(width, config.vocab_size)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        x = self.embed(input_ids) + torch.sin(positions[:, None].float())
        widths = [self.heads * self.head_dim] + 2 * [self.kv_heads * self.head_dim]
        q, k, v = self.qkv(x).split(widths, dim=-1)
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return x + self.out(ops.attention(q, k, v, layer=0, **sizes))

    def compute_logits(self, hidden: Any) -> Any:
        return self.head(hidden)

    def load_weights(self, weights: Any) -> None:
        torch.manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    @torch.no_grad()
    def alone(self, prompt: list[int], count: int) -> list[int]:
        """Greedy tokens without a cache or an op."""
        tokens = list(prompt)
        for _ in range(count):
            n = len(tokens)
            x = self.embed(torch.tensor(tokens)) + torch.sin(torch.arange(n)[:, None].float())
            widths = [self.heads * self.head_dim] + 2 * [self.kv_heads * self.head_dim]
            q, k, v = (part.view(n, -1, self.head_dim).transpose(0, 1) for part in self.qkv(x).split(widths, dim=-1))
            attended = nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )
            y = x + self.out(attended[0].transpose(0, 1).reshape(n, -1))
            tokens.append(int(self.head(y[-1:]).argmax()))
        return tokens[len(prompt) :]


def test_module_of_torch_layers_that_fills_itself_when_served_then_its_own_greedy_tokens(model: Path) -> None:
    ModelRegistry.register_model(NAME, Own)
    with LLM(_named(model), **BASE) as llm:
        found = llm.generate(PROMPTS, GREEDY, return_hidden_states=True)
        own = llm.engine.executor.runner.executable.module  # type: ignore[attr-defined]
        for output, prompt in zip(found, PROMPTS, strict=True):
            assert list(output.outputs[0].token_ids) == own.alone(prompt, GREEDY.max_tokens)
        with pytest.raises(InvalidRequestError, match="no activation 'layers.0'"):
            llm.generate([[5]], GREEDY, return_hidden_states=True, hidden_states_layers=[1])


def _with(method: Any) -> type:
    """Llama whose hidden states go through `method`."""

    class Edited(LlamaForCausalLM):
        def forward(self, input_ids: Any, positions: Any) -> Any:
            return method(super().forward(input_ids, positions), self)

    return Edited


FOREIGN: dict[str, tuple[Any, str]] = {
    "a function": (lambda x, m: torch.relu(x), r"torch\.relu"),
    "a function of functional": (lambda x, m: nn.functional.layer_norm(x, (x.shape[-1],)), "layer_norm"),
    "a method": (lambda x, m: x.mean(-1, keepdim=True) + 0 * x, r"Tensor\.mean"),
    "an operator": (lambda x, m: x * 2, r"Tensor\.__mul__"),
    "an operator from the right": (lambda x, m: 1 + x, r"Tensor\.__radd__"),
    "a tensor on the left": (lambda x, m: torch.ones(1) * x, r"torch\.mul"),
    "an index": (lambda x, m: x[:, :] + 0, r"Tensor\.__getitem__"),
    "a comparison": (lambda x, m: torch.where(x == 0, x, x), r"Tensor\.__eq__"),
    "a list of tensors": (lambda x, m: torch.cat([x, x])[: x.shape[0]], r"torch\.cat"),
    "numpy": (lambda x, m: torch.from_numpy(np.tanh(np.asarray(x))), r"Tensor\.__array__"),
    "a function of numpy": (lambda x, m: torch.as_tensor(np.tanh(x)), r"numpy\.tanh"),
    "an op on another tensor": (
        lambda x, m: ops.add(x, torch.zeros(x.shape if isinstance(x, torch.Tensor) else (1, x.shape[1]))),
        "ops.add on a tensor that no op gave",
    ),
    "an op on constants alone": (lambda x, m: (ops.scale(torch.ones(1, 4), 2.0), x)[1], "do not come of the batch"),
    "a weight that is computed": (
        lambda x, m: ops.rms_norm(x, m.model.norm.weight + 1, 1e-6),
        "a weight that is computed in the forward",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_operation_when_foreign_then_the_log_names_it(model: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    method, said = FOREIGN[case]
    ModelRegistry.register_model(NAME, _with(method))
    with caplog.at_level(logging.WARNING), LLM(_named(model), **BASE) as llm:
        assert len(llm.generate([PROMPTS[1]], GREEDY)[0].outputs[0].token_ids) == GREEDY.max_tokens
    found = [record.getMessage() for record in caplog.records if "runs eagerly" in record.getMessage()]
    assert len(found) == 1
    assert re.search(said, found[0]), found


class _Bug(LlamaForCausalLM):
    def forward(self, input_ids: Any, positions: Any) -> Any:
        raise ZeroDivisionError("my own mistake")


class _Shape(LlamaForCausalLM):
    def forward(self, input_ids: Any, positions: Any) -> Any:
        return torch.cat([super().forward(input_ids, positions)] * 2, -1)


class _Type(Sine):
    def compute_logits(self, hidden: Any) -> Any:
        return super().compute_logits(hidden).double()


OWN_ERRORS: dict[str, tuple[type, type[Exception], str]] = {
    "its own": (_Bug, ZeroDivisionError, "my own mistake"),
    "another width": (
        _Shape,
        UnsupportedModelError,
        r"_Shape.forward gave float32 \[1, \d+\]; it must give float32 \[1, ",
    ),
    "another type": (_Type, UnsupportedModelError, r"_Type.compute_logits gave float64 \[1, "),
}


@pytest.mark.parametrize("case", OWN_ERRORS)
def test_error_of_the_users_own_code_when_loaded_then_shown_as_it_is(model: Path, case: str) -> None:
    model_class, kind, said = OWN_ERRORS[case]
    ModelRegistry.register_model(NAME, model_class)
    with pytest.raises(kind, match=said):
        LLM(_named(model), **BASE)


def test_foreign_module_when_quantized_or_compiled_then_refused_by_the_operation(model: Path, tmp_path: Path) -> None:
    ModelRegistry.register_model(NAME, Sine)
    with pytest.raises(ConfigError, match="quantization is 'int8'; .*torch.sin"):
        LLM(_named(model), quantization="int8", **BASE)
    with pytest.raises(ForeignOperationError, match=r"torch\.sin"):
        compile_model(EngineConfig(model=str(model)), tmp_path / "m.pld")
    assert not (tmp_path / "m.pld").exists()


class _Constants(LlamaForCausalLM):
    """Makes its constants in every forward: each is garbage at once, and the next may stand at its address."""

    def forward(self, input_ids: Any, positions: Any) -> Any:
        x = super().forward(input_ids, positions)
        for factor in (1.5, 0.25, 3.0, 0.5):
            x = ops.rms_norm(x, torch.full((x.shape[1],), factor), 1e-6)
            x = ops.rms_norm(x, np.full(x.shape[1], factor, np.float32), 1e-6)
        return x


def test_constants_when_made_in_the_forward_then_the_program_is_the_eager_module(model: Path) -> None:
    ModelRegistry.register_model(NAME, _Constants)
    rows = []
    for eager in (False, True):
        with LLM(_named(model), enforce_eager=eager, **BASE) as llm:
            output = llm.generate([PROMPTS[1]], GREEDY, return_hidden_states=True)[0].outputs[0]
            rows.append((list(output.token_ids), torch.as_tensor(output.hidden_states)))
    assert rows[0][0] == rows[1][0]
    assert torch.equal(rows[0][1], rows[1][1])

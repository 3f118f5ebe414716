"""The contract of a packed model: what it depends on, and what it does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, ops
from pellucid.contract.facts import ContractDigest
from pellucid.errors import WeightFormatError
from pellucid.models.llama import LlamaForCausalLM
from pellucid.models.registry import ModelRegistry
from pellucid.program.identity import contract_of, weight_digests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("identity") / "m", "llama")


def _contract(path: Path, **settings: Any) -> ContractDigest:
    with LLM(path, num_threads=1, num_blocks=8, **settings) as llm:
        return llm.engine.executor.facts.contract


def test_digest_of_each_weight_is_the_sha256_of_its_packed_bytes(model: Path) -> None:
    with LLM(model, num_threads=1, num_blocks=8, quantization="int8") as llm:
        file = llm.engine.executor.model.file  # type: ignore[attr-defined]
    digests = weight_digests(file)
    assert list(digests) == [weight[0] for weight in file.meta["weights"]]
    for name, *_, offset, nbytes in file.meta["weights"]:
        packed = file.sections["data"][offset : offset + nbytes].tobytes()
        assert digests[name] == hashlib.sha256(packed).digest(), name


def test_contract_when_only_place_threads_or_blocks_differ_then_equal(model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    with LLM(moved, num_threads=2, num_blocks=16, max_num_batched_tokens=7) as llm:
        assert llm.engine.executor.facts.contract == _contract(model)


CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dtype": ({"dtype": "bfloat16"}, {"weights", "formats", "kv_cache_dtype"}),
    "quantization": ({"quantization": "int8"}, {"weights", "formats"}),
    "cache": ({"kv_cache_dtype": "int8"}, {"kv_cache_dtype"}),
    "instruction set": ({"isa": "portable"}, {"isa"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_contract_when_a_setting_changes_the_bits_then_the_field_that_names_it_differs(
    model: Path, change: str
) -> None:
    settings, fields = CHANGES[change]
    base = _contract(model, dtype="float32", isa="avx2")
    other = _contract(model, **{"dtype": "float32", "isa": "avx2", **settings})
    differing = {name for name in base.__struct_fields__ if getattr(base, name) != getattr(other, name)}
    assert differing == fields
    assert base.digest != other.digest


def test_contract_when_one_weight_or_the_configuration_changes_then_weights_differ(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    changed = tmp_path / "changed"
    changed.mkdir()
    for file in model.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = dict(load_file(changed / "model.safetensors"))
    name = sorted(weights)[0]
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[0] += np.float32(0.5)
    save_file(weights, changed / "model.safetensors")
    base, other = _contract(model), _contract(changed)
    assert base.weights != other.weights
    assert msgspec.structs.replace(other, weights=base.weights) == base
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": config["rms_norm_eps"] * 2}))
    assert _contract(model).weights != base.weights
    (model / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, dict[str, Any]] = {
    "no digests": {"digests": None},
    "digests beyond the data": {"digests": 10**9},
    "a negative place": {"digests": -64},
    "no rotary tables": {"rotary": None},
    "a rotary table of nothing": {"rotary": ["nothing"]},
    "no weights": {"weights": None},
    "a weight without numbers": {"weights": [["a"]]},
    "an unknown format": {"weights": [["a", 1, 1, 99, 0, 0, 4]]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_contract_when_the_header_is_damaged_then_a_typed_error_names_the_file(model: Path, damage: str) -> None:
    with LLM(model, num_threads=1, num_blocks=8) as llm:
        file = llm.engine.executor.model.file  # type: ignore[attr-defined]
    broken = type(file)(file.path, {**file.meta, **DAMAGE[damage]}, file.sections, file.identity)
    with pytest.raises(WeightFormatError, match=file.path.name):
        contract_of(broken, "avx2", "float32")


def test_contract_when_another_class_computes_otherwise_on_the_same_weights_then_its_ops_differ(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(LlamaForCausalLM):
        def compute_logits(self, hidden_LD: Any) -> Any:
            return ops.scale(super().compute_logits(hidden_LD), 2.0)

    base = _contract(model)
    monkeypatch.setitem(ModelRegistry._registered, "llamaforcausallm", Doubled)
    other = _contract(model)
    assert base.ops != other.ops
    assert base.digest != other.digest
    assert msgspec.structs.replace(other, ops=base.ops) == base

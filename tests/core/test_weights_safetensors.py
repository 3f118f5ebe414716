"""Safetensors files that the reference package wrote, read back as views."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from pellucid.errors import ModelNotFoundError, UnsupportedModelError
from pellucid.weights.safetensors import index_shards, open_index, open_safetensors

NUMPY_TYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "bool"]


@pytest.mark.parametrize("kind", NUMPY_TYPES)
def test_array_of_each_type_when_written_by_the_reference_then_read_equal(tmp_path: Path, kind: str) -> None:
    values = (np.arange(24).reshape(2, 3, 4) % 2 if kind == "bool" else np.arange(24).reshape(2, 3, 4)).astype(kind)
    save_file({"x": values, "scalar": np.array(values[0, 0, 1]), "none": values[:0]}, tmp_path / "m.safetensors")
    tensors = open_safetensors(tmp_path / "m.safetensors")
    assert tensors["x"].shape == (2, 3, 4)
    assert (tensors["x"].rows, tensors["x"].cols) == (6, 4)
    np.testing.assert_array_equal(tensors["x"].to_numpy(), values)
    np.testing.assert_array_equal(tensors["x"].to_float32(), values.astype(np.float32))
    assert tensors["scalar"].shape == ()
    assert (tensors["scalar"].rows, tensors["scalar"].cols) == (1, 1)
    assert tensors["scalar"].to_float32() == np.float32(1)
    assert tensors["none"].to_float32().shape == (0, 3, 4)


def test_bfloat16_of_every_bit_pattern_when_widened_then_equal_to_torch(tmp_path: Path) -> None:
    values = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    save_torch_file({"x": values}, tmp_path / "m.safetensors")
    view = open_safetensors(tmp_path / "m.safetensors")["x"]
    assert view.dtype == "BF16"
    assert torch.equal(torch.from_numpy(view.to_float32()).view(torch.int32), values.float().view(torch.int32))
    with pytest.raises(UnsupportedModelError, match="'x' is stored as BF16"):
        view.to_numpy()


def test_file_when_opened_then_tensors_are_read_only_views_that_outlive_the_file_handle(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32)
    save_file({"x": values}, tmp_path / "m.safetensors", metadata={"format": "np"})
    view = open_safetensors(tmp_path / "m.safetensors")["x"]
    assert not view.data.flags.owndata
    assert not view.data.flags.writeable
    (tmp_path / "m.safetensors").unlink()
    np.testing.assert_array_equal(view.to_float32(), values)


def test_rows_when_selected_then_copied_in_the_given_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    save_file({"x": values}, tmp_path / "m.safetensors")
    view = open_safetensors(tmp_path / "m.safetensors")["x"].select_rows(np.array([3, 0, 3]))
    assert view.shape == (3, 3)
    np.testing.assert_array_equal(view.to_numpy(), values[[3, 0, 3]])
    with pytest.raises(IndexError):
        view.select_rows(np.array([3]))


def write_shards(folder: Path) -> Path:
    save_file({"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}, folder / "model-1.safetensors")
    save_file({"c": np.full(2, 2, np.float32)}, folder / "model-2.safetensors")
    shards = {"b": "model-1.safetensors", "c": "model-2.safetensors", "a": "model-1.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": shards}))
    return index


def test_index_when_opened_then_every_listed_tensor_comes_from_its_shard(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    tensors = open_index(index)
    assert {name: float(view.to_float32()[0]) for name, view in tensors.items()} == {"a": 0.0, "b": 1.0, "c": 2.0}
    assert index_shards(index) == (tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors")


def test_index_when_a_shard_is_absent_then_error_names_it(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"model-2\.safetensors"):
        open_index(index)

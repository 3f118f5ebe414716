"""GGUF files that the reference package wrote, read back; block layouts against its tables and dequantisers."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from utils.weight_files import ARRAY, STRING, gguf_array, gguf_file, gguf_pair, gguf_string, gguf_tensor

from pellucid.errors import NativeError, UnsupportedModelError
from pellucid.weights.gguf import GGML_TYPES, open_gguf
from pellucid.weights.tensor import CONVERTIBLE, DTYPES, TensorView

QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
WRITABLE = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def random_blocks(dtype: str, rows: int, cols: int) -> np.ndarray:
    """Rows of random but finite blocks, as bytes: the scales of a block are small halves, the rest is any bits."""
    generator = np.random.default_rng(7)
    kind = gguf.GGMLQuantizationType[dtype]
    if dtype in WRITABLE:
        return quantize(generator.standard_normal((rows, cols)).astype(np.float32), kind)
    length, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows * cols // length, size), dtype=np.uint8)
    halves = generator.uniform(-0.01, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if dtype == "Q6_K":
        blocks[:, -2:] = halves[:, :2]
    else:
        blocks[:, :4] = halves
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("code", GGML_TYPES)
def test_each_storage_type_when_compared_with_the_reference_then_block_sizes_agree(code: int) -> None:
    kind = gguf.GGMLQuantizationType(code)
    assert kind.name == GGML_TYPES[code]
    assert DTYPES[kind.name][:2] == gguf.GGML_QUANT_SIZES[kind]


def test_file_of_all_value_types_when_written_by_the_reference_then_read_equal(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65_535,
        "int16": -32_768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "naïve 🦙",
    }
    for kind, value in scalars.items():
        getattr(writer, f"add_{kind}")(f"k.{kind}", value)
    arrays = {"k.ints": [1, -2, 3], "k.floats": [0.25, -1.5], "k.bools": [True, False], "k.texts": ["", "é", "b" * 300]}
    for key, values in arrays.items():
        writer.add_array(key, values)
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    writer.add_tensor("w", weights)
    writer.add_tensor("h", weights[0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert (file.version, file.alignment, file.architecture) == (3, 32, "llama")
    assert {key: file.metadata[f"k.{key}"] for key in scalars} == scalars
    assert {key: file.metadata[key] for key in arrays} == arrays
    assert file.tensors["w"].shape == (2, 3, 4)
    np.testing.assert_array_equal(file.tensors["w"].to_numpy(), weights)
    np.testing.assert_array_equal(file.tensors["h"].to_float32(), weights[0])


def test_version_2_and_a_larger_alignment_when_read_then_tensors_are_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    pairs = [gguf_pair("general.alignment", 4, (64).to_bytes(4, "little"))]
    data = np.arange(4, dtype="<f4").tobytes() + b"\0" * 48 + np.arange(2, dtype="<f4").tobytes()
    tensors = [gguf_tensor("a", (4,)), gguf_tensor("b", (1, 2), offset=64)]
    path.write_bytes(gguf_file(pairs, tensors, data, version=2, alignment=64))
    file = open_gguf(path)
    assert (file.version, file.alignment) == (2, 64)
    np.testing.assert_array_equal(file.tensors["a"].to_float32(), np.arange(4))
    assert file.tensors["b"].shape == (2, 1)
    np.testing.assert_array_equal(file.tensors["b"].to_float32()[:, 0], np.arange(2))


def test_nested_arrays_when_read_then_lists_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    inner = gguf_array(STRING, 1, gguf_string("x")) + gguf_array(0, 2, b"\1\2")
    path.write_bytes(gguf_file([gguf_pair("k", ARRAY, gguf_array(ARRAY, 2, inner))]))
    assert open_gguf(path).metadata["k"] == [["x"], [1, 2]]


def test_vocabulary_of_50_000_with_merges_when_read_then_fast_enough(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    words = b"".join(gguf_string(f"token{index}") for index in range(50_000))
    merges = b"".join(gguf_string(f"to ken{index}") for index in range(50_000))
    kinds = np.ones(50_000, "<i4").tobytes()
    path.write_bytes(
        gguf_file(
            [
                gguf_pair("tokens", ARRAY, gguf_array(STRING, 50_000, words)),
                gguf_pair("merges", ARRAY, gguf_array(STRING, 50_000, merges)),
                gguf_pair("kinds", ARRAY, gguf_array(5, 50_000, kinds)),
            ]
        )
    )

    def seconds() -> float:
        begin = time.process_time()
        assert open_gguf(path).metadata["tokens"][-1] == "token49999"  # type: ignore[index]
        return time.process_time() - begin

    assert min(seconds() for _ in range(5)) < 0.15


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantised_tensor_when_opened_and_converted_then_equal_to_the_reference(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("pellucid.core.abi")
    kind = gguf.GGMLQuantizationType[dtype]
    raw = random_blocks(dtype, 6, 512)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    view = open_gguf(path).tensors["w"]
    assert (view.dtype, view.shape, view.row_bytes) == (dtype, (6, 512), raw.shape[1])
    np.testing.assert_array_equal(view.data.reshape(raw.shape), raw)
    order = np.array([5, 0, 2])
    np.testing.assert_array_equal(view.select_rows(order).data.reshape(3, -1), raw[order])
    try:
        values = view.to_float32()
    except NativeError as error:
        pytest.skip(f"the native core is not built: {error}")
    np.testing.assert_allclose(values, dequantize(raw, kind), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(view.select_rows(order).to_float32(), values[order])


def test_type_that_the_core_lacks_when_converted_then_error_lists_what_is_supported() -> None:
    view = TensorView("w", "Q2_K", (1, 256), np.zeros(84, np.uint8))
    with pytest.raises(UnsupportedModelError, match="'w' is stored as Q2_K; supported are F32, BF16, F16, Q8_0"):
        view.to_float32()
    assert set(QUANTISED) < set(CONVERTIBLE)

"""Hostile weight files: each row breaks one thing and must get its typed error, cheaply and without a crash."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from utils.weight_files import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    STRING,
    UINT32,
    gguf_array,
    gguf_file,
    gguf_pair,
    gguf_string,
    gguf_tensor,
    safetensors_file,
    tensor_entry,
)

from pellucid.errors import ConfigError, PellucidError, WeightFormatError
from pellucid.models.config import ModelConfig
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.gguf import open_gguf
from pellucid.weights.json_files import read_json
from pellucid.weights.safetensors import open_index, open_safetensors
from pellucid.weights.tensor import TensorView

MAX_EXTRA_BYTES = 64 * 2**20
HUGE = 2**63
Q4_1, Q4_K = 3, 12
SIXTEEN = b"\0" * 16


def nested(depth: int) -> bytes:
    """An array of an array of … of one empty array."""
    return gguf_array(ARRAY, 1) * depth + gguf_array(UINT32, 0)


def alignment(value: int) -> bytes:
    return gguf_pair("general.alignment", UINT32, struct.pack("<I", value))


# name -> (file, what the error must say)
GGUF: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "file size is 0"),
    "shorter than the magic": (b"GG", "size of magic is 4; only 2"),
    "ends after the magic": (b"GGUF", "size of version"),
    "ends within the counts": (gguf_file()[:20], "size of key count"),
    "wrong magic": (gguf_file(magic=b"GGML"), "magic is b'GGML'"),
    "safetensors under another name": (safetensors_file({}), "magic is"),
    "version 0": (gguf_file(version=0), "version is 0; supported are 2, 3"),
    "version 1": (gguf_file(version=1), "version is 1; supported are 2, 3"),
    "version 4": (gguf_file(version=4), "version is 4; supported are 2, 3"),
    "big endian": (gguf_file(version=3 << 24), "big-endian"),
    "2^63 tensors": (gguf_file(n_tensors=HUGE), f"tensor count is {HUGE}; the limit"),
    "2^64-1 keys": (gguf_file(n_pairs=2**64 - 1), "key count is 18446744073709551615; the limit"),
    "more tensors than bytes": (gguf_file(n_tensors=100_000), "tensor and key count"),
    "more keys than bytes": (gguf_file(n_pairs=60_000), "tensor and key count"),
    "one key too many": (gguf_file([ARCHITECTURE * 3], n_pairs=4), "must be unique"),
    "key length 2^63": (gguf_file([gguf_string(b"", HUGE) + b"\0" * 8]), f"length of key 0 is {HUGE}"),
    "key longer than the file": (gguf_file([gguf_string(b"abcdefgh", 60_000)]), "size of key 0 is 60000; only 8"),
    "empty key": (gguf_file([gguf_pair("", UINT32, b"\0" * 8)]), "key 0 is ''"),
    "duplicate key": (gguf_file([ARCHITECTURE, ARCHITECTURE]), "key 1 is 'general.architecture'; keys must be unique"),
    "key of bad UTF-8": (gguf_file([gguf_pair(b"a\xff", UINT32, b"\0" * 4)]), "byte 1 of key 0"),
    "unknown value type": (gguf_file([gguf_pair("k", 13, b"\0" * 8)]), "type of k is 13"),
    "value type 2^32-1": (gguf_file([gguf_pair("k", 2**32 - 1, b"\0" * 8)]), "type of k is 4294967295"),
    "truncated number": (gguf_file([gguf_pair("k", 12, b"\0" * 4)]), "size of k is 8; only 4"),
    "bool of 2": (gguf_file([gguf_pair("k", BOOL, b"\2")]), "k is 2; a bool must be 0 or 1"),
    "string length 2^64-1": (gguf_file([gguf_pair("k", STRING, gguf_string(b"ab", 2**64 - 1))]), "length of k is 1844"),
    "string past the end": (gguf_file([gguf_pair("k", STRING, gguf_string(b"ab", 3))]), "size of k is 3; only 2"),
    "string of bad UTF-8": (gguf_file([gguf_pair("k", STRING, gguf_string(b"\xc3\x28"))]), "byte 0 of k"),
    "string of surrogates": (gguf_file([gguf_pair("k", STRING, gguf_string(b"\xed\xa0\x80"))]), "byte 0 of k"),
    "array of an unknown type": (gguf_file([gguf_pair("k", ARRAY, gguf_array(77, 1))]), "element type of k is 77"),
    "array of 2^63 numbers": (gguf_file([gguf_pair("k", ARRAY, gguf_array(UINT32, HUGE))]), "element count of k"),
    "array whose bytes overflow": (gguf_file([gguf_pair("k", ARRAY, gguf_array(UINT32, 2**62))]), "element count of k"),
    "array past the end": (gguf_file([gguf_pair("k", ARRAY, gguf_array(0, 5, b"1234"))]), "only 4 header bytes"),
    "array of 2^40 strings": (gguf_file([gguf_pair("k", ARRAY, gguf_array(STRING, 2**40))]), "element count of k"),
    "array of absent strings": (
        gguf_file([gguf_pair("k", ARRAY, gguf_array(STRING, 2, gguf_string("abcdefgh")))]),
        r"length of k\[1\] is 'missing'",
    ),
    "array string past the end": (
        gguf_file([gguf_pair("k", ARRAY, gguf_array(STRING, 2, gguf_string("a") + gguf_string("b", 9)))]),
        r"length of k\[1\] is 9; only 1 bytes",
    ),
    "array string of bad UTF-8": (
        gguf_file([gguf_pair("k", ARRAY, gguf_array(STRING, 2, gguf_string("a") + gguf_string(b"\x80")))]),
        r"byte 0 of k\[1\]",
    ),
    "array of bools of 3": (gguf_file([gguf_pair("k", ARRAY, gguf_array(BOOL, 2, b"\1\3"))]), "k is 3; a bool"),
    "arrays nested too deep": (gguf_file([gguf_pair("k", ARRAY, nested(5))]), "nesting of k.* is 5; the limit is 4"),
    "arrays nested 100,000 deep": (gguf_file([gguf_pair("k", ARRAY, nested(100_000))]), "nesting of k"),
    "arrays of arrays without end": (
        gguf_file([gguf_pair("k", ARRAY, gguf_array(ARRAY, 2**61))]),
        "element count of k",
    ),
    "alignment 0": (gguf_file([alignment(0)]), "general.alignment is 0; it must be a uint32 power of two"),
    "alignment 48": (gguf_file([alignment(48)]), "general.alignment is 48"),
    "alignment 2^31": (gguf_file([alignment(2**31)]), "general.alignment is 2147483648"),
    "alignment a string": (
        gguf_file([gguf_pair("general.alignment", STRING, gguf_string("32"))]),
        "general.alignment is 'of value type 8'",
    ),
    "alignment negative": (
        gguf_file([gguf_pair("general.alignment", 5, struct.pack("<i", -32))]),
        "general.alignment is 'of value type 5'",
    ),
    "tensor info truncated": (gguf_file(tensors=[gguf_tensor("a")[:-4] + b""], n_tensors=1), "size of offset"),
    "tensor without a name": (gguf_file(tensors=[gguf_tensor("")], data=SIXTEEN), "name of tensor 0 is ''"),
    "tensor name of 300 bytes": (gguf_file(tensors=[gguf_tensor("a" * 300)], data=SIXTEEN), "the limit is 256"),
    "tensor name of bad UTF-8": (gguf_file(tensors=[gguf_tensor(b"\xfe")], data=SIXTEEN), "byte 0 of name of tensor 0"),
    "tensor twice": (
        gguf_file(tensors=[gguf_tensor("a"), gguf_tensor("a", offset=32)], data=b"\0" * 64),
        "occur twice",
    ),
    "tensor of 0 dimensions": (gguf_file(tensors=[gguf_tensor("a", ())], data=SIXTEEN), "dimension count .* is 0"),
    "tensor of 5 dimensions": (
        gguf_file(tensors=[gguf_tensor("a", (1,) * 5)], data=SIXTEEN),
        "dimension count .* is 5",
    ),
    "tensor of 2^32-1 dimensions": (
        gguf_file(tensors=[gguf_tensor("a", n_dims=2**32 - 1)], data=SIXTEEN),
        "dimension count .* is 4294967295",
    ),
    "dimension 0": (gguf_file(tensors=[gguf_tensor("a", (4, 0))], data=SIXTEEN), "every dimension must be at least 1"),
    "dimension 2^63": (gguf_file(tensors=[gguf_tensor("a", (HUGE,))], data=SIXTEEN), "more than .* elements"),
    "product of dimensions is 2^64": (
        gguf_file(tensors=[gguf_tensor("a", (2**32, 2**32))], data=SIXTEEN),
        "more than .* elements",
    ),
    "product wraps to 0 with -1s": (
        gguf_file(tensors=[gguf_tensor("a", (2**64 - 1, 2**64 - 1, 2**16, 2**48))], data=SIXTEEN),
        "more than .* elements",
    ),
    "unknown tensor type": (gguf_file(tensors=[gguf_tensor("a", kind=99)], data=SIXTEEN), "type of tensor 'a' is 99"),
    "removed tensor type": (gguf_file(tensors=[gguf_tensor("a", kind=4)], data=SIXTEEN), "type of tensor 'a' is 4"),
    "row is no whole block": (
        gguf_file(tensors=[gguf_tensor("a", (33,), Q4_1)], data=b"\0" * 64),
        "last dimension is 33; Q4_1 needs a multiple of 32",
    ),
    "row is no whole super-block": (
        gguf_file(tensors=[gguf_tensor("a", (128, 2), Q4_K)], data=b"\0" * 256),
        "Q4_K needs a multiple of 256",
    ),
    "offset misaligned": (
        gguf_file(tensors=[gguf_tensor("a", offset=8)], data=b"\0" * 64),
        "multiple of the alignment 32",
    ),
    "offset past the end": (
        gguf_file(tensors=[gguf_tensor("a", offset=64)], data=SIXTEEN),
        "data section has 16 bytes",
    ),
    "offset + size wraps": (
        gguf_file(tensors=[gguf_tensor("a", offset=2**64 - 32)], data=SIXTEEN),
        "end of tensor 'a' is 18446744073709551600",
    ),
    "data cut off": (gguf_file(tensors=[gguf_tensor("a")], data=b"\0" * 15), "end of tensor 'a' is 16"),
    "no data at all": (gguf_file(tensors=[gguf_tensor("a")]), "data section has 0 bytes"),
    "tensors overlap": (
        gguf_file(tensors=[gguf_tensor("a", (16,)), gguf_tensor("b", offset=32)], data=b"\0" * 64),
        "begin of tensor 'b' is 32; it overlaps 'a', which ends at 64",
    ),
    "tensors at one place": (
        gguf_file(tensors=[gguf_tensor("a"), gguf_tensor("b")], data=SIXTEEN),
        "it overlaps 'a'",
    ),
}

SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "file size is 0"),
    "seven bytes": (b"\0" * 7, "file size is 7"),
    "header length 2^64-1": (b"\xff" * 8, "header length is 18446744073709551615; the limit"),
    "header length 2^63": (struct.pack("<Q", HUGE) + b"{}", f"header length is {HUGE}"),
    "header longer than the file": (safetensors_file({}, length=100), "header length is 100; only 2 bytes follow"),
    "header of no bytes": (safetensors_file(b""), "first header byte is b''"),
    "header not JSON": (safetensors_file(b"{nonsense}"), "JSON is"),
    "header a list": (safetensors_file(b"[]"), "first header byte is b'\\['"),
    "header behind a space": (safetensors_file(b" {}"), "first header byte"),
    "header cut off": (safetensors_file(b'{"a":{"dty'), "JSON is"),
    "header with a tail": (safetensors_file(b"{}{}"), "Extra data"),
    "header of bad UTF-8": (safetensors_file(b'{"\xff":1}'), "JSON byte is 2; it must be valid UTF-8"),
    "header nested 200,000 deep": (safetensors_file(b'{"a":' + b"[" * 200_000), "JSON nesting"),
    "objects nested 100,000 deep": (safetensors_file(b'{"a":' * 100_000), "JSON nesting"),
    "bomb of empty lists": (safetensors_file(b'{"a":[' + b"[]," * 250_000 + b"[]]}"), "entry of tensor 'a'"),
    "integer of a million digits": (safetensors_file(b'{"a":' + b"9" * 1_000_000 + b"}"), "the limit is 20 digits"),
    "NaN": (safetensors_file(b'{"a":NaN}'), "number is 'NaN'"),
    "name twice": (
        safetensors_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"\0"),
        "JSON key is 'a'; it must not occur twice",
    ),
    "metadata no strings": (safetensors_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (safetensors_file({"__metadata__": []}), "__metadata__"),
    "entry a number": (safetensors_file({"a": 1}), "entry of tensor 'a' is 1"),
    "entry null": (safetensors_file({"a": None}), "entry of tensor 'a' is None"),
    "entry lacks dtype": (safetensors_file({"a": {"shape": [], "data_offsets": [0, 4]}}, b"\0" * 4), "exactly"),
    "entry has more": (safetensors_file({"a": {**tensor_entry([1], 0, 4), "x": 1}}, b"\0" * 4), "exactly"),
    "unknown dtype": (safetensors_file({"a": tensor_entry([1], 0, 4, "F31")}, b"\0" * 4), "dtype of tensor 'a'"),
    "dtype of another format": (safetensors_file({"a": tensor_entry([32], 0, 20, "Q4_1")}, b"\0" * 20), "dtype of"),
    "dtype a list": (safetensors_file({"a": tensor_entry([1], 0, 4, ["F32"])}, b"\0" * 4), "dtype of tensor 'a'"),
    "shape negative": (safetensors_file({"a": tensor_entry([-1], 0, 4)}, b"\0" * 4), "shape of tensor 'a'"),
    "shape fractional": (safetensors_file({"a": tensor_entry([1.0], 0, 4)}, b"\0" * 4), "shape of tensor 'a'"),
    "shape of booleans": (safetensors_file({"a": tensor_entry([True], 0, 4)}, b"\0" * 4), "shape of tensor 'a'"),
    "shape of 2^64": (safetensors_file({"a": tensor_entry([2**64 - 1], 0, 4)}, b"\0" * 4), "shape of tensor 'a'"),
    "shape product overflows": (safetensors_file({"a": tensor_entry([2**32, 2**32], 0, 4)}, b"\0" * 4), "elements"),
    "shape overflows beside a 0": (safetensors_file({"a": tensor_entry([0, 2**62], 0, 0)}), "elements"),
    "shape of 9 dimensions": (safetensors_file({"a": tensor_entry([1] * 9, 0, 4)}, b"\0" * 4), "9 dimensions"),
    "shape a number": (
        safetensors_file({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"\0" * 4),
        "shape of tensor 'a' is 1",
    ),
    "offsets of one": (
        safetensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"\0" * 4),
        "data_offsets of tensor 'a'",
    ),
    "offsets negative": (safetensors_file({"a": tensor_entry([1], -4, 0)}, b"\0" * 4), "data_offsets of tensor 'a'"),
    "offsets descend": (safetensors_file({"a": tensor_entry([1], 4, 0)}, b"\0" * 4), "they must ascend"),
    "offsets past the end": (safetensors_file({"a": tensor_entry([2], 0, 8)}, b"\0" * 4), "within the 4 bytes"),
    "offsets strings": (safetensors_file({"a": tensor_entry([1], "0", "4")}, b"\0" * 4), "two integers"),
    "size contradicts shape": (safetensors_file({"a": tensor_entry([2], 0, 4)}, b"\0" * 4), "byte count .* is 4"),
    "tensors overlap": (
        safetensors_file({"a": tensor_entry([2], 0, 8), "b": tensor_entry([2], 4, 12)}, b"\0" * 12),
        "begin of tensor 'b' is 4; it overlaps 'a', which ends at 8",
    ),
    "one tensor in two names": (
        safetensors_file({"a": tensor_entry([1], 0, 4), "b": tensor_entry([1], 0, 4)}, b"\0" * 4),
        "overlaps",
    ),
    "gap between tensors": (
        safetensors_file({"a": tensor_entry([1], 0, 4), "b": tensor_entry([1], 8, 12)}, b"\0" * 12),
        "there is a gap after 4",
    ),
    "bytes before the first": (safetensors_file({"a": tensor_entry([1], 4, 8)}, b"\0" * 8), "gap after 0"),
    "bytes after the last": (safetensors_file({"a": tensor_entry([1], 0, 4)}, b"\0" * 9), "data section has 9 bytes"),
}

INDEXES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"weight_map", "JSON is"),
    "a list": (b"[]", "top-level value"),
    "no weight_map": (b"{}", "weight_map is None"),
    "weight_map empty": (b'{"weight_map":{}}', "non-empty"),
    "weight_map a list": (b'{"weight_map":["a"]}', "weight_map is"),
    "names itself": (b'{"weight_map":{"a":"model.safetensors.index.json"}}', "an index must not name itself"),
    "names another index": (b'{"weight_map":{"a":"b.safetensors.index.json"}}', "weight files only"),
    "climbs out": (b'{"weight_map":{"a":"../secret.safetensors"}}', "plain file name"),
    "is absolute": (b'{"weight_map":{"a":"/etc/secret.safetensors"}}', "plain file name"),
    "backslashes": (b'{"weight_map":{"a":"..\\\\secret.safetensors"}}', "plain file name"),
    "zero byte": (b'{"weight_map":{"a":"x\\u0000.safetensors"}}', "plain file name"),
    "hidden file": (b'{"weight_map":{"a":".safetensors"}}', "plain file name"),
    "shard a number": (b'{"weight_map":{"a":1}}', "it must be a file name"),
    "shard a pickle": (b'{"weight_map":{"a":"pytorch_model.bin"}}', "must end in .safetensors"),
    "tensor twice": (b'{"weight_map":{"a":"s.safetensors","a":"s.safetensors"}}', "must not occur twice"),
    "tensor not in its shard": (b'{"weight_map":{"zz":"s.safetensors"}}', "that file has no such tensor"),
    "too many shards": (
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(5_000)}}).encode(),
        "shard count is 5000; the limit is 4096",
    ),
}


def refused(path: Path, content: bytes, reader: Callable[[Path], object]) -> pytest.ExceptionInfo[WeightFormatError]:
    """Reads a hostile file and returns its error; fails when reading took much memory."""
    path.write_bytes(content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(WeightFormatError) as caught:
            reader(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_EXTRA_BYTES
    return caught


@pytest.mark.parametrize(("content", "words"), GGUF.values(), ids=GGUF)
def test_hostile_gguf_when_opened_then_typed_error_names_file_field_and_limit(
    tmp_path: Path, content: bytes, words: str
) -> None:
    error = refused(tmp_path / "hostile.gguf", content, open_gguf)
    error.match(f"^hostile.gguf: .*{words}")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(("content", "words"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_hostile_safetensors_when_opened_then_typed_error_names_file_field_and_limit(
    tmp_path: Path, content: bytes, words: str
) -> None:
    error = refused(tmp_path / "model.safetensors", content, open_safetensors)
    error.match(f"^model.safetensors: .*{words}")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(("content", "words"), INDEXES.values(), ids=INDEXES)
def test_hostile_index_when_opened_then_typed_error_names_file_field_and_limit(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "s.safetensors").write_bytes(safetensors_file({"a": tensor_entry([1], 0, 4)}, b"\0" * 4))
    error = refused(tmp_path / "model.safetensors.index.json", content, open_index)
    error.match(f"^model.safetensors.index.json: .*{words}")


def test_json_of_sixteen_mebibytes_when_read_then_refused_by_its_size(tmp_path: Path) -> None:
    error = refused(tmp_path / "config.json", b" " * (16 * 2**20 + 1), read_json)
    error.match("config.json: file size is 16777217; the limit is 16777216")


def test_array_elements_beyond_the_file_limit_when_opened_then_refused(tmp_path: Path) -> None:
    half = 2**22 + 1
    pairs = [gguf_pair(key, ARRAY, gguf_array(0, half, b"\0" * half)) for key in ("a", "b")]
    path = tmp_path / "many.gguf"
    path.write_bytes(gguf_file(pairs))
    with pytest.raises(WeightFormatError, match=f"element count of b is {half}; a file may have 8388608"):
        open_gguf(path)


def pair(key: str, value: int) -> bytes:
    return gguf_pair(f"llama.{key}", UINT32, struct.pack("<I", value))


LLAMA_PAIRS = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 8,
    "feed_forward_length": 8,
    "attention.head_count": 2,
    "vocab_size": 4,
}
EPS = gguf_pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))


def llama_file(changes: dict[str, int | None], tensors: list[bytes] | None = None) -> bytes:
    pairs = [pair(key, value) for key, value in {**LLAMA_PAIRS, **changes}.items() if value is not None]
    return gguf_file([ARCHITECTURE, EPS, *pairs], tensors or [], b"\0" * 256 if tensors else b"")


GGUF_MODELS: dict[str, tuple[bytes, str]] = {
    "no architecture": (gguf_file([]), "general.architecture is None"),
    "architecture a number": (gguf_file([gguf_pair("general.architecture", UINT32, b"\0" * 4)]), "is 0; it must be"),
    "architecture unknown": (
        gguf_file([gguf_pair("general.architecture", STRING, gguf_string("mamba"))]),
        "architecture 'mamba'; supported are llama",
    ),
    "no layers": (llama_file({"block_count": 0}), "llama.block_count is 0"),
    "2^32-1 layers": (llama_file({"block_count": 2**32 - 1}), "llama.block_count is 4294967295"),
    "width absent": (llama_file({"embedding_length": None}), "llama.embedding_length is None; the key is required"),
    "no heads": (llama_file({"attention.head_count": 0}), "head_count is 0"),
    "partial rotary": (llama_file({"rope.dimension_count": 2}), "rope.dimension_count is 2; it must equal 4"),
    "experts": (llama_file({"expert_count": 8}), "8 experts"),
    "split": (gguf_file([ARCHITECTURE, gguf_pair("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts"),
    "tensor unknown": (llama_file({}, [gguf_tensor("blk.0.evil.weight")]), "tensor 'blk.0.evil.weight' is not known"),
    "layer in another spelling": (
        llama_file({}, [gguf_tensor("blk.0.attn_norm.weight"), gguf_tensor("blk.00.attn_norm.weight", offset=32)]),
        "under another spelling",
    ),
    "q rows do not fit the heads": (
        llama_file({}, [gguf_tensor("blk.0.attn_q.weight", (2, 3))]),
        "multiple of 2 x 2 heads",
    ),
    "rope factors too few": (llama_file({}, [gguf_tensor("rope_freqs.weight", (1,))]), "2 finite positive values"),
    "rope factors zero": (llama_file({}, [gguf_tensor("rope_freqs.weight", (2,))]), "2 finite positive values"),
    "end-of-sequence id a string": (
        gguf_file(
            [
                ARCHITECTURE,
                EPS,
                *(pair(*item) for item in LLAMA_PAIRS.items()),
                gguf_pair("tokenizer.ggml.eos_token_id", STRING, gguf_string("2")),
            ]
        ),
        "eos_token_id is '2'",
    ),
}


@pytest.mark.parametrize(("content", "words"), GGUF_MODELS.values(), ids=GGUF_MODELS)
def test_hostile_gguf_model_when_opened_as_checkpoint_then_typed_error(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(PellucidError, match=f"^hostile.gguf: .*{words}"):
        open_checkpoint(path)


GOOD_GGUF = gguf_file(
    [
        ARCHITECTURE,
        EPS,
        *(pair(*item) for item in LLAMA_PAIRS.items()),
        gguf_pair("tokenizer.ggml.tokens", ARRAY, gguf_array(STRING, 4, b"".join(map(gguf_string, "abcd")))),
        gguf_pair("nest", ARRAY, gguf_array(ARRAY, 1, gguf_array(BOOL, 2, b"\0\1"))),
    ],
    [gguf_tensor("token_embd.weight", (8, 4)), gguf_tensor("output_norm.weight", (8,), offset=128)],
    b"\0" * 160,
)
GOOD_SAFETENSORS = safetensors_file(
    {"a": tensor_entry([2, 2], 0, 16), "b": tensor_entry([3], 16, 19, "U8"), "__metadata__": {"format": "pt"}},
    b"\0" * 19,
)


def test_the_good_files_that_are_mutated_when_opened_then_they_open(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GOOD_GGUF)
    (tmp_path / "a.safetensors").write_bytes(GOOD_SAFETENSORS)
    assert open_checkpoint(tmp_path / "a.gguf").config["vocab_size"] == 4
    assert list(open_safetensors(tmp_path / "a.safetensors")) == ["a", "b"]


@pytest.mark.parametrize(
    ("good", "name", "reader"),
    [(GOOD_GGUF, "f.gguf", open_checkpoint), (GOOD_SAFETENSORS, "f.safetensors", open_safetensors)],
    ids=["gguf", "safetensors"],
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    length=st.integers(0, 10_000),
)
def test_a_good_file_when_bytes_change_or_go_then_it_opens_or_gets_a_typed_error(
    tmp_path: Path, good: bytes, name: str, reader: Callable[[Path], object], edits: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(good)
    for position, value in edits:
        content[position % len(content)] = value
    path = tmp_path / name
    path.write_bytes(content[: length % (2 * len(content)) or 1])
    with contextlib.suppress(PellucidError):
        reader(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", (2,), 4), ("Q4_1", (31,), 20), ("F99", (1,), 4), ("F32", (-1,), 4), ("F32", (2**40, 2**40), 4)],
)
def test_a_view_that_contradicts_its_bytes_when_made_then_typed_error(
    dtype: str, shape: tuple[int, ...], size: int
) -> None:
    with pytest.raises(WeightFormatError, match="tensor 'x'"):
        TensorView("x", dtype, shape, np.zeros(size, np.uint8))


def test_a_config_of_huge_numbers_when_read_then_config_error() -> None:
    with pytest.raises(ConfigError, match="hidden_size is 1"):
        ModelConfig.from_dict({"model_type": "llama", "hidden_size": 10**18})

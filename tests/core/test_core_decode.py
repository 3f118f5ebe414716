"""The C library: model files, decoding by sequence on both layouts, sequence operations, and the C example."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from utils.batch_builders import BlockBatchState, build_decode_batch
from utils.children import finished
from utils.core_model import CoreModel
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.core import abi
from pellucid.errors import ConfigError, NativeError
from pellucid.files import remove_unused

OK, NO_SPACE, ABORTED, INVALID_BATCH, NOT_SUPPORTED, INVALID_SEQ, INVALID_POS, EMPTY = 0, 1, 2, -1, -4, -6, -7, -8
LAYOUTS = ("slot", "block")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")
    target = tmp_path_factory.mktemp("compiled") / "tiny.pld"
    compile_model(EngineConfig(model=str(checkpoint), dtype="bfloat16"), target)
    return target


@pytest.fixture
def slot(compiled: Path) -> Iterator[CoreModel]:
    model = CoreModel(compiled, layout="slot")
    yield model
    model.close()


def logits_of(model: CoreModel, *, layout: str, ids: list[int], chunk: int = 64) -> list[np.ndarray]:
    """Every row's logits of one sequence, `chunk` tokens a call."""
    state, rows = BlockBatchState(16), []
    for begin in range(0, len(ids), chunk):
        part = ids[begin : begin + chunk]
        batch = build_decode_batch(part, logits_mask=[True] * len(part), layout=layout, block_state=state)
        assert model.decode(batch) == OK
        found = [model.logits(i) for i in range(len(part))]
        assert all(row is not None for row in found)
        rows += [row for row in found if row is not None]
    return rows


def alone(compiled: Path, ids: list[int]) -> list[np.ndarray]:
    """Every row's logits in a fresh SLOT cache."""
    return logits_of(CoreModel(compiled, layout="slot"), layout="slot", ids=ids)


def test_sequences_when_copied_removed_shifted_and_kept_then_positions_are_as_written(slot: CoreModel) -> None:
    assert slot.decode(build_decode_batch([1, 2, 3], seq_ids=[10, 10, 20])) == OK
    assert (slot.pos_max(10), slot.pos_max(20), slot.pos_max(30)) == (1, 0, -1)
    free = slot.free_cells
    assert slot.seq("cp", 30, 10, 0, 2) == OK
    assert slot.free_cells == free  # shared, not copied
    assert slot.pos_max(30) == 1
    assert slot.seq("rm", 10, 1, 2) == OK
    assert slot.pos_max(10) == 0
    assert slot.pos_max(30) == 1
    assert slot.seq("add", 20, 0, 1, 1) == OK
    assert slot.pos_max(20) == 1
    assert slot.seq("keep", 20) == OK
    assert [slot.pos_max(seq) for seq in (10, 20, 30)] == [-1, 1, -1]
    assert slot.free_cells == 64 - 1


def test_copy_when_removed_then_its_source_goes_on_with_the_same_bits(slot: CoreModel, compiled: Path) -> None:
    expected = alone(compiled, ids=[5, 6, 7, 8])
    assert slot.decode(build_decode_batch([5, 6, 7])) == OK
    assert slot.seq("cp", 1, 0, -1, -1) == OK
    assert slot.seq("rm", 1, 0, -1) == OK
    assert slot.decode(build_decode_batch([8])) == OK
    found = slot.logits(0)
    assert found is not None
    np.testing.assert_array_equal(found, expected[3])


@pytest.mark.parametrize(
    ("verb", "arguments", "status"),
    [
        ("cp", (1, 99, 0, 1), INVALID_SEQ),
        ("cp", (-1, 0, 0, 1), INVALID_SEQ),
        ("rm", (99, 0, 1), INVALID_SEQ),
        ("rm", (0, 2, 1), INVALID_POS),
        ("rm", (0, 1, 1), EMPTY),
        ("add", (0, 0, 1, 1), INVALID_POS),  # meets position 1
        ("add", (0, 0, -1, -1), INVALID_POS),  # below 0
        ("add", (99, 0, 1, 1), INVALID_SEQ),
        ("keep", (99,), INVALID_SEQ),
    ],
)
def test_sequence_operation_that_is_wrong_when_asked_then_status_and_nothing_changes(
    slot: CoreModel, verb: str, arguments: tuple[int, ...], status: int
) -> None:
    assert slot.decode(build_decode_batch([1, 2, 3])) == OK
    free = slot.free_cells
    assert slot.seq(verb, *arguments) == status
    assert (slot.pos_max(0), slot.free_cells) == (2, free)


def test_sequence_operations_when_layout_is_block_then_not_supported(compiled: Path) -> None:
    model = CoreModel(compiled, layout="block")
    assert model.seq("cp", 1, 0, 0, 1) == NOT_SUPPORTED
    assert model.seq("rm", 0, 0, 1) == NOT_SUPPORTED
    assert model.seq("add", 0, 0, 1, 1) == NOT_SUPPORTED
    assert model.seq("keep", 0) == NOT_SUPPORTED
    assert abi.library().pld_request_free(model.kv, 5) == INVALID_SEQ


def test_request_when_freed_then_its_cells_are_and_unknown_ones_are_told(slot: CoreModel) -> None:
    assert slot.decode(build_decode_batch([1, 2, 3])) == OK
    assert abi.library().pld_request_free(slot.kv, 0) == OK
    assert slot.free_cells == 64
    assert abi.library().pld_request_free(slot.kv, 0) == INVALID_SEQ


def test_layouts_chunks_and_neighbours_when_decoded_then_the_same_bits(compiled: Path) -> None:
    ids = list(range(3, 40))
    whole = alone(compiled, ids=ids)
    for layout in LAYOUTS:
        for chunk in (1, 5, 64):
            found = logits_of(CoreModel(compiled, layout=layout), layout=layout, ids=ids, chunk=chunk)
            for row, expected in zip(found, whole, strict=True):
                np.testing.assert_array_equal(row, expected)
    other = CoreModel(compiled, layout="slot")  # interleaved with a neighbour, cells in disorder
    rows = []
    for i, token in enumerate(ids[:20]):
        batch = build_decode_batch([7 + i, token], seq_ids=[3, 9], logits_mask=[False, True])
        assert other.decode(batch) == OK
        rows.append(other.logits(1))
        assert other.logits(0) is None
    for row, expected in zip(rows, whole, strict=False):
        np.testing.assert_array_equal(row, expected)


def test_copied_prefix_when_continued_then_bits_of_a_sequence_of_its_own(slot: CoreModel, compiled: Path) -> None:
    expected = alone(compiled, ids=[4, 5, 6, 9, 9])
    assert slot.decode(build_decode_batch([4, 5, 6, 7, 8])) == OK
    assert slot.seq("cp", 2, 0, 0, 3) == OK
    batch = build_decode_batch([9, 9], seq_ids=[2, 2], logits_mask=[True, True])
    assert slot.decode(batch) == OK
    for i in range(2):
        np.testing.assert_array_equal(slot.logits(i), expected[3 + i])


def test_keys_when_shifted_then_close_to_those_of_tokens_decoded_there(slot: CoreModel, compiled: Path) -> None:
    assert slot.decode(build_decode_batch([4, 5, 6])) == OK
    assert slot.seq("cp", 1, 0, -1, -1) == OK
    assert slot.seq("add", 0, 0, -1, 5) == OK  # shared cells are copied first
    assert (slot.pos_max(0), slot.pos_max(1)) == (7, 2)
    assert slot.decode(build_decode_batch([9], seq_ids=[0])) == OK
    shifted = slot.logits(0)
    there = CoreModel(compiled, layout="slot")
    assert there.decode(build_decode_batch([4, 5, 6, 9], pos_ids=[5, 6, 7, 8])) == OK
    expected = there.logits(3)
    assert shifted is not None
    assert expected is not None
    assert np.abs(shifted - expected).max() <= 0.03 * np.abs(expected).max()  # keys are rounded twice
    assert slot.decode(build_decode_batch([9], seq_ids=[1])) == OK  # the copy is as it was
    np.testing.assert_array_equal(slot.logits(0), alone(compiled, ids=[4, 5, 6, 9])[3])


def test_middle_when_removed_then_later_tokens_see_what_is_left(slot: CoreModel, compiled: Path) -> None:
    assert slot.decode(build_decode_batch([4, 5, 6])) == OK
    assert slot.seq("rm", 0, 1, 2) == OK
    assert slot.pos_max(0) == 2
    assert slot.decode(build_decode_batch([9])) == OK
    assert slot.pos_max(0) == 3
    assert slot.free_cells == 64 - 3
    whole = alone(compiled, ids=[4, 5, 6, 9])[3]
    assert not np.array_equal(slot.logits(0), whole)


def test_logits_mask_when_absent_or_zero_then_the_last_row_or_none(slot: CoreModel) -> None:
    assert slot.decode(build_decode_batch([1, 2, 3])) == OK
    assert [slot.logits(i) is not None for i in range(-1, 4)] == [False, False, False, True, False]
    assert slot.decode(build_decode_batch([1, 2], logits_mask=[False, False])) == OK
    assert [slot.logits(i) for i in range(2)] == [None, None]


def test_full_cache_when_decoded_into_then_no_space_and_nothing_changes(compiled: Path) -> None:
    model = CoreModel(compiled, layout="slot", cells=8)
    assert model.decode(build_decode_batch([1, 2, 3, 4, 5])) == OK
    assert model.decode(build_decode_batch([6, 7, 8, 9])) == NO_SPACE
    assert (model.pos_max(0), model.free_cells) == (4, 3)
    assert model.decode(build_decode_batch([6, 7, 8])) == OK
    np.testing.assert_array_equal(model.logits(2), alone(compiled, [1, 2, 3, 4, 5, 6, 7, 8])[7])


def test_abort_when_set_then_nothing_changes(slot: CoreModel) -> None:
    batch, flag = build_decode_batch([1, 2]), ctypes.c_int32(1)
    batch.struct.abort = ctypes.addressof(flag)
    assert slot.decode(batch) == ABORTED
    assert (slot.pos_max(0), slot.free_cells) == (-1, 64)
    flag.value = 0
    assert slot.decode(batch) == OK


# The field, its value, and the token that the error blames.
BAD_BATCHES = {
    "no tokens": ("n_tokens", 0, None),
    "too many tokens": ("n_tokens", 65, None),
    "token below 0": ("tokens", [-1, 2, 3], 0),
    "token out of the vocabulary": ("tokens", [1, 300, 3], 1),
    "negative sequence": ("seq_ids", [0, -2, 0], 1),
    "negative position": ("positions", [-5, 1, 2], 0),
    "positions that do not ascend": ("positions", [5, 5, 6], 1),
    "position that is taken": ("positions", [1, 2, 3], 0),
    "struct of another header": ("struct_size", 4, None),
}
TOKEN = 1


def blamed() -> tuple[int, int]:
    """What the last error is about, and its index."""
    index = ctypes.c_int64(-9)
    return abi.library().pld_last_error_item(ctypes.byref(index)), index.value


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_batch_that_is_wrong_when_decoded_then_refused_and_state_is_as_before(slot: CoreModel, case: str) -> None:
    assert slot.decode(build_decode_batch([9, 9])) == OK
    name, value, token = BAD_BATCHES[case]
    batch = build_decode_batch([1, 2, 3])
    if isinstance(value, list):
        batch.arrays[name] = np.array(value, np.int32)
        setattr(batch.struct, name, batch.arrays[name].ctypes.data)
    else:
        setattr(batch.struct, name, value)
    assert slot.decode(batch) == INVALID_BATCH
    assert blamed() == ((0, -1) if token is None else (TOKEN, token))
    assert (slot.pos_max(0), slot.free_cells) == (1, 62)
    assert abi.library().pld_last_error()
    assert slot.decode(build_decode_batch([3])) == OK
    assert blamed() == (0, -1)


# Two sequences that take turns: the core orders tokens by sequence, and blames them in the order of the caller.
TURNS = {
    "cell beside its block": ("slot_mapping", 2, 11, 2),
    "block beyond the cache": ("block_tables", slice(1, 4, 2), 99, 3),
    "length of another position": ("context_lens", 1, 7, 1),
    "table of an earlier token": ("block_tables", 0, 5, 0),
}


@pytest.mark.parametrize("case", TURNS)
def test_token_of_interleaved_sequences_when_wrong_then_it_is_blamed_by_its_place_in_the_batch(
    compiled: Path, case: str
) -> None:
    model = CoreModel(compiled, layout="block")
    name, index, value, token = TURNS[case]
    batch = build_decode_batch(
        [1, 2, 3, 4],
        seq_ids=[8, 4, 8, 4],
        pos_ids=[0, 0, 1, 1],
        logits_mask=[True] * 4,
        layout="block",
        block_state=BlockBatchState(16),
    )
    array: np.ndarray = batch.arrays[name]
    before = array.copy()
    array[index] = value
    assert model.decode(batch) == INVALID_BATCH
    assert blamed() == (TOKEN, token)
    array[:] = before
    assert model.decode(batch) == OK


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_batches_when_decoded_then_statuses_alone_and_a_good_one_still_gives_its_bits(
    compiled: Path, layout: str
) -> None:
    expected = logits_of(CoreModel(compiled, layout=layout), layout=layout, ids=[3, 4, 5])
    model, draw = CoreModel(compiled, layout=layout), random.Random(layout)
    wild = [-(2**31), -7, -1, 0, 1, 2, 3, 5, 15, 16, 17, 63, 64, 299, 300, 2**31 - 1]
    statuses = set()
    for _ in range(4000):
        count = draw.randint(1, 6)
        values = {
            name: np.array([draw.choice(wild) for _ in range(count * width)], kind)
            for name, kind, width in (
                ("tokens", np.int32, 1),
                ("seq_ids", np.int32, 1),
                ("positions", np.int32, 1),
                ("slot_mapping", np.int64, 1),
                ("block_tables", np.int32, 3),
                ("context_lens", np.int32, 1),
            )
        }
        if draw.random() < 0.7:  # so that some come further
            values["tokens"][:], values["seq_ids"][:] = draw.randrange(300), draw.randrange(3)
            values["positions"] = np.arange(count, dtype=np.int32) + draw.choice([0, 1, 9])
        batch = build_decode_batch([1] * count)
        for name, array in values.items():
            if name != "positions" or draw.random() < 0.5:
                batch.arrays[name] = array
                setattr(batch.struct, name, array.ctypes.data)
        batch.struct.block_table_width = draw.choice([3, 3, 3, 0, -1])
        status = model.decode(batch)
        statuses.add(status)
        item, token = blamed()
        assert (item, token) == (0, -1) or (status == INVALID_BATCH and item == TOKEN and 0 <= token < count)
        if layout == "slot" and draw.random() < 0.2:
            near, far = [draw.randrange(4) for _ in range(4)], [draw.choice(wild) for _ in range(4)]
            numbers = draw.choice([near, far])
            model.seq("cp", *numbers)
            model.seq("rm", *numbers[:3])
            model.seq("add", *numbers)
    assert statuses <= {OK, NO_SPACE, INVALID_BATCH}
    assert INVALID_BATCH in statuses
    if layout == "slot":
        assert OK in statuses
        for seq in range(-1, 300):
            abi.library().pld_request_free(model.kv, seq)
        for seq in wild:
            abi.library().pld_request_free(model.kv, seq)
        assert model.free_cells == 64
    for row, good in zip(logits_of(model, layout=layout, ids=[3, 4, 5]), expected, strict=True):
        np.testing.assert_array_equal(row, good)


def test_compiled_model_when_loaded_by_llm_then_tokens_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = build_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    target = tmp_path / "tiny.pld"
    compile_model(EngineConfig(model=str(checkpoint), quantization="int8"), target)
    params, prompt = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), [[5, 6, 7]]
    with LLM(str(target)) as compiled, LLM(str(checkpoint), quantization="int8") as plain:
        assert (
            compiled.generate(prompt, params)[0].outputs[0].token_ids
            == plain.generate(prompt, params)[0].outputs[0].token_ids
        )
    with pytest.raises(ConfigError, match="is compiled"):
        LLM(str(target), quantization="int8")


@pytest.mark.parametrize("cut", [0, 7, 16, 95, 96, 500, 4096])
def test_model_file_that_is_cut_when_opened_then_refused(compiled: Path, tmp_path: Path, cut: int) -> None:
    damaged = tmp_path / "cut.pld"
    damaged.write_bytes(compiled.read_bytes()[:cut])
    with pytest.raises(NativeError):
        CoreModel(damaged, layout="slot")


def test_model_file_with_any_byte_changed_when_opened_then_refused_or_usable(compiled: Path, tmp_path: Path) -> None:
    whole, draw, damaged = bytearray(compiled.read_bytes()), random.Random(1), tmp_path / "damaged.pld"
    base = int.from_bytes(whole[16:24], "little")  # the plan section
    refused = 0
    for _ in range(400):
        bad = bytearray(whole)
        where = draw.choice([draw.randrange(96), draw.randrange(base, base + 8000)])
        bad[where] = draw.randrange(256)
        damaged.write_bytes(bad)
        try:
            CoreModel(damaged, layout="slot").close()
        except NativeError:
            refused += 1
    assert refused > 50


def test_model_file_when_the_core_has_it_open_then_who_tidies_up_leaves_it_alone(
    compiled: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.pld"
    path.write_bytes(compiled.read_bytes())
    model = CoreModel(path, layout="slot")
    assert not remove_unused(path)
    model.close()
    assert remove_unused(path)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_c_example_when_built_then_generates_the_tokens_of_llm(compiled: Path, tmp_path: Path) -> None:
    library, program = Path(abi.library()._name), tmp_path / "generate"
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I", ROOT / "csrc" / "include"]
    source = ROOT / "examples" / "c" / "generate.c"
    finished(["cc", *flags, source, library, f"-Wl,-rpath,{library.parent}", "-o", program], check=True)
    prompt = [9, 8, 7, 6, 5, 4, 3]
    with LLM(str(compiled)) as llm:
        expected = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].token_ids
    for layout in LAYOUTS:
        done = finished([program, compiled, "12", layout, *map(str, prompt)], check=True)
        assert [int(word) for word in done.stdout.split()] == list(expected)

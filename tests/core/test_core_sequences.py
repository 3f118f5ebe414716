"""Sequences of a SLOT cache: any order, holes, windows, shared cells, shifts, aborts on the way, against a plain model."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from utils.batch_builders import BlockBatchState, build_decode_batch
from utils.core_model import CoreModel
from utils.sequence_model import SequenceModel
from utils.tiny_models import build_tiny_checkpoint

from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.contract.batch import single_sequence_batch
from pellucid.core import abi, structs
from pellucid.program.builder import encode_buffers, encode_ops
from pellucid.program.tracer import RecordedOp, RecordedWeight, Recording

pytestmark = pytest.mark.slot
OK, ABORTED, INVALID_BATCH, INVALID_ARGUMENT, NOT_SUPPORTED, INVALID_SEQ, INVALID_POS = 0, 2, -1, -2, -4, -6, -7
IDS = [4, 5, 6, 9, 11, 13, 17, 19]


def compile_tiny(factory: pytest.TempPathFactory, family: str) -> Path:
    checkpoint = build_tiny_checkpoint(factory.mktemp(family), family)
    target = factory.mktemp("compiled") / f"{family}.pld"
    compile_model(EngineConfig(model=str(checkpoint), dtype="bfloat16"), target)
    return target


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_tiny(tmp_path_factory, "llama")


@pytest.fixture
def slot(compiled: Path) -> Iterator[CoreModel]:
    model = CoreModel(compiled, layout="slot")
    yield model
    model.close()


def row(model: CoreModel, index: int) -> torch.Tensor:
    found = model.logits(index)
    assert found is not None
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def expected(compiled: Path) -> list[torch.Tensor]:
    """Logits behind every token of IDS, decoded alone and at once."""
    model = CoreModel(compiled, layout="slot")
    assert model.decode(build_decode_batch(IDS, logits_mask=[True] * len(IDS))) == OK
    rows = [row(model, i) for i in range(len(IDS))]
    model.close()
    return rows


def test_tokens_in_any_order_when_decoded_then_the_bits_of_their_positions(
    slot: CoreModel, expected: list[torch.Tensor]
) -> None:
    places = [(1, 5), (0, 3), (1, 0), (0, 0), (1, 1), (0, 2), (1, 4), (0, 1), (1, 2), (1, 3)]
    batch = build_decode_batch(
        [IDS[p] for _, p in places],
        seq_ids=[seq for seq, _ in places],
        pos_ids=[p for _, p in places],
        logits_mask=[i % 2 == 0 for i in range(len(places))],
    )
    assert slot.decode(batch) == OK
    for i, (_, position) in enumerate(places):
        assert (slot.logits(i) is None) == (i % 2 == 1)
        if i % 2 == 0:
            assert torch.equal(row(slot, i), expected[position])


def test_hidden_states_when_asked_by_index_then_those_of_the_token_and_logits_follow_from_them(
    slot: CoreModel, expected: list[torch.Tensor]
) -> None:
    assert slot.decode(build_decode_batch(IDS[:3])) == OK
    in_order = [slot.hidden(i) for i in range(3)]
    assert slot.decode(build_decode_batch([IDS[2], IDS[0], IDS[1]], seq_ids=[7] * 3, pos_ids=[2, 0, 1])) == OK
    for index, position in enumerate((2, 0, 1)):
        found, wanted = slot.hidden(index), in_order[position]
        assert found is not None
        assert wanted is not None
        assert torch.equal(torch.from_numpy(found), torch.from_numpy(wanted))
    assert slot.hidden(3) is None
    rows = np.array([1, 0], np.int32)  # by index in the batch: positions 0 and 2
    abi.check(abi.library().pld_program_logits(slot.program, rows.ctypes.data, 2))
    data = abi.library().pld_program_logits_data(slot.program)
    width = slot.info.vocab_size
    logits = torch.frombuffer((ctypes.c_float * (2 * width)).from_address(data), dtype=torch.float32).reshape(2, width)
    assert torch.equal(logits[0], expected[0])
    assert torch.equal(logits[1], expected[2])
    assert slot.logits(2) is None  # the buffer holds other rows now


def test_hole_when_filled_again_then_the_bits_of_a_sequence_that_never_had_one(
    slot: CoreModel, expected: list[torch.Tensor]
) -> None:
    assert slot.decode(build_decode_batch(IDS[:6])) == OK
    assert slot.seq("rm", 0, 2, 4) == OK
    assert slot.pos_max(0) == 5
    assert slot.decode(build_decode_batch([IDS[3], IDS[2]], pos_ids=[3, 2], logits_mask=[True, True])) == OK
    assert torch.equal(row(slot, 0), expected[3])
    assert torch.equal(row(slot, 1), expected[2])
    assert slot.decode(build_decode_batch([IDS[6]])) == OK
    assert torch.equal(row(slot, 0), expected[6])


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_window_when_a_middle_is_removed_then_counts_positions(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, ids = compile_tiny(tmp_path_factory, family), [3 + 7 * i % 250 for i in range(40)]
    rows = []
    for cut in ((20, 30), (0, 30)):  # the window of 16 begins at 25: what stands before 20 is out of sight
        model = CoreModel(path, layout="slot")
        assert model.decode(build_decode_batch(ids)) == OK
        assert model.seq("rm", 0, *cut) == OK
        assert model.decode(build_decode_batch([8, 9], seq_ids=[0, 3], logits_mask=[True, True])) == OK
        rows.append(row(model, 0))
        model.close()
    all_layers_have_one = family == "mistral"
    assert torch.equal(rows[0], rows[1]) == all_layers_have_one


def test_sequence_with_holes_when_decoded_beside_others_or_in_chunks_then_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path, ids, more = compile_tiny(tmp_path_factory, "gemma3"), [3 + 7 * i % 250 for i in range(40)], [8, 9, 10, 12]
    found = []
    for chunks, has_neighbour in (([4], False), ([1, 1, 1, 1], False), ([2, 2], True)):
        model, begin, rows = CoreModel(path, layout="slot", cells=128), 0, []
        assert model.decode(build_decode_batch(ids)) == OK
        assert model.seq("rm", 0, 20, 30) == OK
        for count in chunks:
            part = more[begin : begin + count]
            tokens, seqs = ([*part, 5, 6, 7], [0] * count + [9] * 3) if has_neighbour else (part, [0] * count)
            assert model.decode(build_decode_batch(tokens, seq_ids=seqs, logits_mask=[True] * len(tokens))) == OK
            rows += [row(model, i) for i in range(count)]
            begin += count
        found.append(torch.stack(rows))
        model.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sequences_that_take_turns_when_decoded_then_cells_of_each_lie_together(compiled: Path) -> None:
    turns, alone = CoreModel(compiled, layout="slot"), CoreModel(compiled, layout="slot")
    for i in range(16):
        assert turns.decode(build_decode_batch([IDS[i % 8], 3 + i], seq_ids=[0, 1])) == OK
    assert alone.decode(build_decode_batch([IDS[i % 8] for i in range(16)])) == OK
    for cell in range(16):
        for layer in range(turns.info.n_layers):
            assert np.array_equal(turns.read(layer, cell)[0], alone.read(layer, cell)[0])


def test_shift_when_the_cache_is_of_another_shape_then_refused(compiled: Path) -> None:
    model = CoreModel(compiled, layout="slot")
    params = abi.default_params(structs.KVParamsStruct)
    params.n_layers, params.n_kv_heads, params.head_dim = 1, 1, 2
    params.block_size, params.n_blocks, params.layout = 1, 8, abi.KV_SLOT
    other = ctypes.c_void_p()
    abi.check(abi.library().pld_kv_create(ctypes.byref(params), ctypes.byref(other)))
    assert abi.library().pld_seq_add(model.program, other, 0, 0, -1, 1) == INVALID_ARGUMENT
    assert abi.library().pld_decode(model.program, other, ctypes.byref(build_decode_batch([1]).struct)) < 0
    abi.library().pld_kv_destroy(other)


def test_shift_there_and_back_when_the_cache_is_float32_then_logits_are_close_and_shared_copies_untouched(
    compiled: Path, expected: list[torch.Tensor]
) -> None:
    model = CoreModel(compiled, layout="slot", dtype=abi.F32)
    assert model.decode(build_decode_batch(IDS[:5])) == OK
    assert model.seq("cp", 1, 0, 0, 5) == OK
    assert model.decode(build_decode_batch([IDS[5]], seq_ids=[1])) == OK
    before = row(model, 0)
    assert model.seq("rm", 1, 5, -1) == OK
    assert model.seq("add", 0, 0, -1, 300) == OK
    assert model.seq("add", 0, 302, -1, -1) == INVALID_POS
    assert model.seq("add", 0, 0, -1, -300) == OK
    assert model.decode(build_decode_batch([IDS[5]] * 2, seq_ids=[0, 1], logits_mask=[True, True])) == OK
    assert torch.equal(row(model, 1), before)
    torch.testing.assert_close(row(model, 0), before, rtol=1e-3, atol=1e-3)
    assert not torch.equal(row(model, 0), expected[0])


def test_keys_when_changed_behind_their_rotation_then_shift_is_not_supported() -> None:
    context = abi.Context(1)
    recording = Recording(widths=[4] * 6 + [8], domains=["T"] * 5 + ["L"] * 2, n_forward_ops=5, hidden=4, logits=6)
    recording.weights = [
        RecordedWeight("w", None, (8, 4), "matrix"),
        RecordedWeight("frequencies", None, (2,), "vector"),
        RecordedWeight("norm", None, (4,), "vector"),
    ]
    recording.ops = [
        RecordedOp("embedding", (None,), (0,), (0,), (), ()),
        RecordedOp("rope_table", (None,), (1,), (1,), (), (1.0,)),
        RecordedOp("rotary", ((0, 0, 4), (1, 0, 4)), (2,), (), (4, 0), ()),
        RecordedOp("rms_norm", ((2, 0, 4),), (3,), (2,), (1,), (1e-6, 0.0)),
        RecordedOp("attention", ((0, 0, 4), (3, 0, 4), (0, 0, 4)), (4,), (), (0, 1, 1, 4, 0), (0.5, 0.0)),
        RecordedOp("gather_rows", ((4, 0, 4),), (5,), (), (), ()),
        RecordedOp("linear", ((5, 0, 4),), (6,), (0, None), (0,), ()),
    ]
    weights = [
        abi.Weight(abi.aligned_bytes(abi.packed_bytes(8, 4, abi.F32)), 8, 4, abi.F32, abi.PANELS),
        abi.Weight(abi.aligned_bytes(8), 1, 2, abi.F32, abi.ROW_MAJOR),
        abi.Weight(abi.aligned_bytes(16), 1, 4, abi.F32, abi.ROW_MAJOR),
    ]
    sizes = {"n_forward_ops": 5, "hidden": 4, "logits": 6, "vocab_size": 8, "max_tokens": 8, "max_logit_rows": 4}
    program = abi.Program(context, encode_ops(recording), encode_buffers(recording), weights, **sizes)
    shape = {"n_layers": 1, "n_kv_heads": 1, "head_dim": 4, "block_size": 1, "n_blocks": 8, "dtype": abi.F32}
    kv = abi.KVCache(**shape, layout=abi.KV_SLOT)
    lib = abi.library()
    assert lib.pld_decode(program.handle, kv.handle, ctypes.byref(build_decode_batch([1, 2]).struct)) == OK
    assert lib.pld_seq_add(program.handle, kv.handle, 0, 0, -1, 3) == NOT_SUPPORTED
    assert b"behind their rotation" in lib.pld_last_error()
    assert lib.pld_seq_pos_max(kv.handle, 0) == 1
    with pytest.raises(abi.NativeError, match="pld_decode writes them") as caught:
        program.run(kv, single_sequence_batch([1, 2], 1))
    assert caught.value.status == NOT_SUPPORTED


@pytest.mark.parametrize("layout", ["slot", "block"])
def test_abort_when_set_on_the_way_then_cache_is_as_before_and_the_batch_can_be_decoded_again(
    compiled: Path, expected: list[torch.Tensor], layout: str
) -> None:
    model, state = CoreModel(compiled, layout=layout), BlockBatchState(16)
    assert model.decode(build_decode_batch(IDS[:4], layout=layout, block_state=state)) == OK
    batch = build_decode_batch(IDS[4:], layout=layout, block_state=state, logits_mask=[True] * 4)
    hidden = abi.library().pld_program_hidden(model.program)
    ctypes.memset(hidden, 0, 4)
    batch.struct.abort = hidden  # the step itself sets it
    free = model.free_cells
    assert model.decode(batch) == ABORTED
    assert (model.free_cells, model.logits(0), model.hidden(0)) == (free, None, None)
    if layout == "slot":
        assert model.pos_max(0) == 3
    batch.struct.abort = None
    assert model.decode(batch) == OK
    for i in range(4):
        assert torch.equal(row(model, i), expected[4 + i])


def test_block_request_when_decoded_then_known_until_freed(compiled: Path) -> None:
    model, lib = CoreModel(compiled, layout="block"), abi.library()
    bad = build_decode_batch([1, 2], seq_ids=[5, 5], layout="block", block_state=BlockBatchState(16))
    bad.arrays["slot_mapping"][1] = 99  # type: ignore[index]
    assert model.decode(bad) == INVALID_BATCH
    assert lib.pld_request_free(model.kv, 5) == INVALID_SEQ
    good = build_decode_batch([1, 2], seq_ids=[5, 5], layout="block", block_state=BlockBatchState(16))
    assert model.decode(good) == OK
    assert lib.pld_request_free(model.kv, 5) == OK
    assert lib.pld_request_free(model.kv, 5) == INVALID_SEQ


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("context_lens", 0, 2), ("context_lens", 1, 0), ("block_tables", (0, 0), 3), ("slot_mapping", 1, 0)],
)
def test_block_metadata_when_tokens_of_a_sequence_contradict_each_other_then_invalid(
    compiled: Path, name: str, index: int | tuple[int, int], value: int
) -> None:
    model = CoreModel(compiled, layout="block")
    batch = build_decode_batch([1, 2], layout="block", block_state=BlockBatchState(16), pos_ids=[0, 1])
    batch.arrays[name][index] = value  # type: ignore[index]
    assert model.decode(batch) == INVALID_BATCH
    assert abi.library().pld_request_free(model.kv, 0) == INVALID_SEQ


def test_params_of_an_older_header_when_a_cache_is_made_then_it_is_a_block_cache() -> None:
    params, kv = abi.default_params(structs.KVParamsStruct), ctypes.c_void_p()
    params.struct_size, params.layout = structs.KVParamsStruct.layout.offset, 77  # what lies behind is not read
    assert abi.library().pld_kv_create(ctypes.byref(params), ctypes.byref(kv)) == OK
    assert abi.library().pld_kv_free_cells(kv) == -1
    abi.library().pld_kv_destroy(kv)
    params.struct_size -= 1
    assert abi.library().pld_kv_create(ctypes.byref(params), ctypes.byref(kv)) == INVALID_ARGUMENT


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_when_done_then_statuses_positions_and_cells_are_those_of_a_plain_model(
    compiled: Path, seed: int
) -> None:
    draw, model, plain = random.Random(seed), CoreModel(compiled, layout="slot", cells=40), SequenceModel(40)
    seen = set()
    for _ in range(1500):
        verb = draw.choice(["decode", "decode", "cp", "rm", "add", "keep" if draw.random() < 0.2 else "rm"])
        seq, other, p0, p1 = draw.randrange(5), draw.randrange(5), draw.randrange(-1, 12), draw.randrange(-1, 14)
        if verb == "decode":
            seqs = [draw.randrange(4) for _ in range(draw.randint(1, 4))]
            positions = None if draw.random() < 0.7 else [draw.randrange(14) for _ in seqs]
            tokens = [draw.randrange(300) for _ in seqs]
            batch = build_decode_batch(tokens, seq_ids=seqs, pos_ids=positions)
            pair = (model.decode(batch), plain.decode(seqs, positions))
        elif verb == "cp":
            pair = (model.seq("cp", other, seq, p0, p1), plain.cp(other, seq, p0, p1))
        elif verb == "rm":
            pair = (model.seq("rm", seq, p0, p1), plain.rm(seq, p0, p1))
        elif verb == "add":
            delta = draw.randrange(-4, 5)
            pair = (model.seq("add", seq, p0, p1, delta), plain.add(seq, p0, p1, delta))
        else:
            pair = (model.seq("keep", seq), plain.keep(seq))
        assert pair[0] == pair[1], (verb, seq, other, p0, p1)
        seen.add((verb, pair[0]))
        assert model.free_cells == plain.free_cells
        assert [model.pos_max(s) for s in range(5)] == [plain.pos_max(s) for s in range(5)]
    assert {("decode", 1), ("decode", -1), ("cp", -7), ("rm", 0), ("add", 0), ("add", -7), ("keep", 0)} <= seen


def test_tokens_of_several_sequences_when_decoded_then_each_goes_on_as_if_it_were_alone(
    slot: CoreModel, expected: list[torch.Tensor]
) -> None:
    shared = [[1, 2], [1, 2], [1], [1], []]  # sequence 2 parts behind two tokens, 1 behind four
    assert slot.decode(build_decode_batch(IDS[:5], more=shared, logits_mask=[True] * 5)) == OK
    assert all(torch.equal(row(slot, i), expected[i]) for i in range(5))
    assert [slot.pos_max(seq) for seq in range(4)] == [4, 3, 1, -1]
    assert slot.stats() == (slot.stats()[0], 5, slot.stats()[0] - 5, 5)
    tokens, seqs = [IDS[5], IDS[4], IDS[2]], [0, 1, 2]
    assert slot.decode(build_decode_batch(tokens, seq_ids=seqs, logits_mask=[True] * 3)) == OK
    for index, position in enumerate((5, 4, 2)):
        assert torch.equal(row(slot, index), expected[position])
    assert slot.seq("rm", 0, -1, -1) == OK
    assert slot.stats()[1] == 6, "what others hold stays"


def test_token_of_several_sequences_when_another_of_the_batch_follows_it_then_it_is_seen(
    slot: CoreModel, expected: list[torch.Tensor]
) -> None:
    """All in one batch: positions of themselves, and in a caller's own order."""
    assert (
        slot.decode(build_decode_batch(IDS[:4], seq_ids=[0, 0, 7, 7], more=[[7], [7], [], []], logits_mask=[1] * 4))
        == OK
    )
    assert torch.equal(row(slot, 3), expected[3])
    slot.reset()
    batch = build_decode_batch(
        [IDS[2], IDS[1], IDS[0]], seq_ids=[7, 0, 0], pos_ids=[2, 1, 0], more=[[], [7], [7]], logits_mask=[1] * 3
    )
    assert slot.decode(batch) == OK
    assert all(torch.equal(row(slot, i), expected[2 - i]) for i in range(3))


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "its own sequence": ({"more": [[0], [], []]}, "position 0 of sequence 0 is given twice, by tokens 0 and 0"),
    "twice": ({"more": [[], [3, 3], []]}, "position 1 of sequence 3 is given twice"),
    "below 0": ({"more": [[], [], [-5]]}, r"more_seq_ids\[0\] is -5; it must not be below 0"),
    "held": (
        {"more": [[9], [], []], "pos_ids": [4, 5, 6]},
        r"positions\[0\] is 4, which its further sequence 9 holds already",
    ),
    "by two tokens": ({"more": [[3], [3], []], "seq_ids": [0, 1, 1], "pos_ids": [0, 0, 1]}, "by tokens 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_further_sequences_when_they_cannot_be_then_refused_and_nothing_has_changed(slot: CoreModel, case: str) -> None:
    arguments, said = REFUSED[case]
    assert slot.decode(build_decode_batch(IDS[:6], seq_ids=[9] * 6)) == OK
    before = slot.stats()
    assert slot.decode(build_decode_batch(IDS[:3], **arguments)) == INVALID_BATCH
    assert re.search(said, abi.library().pld_last_error().decode())
    assert slot.stats() == before
    assert [slot.pos_max(seq) for seq in (0, 1, 3, 9)] == [-1, -1, -1, 5]


def test_further_sequences_when_starts_do_not_ascend_or_the_cache_has_blocks_then_refused_by_name(
    compiled: Path,
) -> None:
    model = CoreModel(compiled, layout="slot")
    for starts in ([1, 1, 1], [0, 2, 1], [0, 2**24 + 1, 2**24 + 2]):
        batch = build_decode_batch(IDS[:2], more=[[1], [1]])
        batch.arrays["more_start"][:] = starts
        assert model.decode(batch) == INVALID_BATCH
        assert b"more_start[" in abi.library().pld_last_error()
    batch = build_decode_batch(IDS[:2], more=[[1], []])
    batch.struct.more_seq_ids = None
    assert model.decode(batch) == INVALID_BATCH
    model.close()
    blocks, state = CoreModel(compiled, layout="block"), BlockBatchState(16)
    assert (
        blocks.decode(build_decode_batch(IDS[:2], layout="block", block_state=state, more=[[1], []])) == NOT_SUPPORTED
    )
    assert b"SLOT" in abi.library().pld_last_error()
    assert blocks.stats() == (blocks.stats()[0], -1, -1, -1)
    blocks.close()


def test_further_sequences_when_aborted_then_none_of_them_is_left(slot: CoreModel) -> None:
    batch, flag = build_decode_batch(IDS[:3], more=[[1], [1, 2], []]), ctypes.c_int32(1)
    batch.struct.abort = ctypes.addressof(flag)
    assert slot.decode(batch) == ABORTED
    assert [slot.pos_max(seq) for seq in (0, 1, 2)] == [-1] * 3
    assert slot.stats()[1] == 0


def test_cache_when_reset_then_empty_and_the_peak_begins_anew(slot: CoreModel, expected: list[torch.Tensor]) -> None:
    assert slot.decode(build_decode_batch(IDS[:6], seq_ids=[0, 0, 0, 1, 1, 2])) == OK
    assert slot.seq("rm", 0, -1, -1) == OK
    capacity = slot.stats()[0]
    assert slot.stats() == (capacity, 3, capacity - 3, 6)
    slot.reset()
    assert slot.stats() == (capacity, 0, capacity, 0)
    assert [slot.pos_max(seq) for seq in range(3)] == [-1] * 3
    assert slot.decode(build_decode_batch(IDS, logits_mask=[True] * len(IDS))) == OK
    assert all(torch.equal(row(slot, i), expected[i]) for i in range(len(IDS)))

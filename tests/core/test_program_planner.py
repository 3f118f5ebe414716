"""Recording, planning and the program file: liveness, shared slots, and damaged files."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid import ops
from pellucid.core import abi
from pellucid.errors import StorageError, WeightFormatError
from pellucid.program.builder import FORMAT_VERSION
from pellucid.program.file import MAGIC, open_program_file, write_program_file
from pellucid.program.planner import Uses, assign_slots, last_uses
from pellucid.program.runner import load_program
from pellucid.program.tracer import RecordedOp, Recording, trace


class Parameter:
    def __init__(self, *shape: int) -> None:
        self.shape = shape


class TinyModel:
    """Embedding tied with the head, one linear with a column split."""

    def __init__(self) -> None:
        self.table, self.mix = Parameter(8, 4), Parameter(8, 4)

    def named_parameters(self) -> Any:
        yield "table", self.table
        yield "mix", self.mix

    def forward(self, input_ids: Any, positions: Any) -> Any:
        x = ops.embedding(input_ids, self.table)
        a, b = ops.linear(x, self.mix).split([4, 4], dim=-1)
        return ops.add(ops.act(a, "silu"), b)

    def compute_logits(self, hidden: Any) -> Any:
        return ops.linear(hidden, self.table)


def test_module_when_traced_then_ops_buffers_and_weights_are_written_down() -> None:
    recording = trace(TinyModel())
    assert [op.kind for op in recording.ops] == ["embedding", "linear", "act", "add", "gather_rows", "linear"]
    assert recording.n_forward_ops == 4
    assert recording.ops[2].inputs == ((1, 0, 4),)
    assert recording.ops[3].inputs == ((2, 0, 4), (1, 4, 4))
    assert recording.domains == ["T", "T", "T", "T", "L", "L"]
    assert [(weight.name, weight.kind) for weight in recording.weights] == [("table", "matrix"), ("mix", "matrix")]


def test_module_when_it_does_something_else_with_symbols_then_type_error() -> None:
    class Wrong(TinyModel):
        def forward(self, input_ids: Any, positions: Any) -> Any:
            return np.zeros(3)

    with pytest.raises(TypeError, match=r"Wrong.forward gave ndarray"):
        trace(Wrong())


def assert_no_live_buffers_share(recording: Recording, slots: list[int]) -> None:
    """The oracle: replays who owns each slot; a read must find its own buffer there."""
    owner: dict[int, int] = {}
    for op in recording.ops:
        reads = [operand[0] for operand in op.inputs if operand is not None]
        assert all(owner[slots[buffer]] == buffer for buffer in reads)
        assert not {slots[buffer] for buffer in op.outputs} & {slots[buffer] for buffer in reads}
        assert len({slots[buffer] for buffer in op.outputs}) == len(op.outputs)
        owner.update({slots[buffer]: buffer for buffer in op.outputs})
    for buffer in (recording.hidden, recording.logits):
        assert owner[slots[buffer]] == buffer
    for slot in set(slots):
        assert len({recording.domains[b] for b, s in enumerate(slots) if s == slot}) == 1


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    recording = Recording()
    for index in range(draw(st.integers(2, 30))):
        known = list(range(len(recording.widths)))
        reads = draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
        outputs = []
        for _ in range(draw(st.integers(1, 2))):
            recording.widths.append(draw(st.integers(1, 9)))
            recording.domains.append("T")
            outputs.append(len(recording.widths) - 1)
        inputs = tuple((buffer, 0, recording.widths[buffer]) for buffer in reads)
        recording.ops.append(RecordedOp(f"op{index}", inputs, tuple(outputs), (), (), ()))
    recording.hidden = recording.ops[-1].outputs[0]
    recording.widths.append(3)
    recording.domains.append("L")
    recording.logits = len(recording.widths) - 1
    operand = (recording.hidden, 0, recording.widths[recording.hidden])
    recording.ops.append(RecordedOp("head", (operand,), (recording.logits,), (), (), ()))
    return recording


@given(recordings())
def test_any_recording_when_planned_then_no_two_living_buffers_share_a_slot(recording: Recording) -> None:
    assert_no_live_buffers_share(recording, assign_slots(Uses.of(recording)))
    last = last_uses(Uses.of(recording))
    assert all(last[op.outputs[0]] >= index for index, op in enumerate(recording.ops))


def test_long_chain_when_planned_then_needs_two_slots() -> None:
    recording = Recording(widths=[4] * 50, domains=["T"] * 50)
    recording.ops = [RecordedOp("first", (), (0,), (), (), ())]
    recording.ops += [RecordedOp("next", ((i, 0, 4),), (i + 1,), (), (), ()) for i in range(48)]
    recording.hidden, recording.logits = 48, 48
    assert len(set(assign_slots(Uses.of(recording))[:49])) == 2


def write(path: Path) -> Path:
    def fill(data: Any) -> None:
        data[:] = np.arange(100, dtype=np.uint8)

    write_program_file(path, {"kind": "program"}, {"ops": b"abc", "config": b'{"a": 1}'}, 100, fill)
    return path


def test_program_file_when_written_and_opened_then_the_same_sections(tmp_path: Path) -> None:
    file = open_program_file(write(tmp_path / "a.pld"))
    assert file.sections["ops"].tobytes() == b"abc"
    assert file.text("config") == {"a": 1}
    assert np.array_equal(file.sections["data"], np.arange(100, dtype=np.uint8))
    assert file.sections["data"].ctypes.data % 64 == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pld"]


def test_program_file_when_packing_fails_then_nothing_is_left(tmp_path: Path) -> None:
    def fill(data: Any) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_program_file(tmp_path / "a.pld", {}, {}, 64, fill)
    assert list(tmp_path.iterdir()) == []


class _FailingMapping(mmap.mmap):
    def flush(self, *_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_program_file_when_it_cannot_be_flushed_then_typed_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "mmap", _FailingMapping)
    with pytest.raises(StorageError, match=r"a.pld cannot be written: Input/output error"):
        write(tmp_path / "a.pld")
    assert list(tmp_path.iterdir()) == []


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda b: b"", "too few"),
    "cut in the magic": (lambda b: b[:5], "too few"),
    "another magic": (lambda b: b"X" + b[1:], "wrong magic"),
    "header too long": (lambda b: b[:8] + (2**62).to_bytes(8, "little") + b[16:], "header of"),
    "header not JSON": (lambda b: b[:96] + b"\xff" * 20 + b[116:], "header is damaged"),
    "index of another file": (lambda b: b[:16] + b"\xff" * 20 + b[36:], "say different things"),
    "cut behind the header": (lambda b: b[:200], "lies outside"),
    "cut in the data": (lambda b: b[:-30], "lies outside"),
    "section negative": (lambda b: b.replace(b'"ops": [0, 3]', b'"ops": [0,-3]'), "lies outside"),
    "section not numbers": (lambda b: b.replace(b'"ops": [0, 3]', b'"ops": ["", ]'), "damaged"),
    "section misaligned": (lambda b: b.replace(b'"ops": [0, 3]', b'"ops": [1, 3]'), "lies outside"),
    "section at no integer": (lambda b: with_header(b, b'{"sections": {"ops": [1e999, 3]}}'), "header is damaged"),
    "header nested too deeply": (lambda b: with_header(b, b"[" * 100_000), "header is damaged"),
}


def with_header(whole: bytes, header: bytes) -> bytes:
    return whole[:8] + len(header).to_bytes(8, "little") + whole[16:96] + header + whole[96:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_program_file_when_damaged_then_typed_error(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.pld")
    assert path.read_bytes().startswith(MAGIC)
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightFormatError, match=message):
        open_program_file(path)


def test_text_section_when_absent_or_not_json_then_typed_error(tmp_path: Path) -> None:
    file = open_program_file(write(tmp_path / "a.pld"))
    with pytest.raises(WeightFormatError, match="'tokenizer' is absent"):
        file.text("tokenizer")
    with pytest.raises(WeightFormatError, match="'ops' is not JSON"):
        file.text("ops")


def test_text_section_when_nested_too_deeply_then_typed_error(tmp_path: Path) -> None:
    write_program_file(tmp_path / "a.pld", {}, {"config": b"[" * 100_000}, 64, lambda data: None)
    with pytest.raises(WeightFormatError, match="'config' is not JSON"):
        open_program_file(tmp_path / "a.pld").text("config")


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [["w", "x", 4, 0, 0, 0, 64]]},
        {"weights": [["w", 4, 4, 1.5, 0, 0, 64]]},
        {"weights": [["w", 4, 4, 0, [], 0, 64]]},
        {"weights": [["w", 4, 2**70, 0, 0, 0, 64]]},
        {"weights": [["w", True, 16, 0, 0, 0, 64]]},
        {"logits": 0.5},
        {"hidden": 0.5},
        {"hidden": [0]},
        {"n_forward_ops": "1"},
    ],
    ids=str,
)
def test_program_when_its_header_holds_other_types_then_typed_error(tmp_path: Path, change: dict[str, Any]) -> None:
    meta = {"format_version": FORMAT_VERSION, "n_forward_ops": 1, "hidden": 0, "logits": 1, "vocab_size": 4}
    tables = {
        "ops": np.zeros(1, abi.OP_DTYPE).tobytes(),
        "buffers": np.zeros(2, abi.BUFFER_DTYPE).tobytes(),
    }
    meta |= {"weights": [["w", 4, 4, 0, 0, 0, 64]], **change}
    write_program_file(tmp_path / "a.pld", meta, tables, 64, lambda data: None)
    with pytest.raises(WeightFormatError, match="the program is damaged"):
        load_program(abi.Context(1), open_program_file(tmp_path / "a.pld"), 4, 4)

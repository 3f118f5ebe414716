"""`pellucid info MODEL --program`: the plan as a person can read it, one line an op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pellucid.core import abi
from pellucid.ops.spec import ACTIVATION_NAMES, OP_NAMES
from pellucid.program.file import ProgramFile
from pellucid.program.scheme import DTYPE_NAMES

Weight = tuple[str, int, int, int, int, int, int]  # name, rows, cols, dtype, layout, offset, bytes


def program_lines(file: ProgramFile) -> Iterator[str]:
    """Ops in order: number, kind, what is read, what is written, the weight, its bytes, operations a row; then totals."""
    ops, buffers = file.sections["ops"].view(abi.OP_DTYPE), file.sections["buffers"].view(abi.BUFFER_DTYPE)
    weights: list[Weight] = [tuple(weight) for weight in file.meta["weights"]]
    forward = int(file.meta["n_forward_ops"])
    yield "b7[576]@2 is buffer 7, 576 floats a row, in slot 2. T rows a step are tokens, L rows those that need logits."
    yield ""
    yield f"{'op':>4}  {'kind':<12} {'reads':<38} {'writes':<24} {'weights':<58} {'bytes':>12} {'flops/row':>12}"
    flops = [0, 0]
    for index, op in enumerate(ops):
        if index in (0, forward):
            yield f"---- {'T: forward' if index == 0 else 'L: logits'}"
        used = [weights[w] for w in op["weight"] if w >= 0]
        cost = _flops(op, used)
        flops[index >= forward] += cost
        yield (
            f"{index:>4}  {OP_NAMES[int(op['kind'])]:<12} {_operands(op, buffers, 'in'):<38}"
            f" {_operands(op, buffers, 'out'):<24} {', '.join(_weight(w) for w in used):<58}"
            f" {sum(w[6] for w in used):>12,} {cost:>12,}{_detail(op)}"
        )
    yield ""
    yield from _totals(ops, buffers, weights, flops, forward)


def _operands(op: Any, buffers: abi.AnyArray, side: str) -> str:
    found = []
    for buffer, column, width in zip(op[side], op[f"{side}_col"], op[f"{side}_width"], strict=True):
        if buffer >= 0:
            whole = column == 0 and width == buffers["width"][buffer]
            columns = f"{width}" if whole else f"{column}:{column + width}"
            found.append(f"b{buffer}[{columns}]@{buffers['slot'][buffer]}")
    return " ".join(found)


def _weight(weight: Weight) -> str:
    name, rows, cols, dtype = weight[:4]
    short = name.removeprefix("model.").removesuffix(".weight")
    return f"{short} [{rows}, {cols}] {DTYPE_NAMES[dtype]}" if rows > 1 else f"{short} [{cols}]"


def _flops(op: Any, used: list[Weight]) -> int:
    """Of the products alone, a row; a multiplication and an addition are two. Attention depends on the past: not counted."""
    return 2 * used[0][1] * used[0][2] if OP_NAMES[int(op["kind"])] == "linear" and used else 0


def _detail(op: Any) -> str:
    kind, ints = OP_NAMES[int(op["kind"])], op["i"]
    if kind == "attention":
        window = f", window {ints[4]}" if ints[4] else ""
        return f"  layer {ints[0]}: {ints[1]} heads of {ints[3]}, {ints[2]} for keys and values{window}"
    if kind in ("linear", "act", "act_and_mul") and ints[0]:
        return f"  {ACTIVATION_NAMES[int(ints[0])]}"
    return ""


def _totals(
    ops: abi.AnyArray, buffers: abi.AnyArray, weights: list[Weight], flops: list[int], forward: int
) -> Iterator[str]:
    by_dtype: dict[str, int] = {}
    for weight in weights:
        by_dtype[DTYPE_NAMES[weight[3]]] = by_dtype.get(DTYPE_NAMES[weight[3]], 0) + weight[6]
    slots: dict[int, int] = {}
    for width, slot in zip(buffers["width"], buffers["slot"], strict=True):
        slots[int(slot)] = max(slots.get(int(slot), 0), int(width))
    yield f"ops      {forward} forward, {len(ops) - forward} for logits"
    yield f"buffers  {len(buffers)} in {len(slots)} slots: {4 * sum(slots.values()):,} bytes a row"
    for name, count in sorted(by_dtype.items()):
        yield f"weights  {name:<17} {count:>14,} bytes"
    yield f"weights  {'in all':<17} {sum(by_dtype.values()):>14,} bytes"
    yield f"products {flops[0]:,} operations a token, {flops[1]:,} more a row of logits; attention comes on top, by the past"

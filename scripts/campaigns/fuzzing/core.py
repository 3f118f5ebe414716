"""The library as the fuzzer calls it: every call is noted, and its status and text are checked against the header.

Nothing of pellucid.core.abi stands between the fuzzer and the library but the signatures, so that Python's checks hide nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from fuzzing.frame import FindingError, Tally
from pellucid.core import abi, structs

OK, NO_SPACE, ABORTED = 0, 1, 2
INVALID_BATCH, INVALID_ARGUMENT, OUT_OF_MEMORY, NOT_SUPPORTED = -1, -2, -3, -4
INVALID_SEQ, INVALID_POS, EMPTY_RANGE = -6, -7, -8

_MAX_SHOWN = 500  # characters of a value

_PLAIN = frozenset({OK, INVALID_ARGUMENT})
_SEQ = _PLAIN | {NOT_SUPPORTED, INVALID_SEQ, INVALID_POS, EMPTY_RANGE}
# What the header allows each function to answer.
STATUSES: dict[str, frozenset[int]] = {
    "pld_cpu_info_get": _PLAIN,
    "pld_context_create": _PLAIN | {NOT_SUPPORTED, OUT_OF_MEMORY},
    "pld_convert": _PLAIN,
    "pld_pack": _PLAIN | {NOT_SUPPORTED},
    "pld_kv_create": _PLAIN | {OUT_OF_MEMORY},
    "pld_kv_read": _PLAIN,
    "pld_sample": _PLAIN,
    "pld_sample_run": _PLAIN,
    "pld_context_params_init": _PLAIN,
    "pld_kv_params_init": _PLAIN,
    "pld_model_params_init": _PLAIN,
    "pld_verify_params_init": _PLAIN,
    "pld_op_run": _PLAIN | {INVALID_BATCH, NOT_SUPPORTED, OUT_OF_MEMORY},
    "pld_program_create": _PLAIN | {OUT_OF_MEMORY},
    "pld_program_run": _PLAIN | {INVALID_BATCH, NOT_SUPPORTED},
    "pld_program_logits": _PLAIN | {INVALID_BATCH},
    "pld_model_open": _PLAIN | {OUT_OF_MEMORY},
    "pld_model_info_get": _PLAIN,
    "pld_model_verify": _PLAIN | {ABORTED},
    "pld_decode": _PLAIN | {NO_SPACE, ABORTED, INVALID_BATCH, NOT_SUPPORTED},
    "pld_seq_cp": _SEQ,
    "pld_seq_rm": _SEQ,
    "pld_seq_add": _SEQ | {NO_SPACE},
    "pld_seq_keep": _PLAIN | {NOT_SUPPORTED, INVALID_SEQ},
    "pld_request_free": _PLAIN | {INVALID_SEQ},
    "pld_kv_stats_get": _PLAIN,
    "pld_kv_reset": _PLAIN,
}
COUNTERS = ("checks", *(f"status {status}" for status in sorted(abi.STATUS_NAMES)), *abi.SIGNATURES)

PLANTS = {
    "silent-refusal": "refused calls leave no text",
    "leaky-refusal": "a refused decode removes a sequence",
    "lost-shift": "pld_seq_add says ok and does nothing",
    "unchecked-length": "pld_convert trusts the caller about the room that its target has",
    "unchecked-table": "a block table is not compared with the slots that the caller names",
    "skewed-source": "pld_convert reads 8 bytes behind its source (seen under the address sanitizer alone)",
    "unknown-status": "a status that the header does not know",
    "hang": "pld_seq_keep never ends",
    "crash": "pld_kv_read of a cell beyond the cache reads there",
}


class Core:
    """Calls into the library, of one worker."""

    def __init__(self, tally: Tally, *, verbose: bool = False, plant: str | None = None) -> None:
        self.tally, self._verbose = tally, verbose
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        library = abi.library()
        self._functions: dict[str, Callable[..., Any]] = {name: getattr(library, name) for name in abi.SIGNATURES}
        if plant is not None:
            _plant(self._functions, plant)
        self._last_error = self._functions["pld_last_error"]
        self._status_at = {status: tally.place[f"status {status}"] for status in abi.STATUS_NAMES}

    def about(self, drawn: object) -> None:
        """What the next call is made from."""
        self.calls.append(("#", (drawn,)))
        if self._verbose:
            print(f"# {_described(drawn)}", flush=True)

    def begin(self) -> None:
        """A case begins: nothing was called."""
        self.calls.clear()

    def get(self, name: str, *arguments: Any) -> Any:
        """A function that gives a value."""
        self._note(name, arguments)
        return self._functions[name](*arguments)

    def peek(self, name: str, *arguments: Any) -> Any:
        """A function that gives a value, called to check others: it is not counted."""
        return self._functions[name](*arguments)

    def call(self, name: str, *arguments: Any) -> int:
        """A function that gives a status, which is checked against the header, and its text."""
        self._note(name, arguments)
        status = int(self._functions[name](*arguments))
        text = self._last_error()
        self.tally.numbers[self.tally.place["pld_last_error"]] += 1
        if status not in STATUSES[name]:
            self.wrong(f"{name} answered {status}: {text!r}")
        self.tally.numbers[self._status_at[status]] += 1
        self._check_item(name, status)
        if status == OK:
            if text:
                self.wrong(f"{name} succeeded, and pld_last_error is {text!r}")
            return status
        if not text:
            self.wrong(f"{name} answered {status}, and pld_last_error is empty")
        try:
            text.decode()
        except UnicodeDecodeError as error:
            self.wrong(f"{name} answered {status}, and pld_last_error is no UTF-8: {error}: {text!r}")
        return status

    def _check_item(self, name: str, status: int) -> None:
        """What the failure is about: a known kind of item and its number, or nothing and -1."""
        index = ctypes.c_int64(-2)
        item = int(self._functions["pld_last_error_item"](ctypes.byref(index)))
        self.tally.numbers[self.tally.place["pld_last_error_item"]] += 1
        is_named = item in abi.ITEM_NAMES
        if not (is_named or item == 0) or is_named != (index.value >= 0) or (is_named and status == OK):
            self.wrong(f"{name} answered {status}, and pld_last_error_item is {item}, number {index.value}")

    def last_text(self) -> str:
        """The text of the last failure."""
        return str(self._last_error().decode(errors="replace"))

    def expect(self, found: object, expected: object, what: str) -> None:
        """One check of the fuzzer's own."""
        if found != expected:
            self.wrong(f"{what}: {found!r}; expected {expected!r} (last error: {self.last_text()!r})")

    def wrong(self, text: str) -> None:
        """A finding, with the calls that led to it."""
        raise FindingError(text, [described(name, arguments) for name, arguments in self.calls])

    def _note(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append((name, arguments))
        self.tally.numbers[self.tally.place[name]] += 1
        if self._verbose:
            print(described(name, arguments), flush=True)


def summary(totals: dict[str, int]) -> str:
    """Calls, and what became of them."""
    calls = [totals[name] for name in abi.SIGNATURES]
    refused = {status: totals[f"status {status}"] for status in abi.STATUS_NAMES if status != OK}
    told = ", ".join(f"{abi.STATUS_NAMES[status]} {count:,}" for status, count in refused.items() if count)
    return (
        f"{sum(calls):,} calls of {sum(count > 0 for count in calls)} of {len(calls)} functions, "
        f"{totals['status 0']:,} accepted, refused: {told or 'none'}, {totals['checks']:,} comparisons"
    )


# ---- calls in words ------------------------------------------------------------------------------------------------


def described(name: str, arguments: Sequence[Any]) -> str:
    """A call as it would be written."""
    if name == "#":
        return f"# {_described(arguments[0])}"
    return f"{name}({', '.join(map(_described, arguments))})"


def _described(value: Any) -> str:
    value = getattr(value, "_obj", value)  # byref
    if isinstance(value, ctypes.Array):
        shown = value[:40]
        return f"{shown}{'…' if len(value) > 40 else ''}"
    if isinstance(value, ctypes.Structure):
        fields = ", ".join(f"{field[0]}={_described(getattr(value, field[0]))}" for field in value._fields_)
        return f"{type(value).__name__}({fields})"
    if isinstance(value, ctypes.c_void_p):
        value = value.value or 0
    shown = hex(value) if isinstance(value, int) and abs(value) > 2**40 else repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}… ({len(shown)} characters)"


# ---- planted faults ------------------------------------------------------------------------------------------------


def _plant(functions: dict[str, Callable[..., Any]], plant: str) -> None:
    """Puts a fault between the fuzzer and the library."""
    real = dict(functions)
    if plant == "silent-refusal":
        functions["pld_last_error"] = lambda: b""
    elif plant == "leaky-refusal":
        functions["pld_decode"] = lambda *given: _leaky_decode(real, *given)
    elif plant == "lost-shift":
        functions["pld_seq_add"] = lambda *_: _succeed(real)
    elif plant == "unchecked-length":
        functions["pld_convert"] = lambda *given: real["pld_convert"](*given[:7], 2**62, given[8])
    elif plant == "skewed-source":
        functions["pld_convert"] = lambda *given: real["pld_convert"](given[0], given[1] and given[1] + 8, *given[2:])
    elif plant == "unchecked-table":
        functions["pld_program_run"] = lambda *given: _trusting_run(real, *given)
    elif plant == "unknown-status":
        functions["pld_request_free"] = lambda *given: real["pld_request_free"](*given) or 3
    elif plant == "hang":
        functions["pld_seq_keep"] = _never_ends
    elif plant == "crash":
        functions["pld_kv_read"] = lambda *given: _wild_read(real, *given)


def _succeed(real: dict[str, Callable[..., Any]]) -> int:
    """Ok, and no text of a failure before."""
    real["pld_kv_bytes"](ctypes.byref(abi.default_params(structs.KVParamsStruct)))
    return OK


def _leaky_decode(real: dict[str, Callable[..., Any]], program: Any, kv: Any, batch: Any) -> int:
    status = int(real["pld_decode"](program, kv, batch))
    if status != INVALID_BATCH:
        return status
    real["pld_request_free"](kv, 1)
    real["pld_request_free"](kv, 2)
    real["pld_seq_pos_max"](kv, 1)
    return status if real["pld_last_error"]() else int(real["pld_kv_create"](None, None)) + 1  # with some text


def _trusting_run(real: dict[str, Callable[..., Any]], program: Any, kv: Any, batch: Any) -> int:
    status = int(real["pld_program_run"](program, kv, batch))
    return _succeed(real) if b"by the block table" in real["pld_last_error"]() else status


def _never_ends(*_: Any) -> int:
    while True:
        pass


def _wild_read(real: dict[str, Callable[..., Any]], kv: Any, layer: int, cell: int, k: Any, v: Any) -> int:
    status = int(real["pld_kv_read"](kv, layer, cell, k, v))
    if status == INVALID_ARGUMENT and kv and cell > 2**31:
        ctypes.string_at(cell & 0xFFF, 1)
    return status

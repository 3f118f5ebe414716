"""`pellucid capture`: activations for a file of prompts, as safetensors shards: what probes, sparse autoencoders and drafts are made from.

A shard has a tensor [rows, width] for each activation, `token_ids` [rows] (the input token of each row), `offsets` [prompts + 1] (where the
rows of each prompt begin) and `lines` [prompts] (its line in the input, from 1). Lines stand in order; a line that failed is in
`errors.jsonl`. Of several choices the first is kept. A run that was stopped, or found the disk full, goes on behind its last whole
shard when it is started again: later lines are captured anew, and their errors told once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import CaptureParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.commands.jsonl import Line, ended_lines
from pellucid.errors import ConfigError, InvalidRequestError, StorageError
from pellucid.files import PART_SUFFIX, LineFile, make_folder, remove_parts, write_whole
from pellucid.json_text import dumps, well_formed
from pellucid.llm import LLM
from pellucid.version import VERSION
from pellucid.weights.safetensors import open_safetensors, read_metadata, write_safetensors

ERRORS = "errors.jsonl"
DTYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}
_SHARD = "shard-{:05d}.safetensors"


class ShardWriter:
    """Shards of one run. `first_line` is where it begins: behind what a run before has written.

    Raises:
        ConfigError: the folder holds shards of another model, or of other activations or parameters.
        StorageError: the folder cannot be made; later, a shard cannot be written.
    """

    def __init__(self, folder: Path, metadata: dict[str, str], dtype: str, shard_bytes: int) -> None:
        self._folder, self._metadata = folder, {**metadata, "dtype": dtype}
        self._dtype, self._shard_bytes = DTYPES[dtype], shard_bytes
        try:
            make_folder(folder)
        except StorageError as error:
            raise ConfigError(str(error)) from error
        remove_parts(folder, f"shard-*{PART_SUFFIX}")
        self.first_line, self._number = self._resume()
        self._begin()

    def _begin(self) -> None:
        self._values: dict[str, list[npt.NDArray[Any]]] = {}
        self._token_ids: list[int] = []
        self._offsets, self._lines, self._bytes = [0], list[int](), 0

    def _resume(self) -> tuple[int, int]:
        number, line = 0, 0
        while (path := self._folder / _SHARD.format(number)).exists():
            found = read_metadata(path)
            for name, value in self._metadata.items():
                if found.get(name) != value:
                    raise ConfigError(
                        f"{path} has {name} {found.get(name)!r}; this run has {value!r}: choose another folder"
                    )
            number, line = number + 1, _last_line(path)
        return line + 1, number

    def add(self, line: int, output: RequestOutput) -> None:
        """Takes the rows of a line; writes a shard when it is full."""
        choice = output.outputs[0]
        for name, rows in (choice.captured or {}).items():
            values = np.asarray(rows).astype(self._dtype, copy=False)
            self._values.setdefault(name, []).append(values)
            self._bytes += values.nbytes
        self._token_ids += [*output.prompt_token_ids, *choice.token_ids][:-1]
        self._offsets.append(len(self._token_ids))
        self._lines.append(line)
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what has been taken, if anything."""
        if not self._lines:
            return
        tensors: dict[str, npt.NDArray[Any]] = {name: np.concatenate(rows) for name, rows in self._values.items()}
        tensors["token_ids"] = np.array(self._token_ids, np.int32)
        tensors["offsets"] = np.array(self._offsets, np.int64)
        tensors["lines"] = np.array(self._lines, np.int64)
        write_safetensors(self._folder / _SHARD.format(self._number), tensors, self._metadata)
        self._number += 1
        self._begin()


def _last_line(path: Path) -> int:
    """The line of the input that the last prompt of a shard stands in."""
    lines = open_safetensors(path).get("lines")
    last = (
        int(lines.to_numpy()[-1])
        if lines is not None and lines.dtype == "I64" and len(lines.shape) == 1 and lines.cols
        else 0
    )
    if last < 1:
        raise ConfigError(
            f"{path} does not say which lines it is of: it is damaged, or no shard; choose another folder"
        )
    return last


def capture_jsonl(
    llm: LLM,
    source: BinaryIO,
    folder: Path,
    names: list[str],
    defaults: dict[str, Any],
    *,
    dtype: str,
    shard_bytes: int,
    advance: Callable[[], None],
) -> int:
    """Captures `names` for every line; gives the number of lines that were refused or failed.

    Raises:
        ConfigError, StorageError: as `ShardWriter`, or a dtype that is unknown.
        InvalidRequestError: a name stands for no activation.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"capture dtype is {dtype!r}; it must be one of: {', '.join(DTYPES)}")
    wanted = CaptureParams.from_request(names)
    limits = llm.engine.checker.hidden_states
    if wanted is None or limits is None:
        raise InvalidRequestError("capture", "needs names, and an engine that hands out hidden states")
    resolved = wanted.resolve(limits)
    metadata = {
        "pellucid": VERSION,
        "model": well_formed(llm.config.model),
        "fingerprint": llm.engine.executor.facts.fingerprint,
        "activations": dumps(resolved),
        "sampling": json.dumps(defaults, sort_keys=True, default=str),
    }
    writer = ShardWriter(folder, metadata, dtype, shard_bytes)
    with contextlib.closing(_errors_before(folder / ERRORS, writer.first_line)) as errors:
        return _capture(llm, source, CaptureParams(resolved), defaults, writer, errors.write, advance)


def _errors_before(path: Path, line: int) -> LineFile:
    """The file of errors, to be gone on with; without those of lines from `line` on, and without a line that was cut off."""
    found = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    write_whole(path, b"".join(text for text in found if text.endswith(b"\n") and _line_of(text) < line))
    return LineFile(path, append=True)


def _line_of(error: bytes) -> float:
    try:
        return float(json.loads(error)["line"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _capture(
    llm: LLM,
    source: BinaryIO,
    wanted: CaptureParams,
    defaults: dict[str, Any],
    writer: ShardWriter,
    write_error: Callable[[bytes], object],
    advance: Callable[[], None],
) -> int:
    failed = 0
    options = RequestOptions(capture=wanted)
    lines = ended_lines(llm, source, defaults, first_line=writer.first_line, options=options)
    for line in lines:
        problem = _take(llm, line, writer)
        if problem is not None:
            failed += 1
            write_error(dumps({"line": line.number, "error": problem}).encode() + b"\n")
        advance()
    writer.flush()
    return failed


def _take(llm: LLM, line: Line, writer: ShardWriter) -> str | None:
    """Hands a line's rows on; what went wrong, if anything."""
    if line.request_id is None:
        return line.error or "the line could not be read"
    output = llm.client.collect(line.request_id)
    llm.client.release(line.request_id)
    if output is None or output.outputs[0].captured is None:
        return (output and output.outputs[0].error) or "the request has no rows"
    writer.add(line.number, output)
    return None

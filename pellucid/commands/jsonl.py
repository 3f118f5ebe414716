"""`pellucid run`: prompts from a JSON-lines file, results as JSON lines in the same order."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pellucid.api.outputs import Logprob
from pellucid.api.request_options import NO_OPTIONS, RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.engine.client import EngineClient
from pellucid.errors import InvalidRequestError, PellucidError, StorageError, shown
from pellucid.files import LineFile
from pellucid.json_text import check_values, dumps
from pellucid.llm import LLM

# Lines read ahead of what runs: enough to keep the batch full, few enough to bound memory.
LOOKAHEAD = 4
MAX_LINE_BYTES = 64 * 2**20  # as of a trace: a prompt of a million tokens has less than 8 MB
_OWN_KEYS = ("prompt", "messages")


@dataclass
class Line:
    """One line of the input on its way: submitted, or refused."""

    number: int
    request_id: str | None = None
    error: str | None = None


@contextmanager
def results(path: str) -> Iterator[Callable[[str], object]]:
    """What takes a result: a line of a file, or of standard output for `-`.

    Raises:
        InvalidRequestError: the file cannot be opened.
        StorageError: later, a line cannot be written. What is in the file then is whole.
    """
    if path == "-":
        yield _say
        return
    try:
        opened = LineFile(Path(path))
    except StorageError as error:
        raise InvalidRequestError("output", (str(error),)) from error
    with closing(opened) as file:
        yield lambda line: file.write(line.encode("utf-8", "backslashreplace"))


def _say(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def run_jsonl(
    llm: LLM,
    source: BinaryIO,
    write: Callable[[str], object],
    defaults: dict[str, Any],
    advance: Callable[[], None],
    *,
    ascii_only: bool = False,
) -> int:
    """Runs every line of UTF-8; gives the number of lines that were refused or failed. With `ascii_only` results are spelled in
    characters that every encoding has.

    A line is an object with `prompt` (text or token ids) or `messages`, and any sampling parameters. A line that cannot be run gives
    {"error": …, "line": n}; the others run all the same.
    """
    failed = 0
    for line in ended_lines(llm, source, defaults):
        result = _result(llm.client, line)
        failed += "error" in result
        write(dumps(result, ascii_only=ascii_only) + "\n")
        advance()
    return failed


def ended_lines(
    llm: LLM, source: BinaryIO, defaults: dict[str, Any], *, first_line: int = 1, options: RequestOptions = NO_OPTIONS
) -> Iterator[Line]:
    """Lines from `first_line` on, in order, each when its request has ended or was refused; a few run ahead, so that batches
    stay full. The requests have no chunks."""
    client, pending, exhausted = llm.client, deque[Line](), False
    lines = _submitted(llm, source, defaults, first_line, options)
    capacity = LOOKAHEAD + 2 * llm.config.max_num_seqs
    while not exhausted or pending:
        while not exhausted and len(pending) < capacity:
            line = next(lines, None)
            exhausted = line is None
            if line is not None:
                pending.append(line)
        if client.has_unfinished:
            client.step()
        while pending and _is_done(client, pending[0]):
            yield pending.popleft()


def _submitted(
    llm: LLM, source: BinaryIO, defaults: dict[str, Any], first_line: int, options: RequestOptions
) -> Iterator[Line]:
    for number, raw in enumerate(iter(partial(source.readline, MAX_LINE_BYTES + 1), b""), start=1):
        if len(raw) > MAX_LINE_BYTES:
            yield Line(number, error=f"the line has more than {MAX_LINE_BYTES:,} bytes: nothing behind it is read")
            return
        if not raw.strip() or number < first_line:
            continue
        try:
            request = _read(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            yield Line(number, request_id=_submit(llm, request, defaults, options))
        except RecursionError:
            yield Line(number, error="the line is nested too deeply")
        except (PellucidError, ValueError, TypeError) as error:
            yield Line(number, error=str(error))


def _read(text: str) -> Any:
    try:
        request = json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads no integers of more than some thousand digits
        raise ValueError("the line holds a number of too many digits") from None
    check_values(request, "the line")
    return request


def _submit(llm: LLM, request: Any, defaults: dict[str, Any], options: RequestOptions) -> str:
    if not isinstance(request, dict):
        raise TypeError(f"a line must be a JSON object; it is a {type(request).__name__}")
    given = [key for key in _OWN_KEYS if key in request]
    if len(given) != 1:
        raise ValueError(f"a line needs one of prompt and messages; it has {' and '.join(given) or 'neither'}")
    own = {key: value for key, value in request.items() if key not in _OWN_KEYS}
    params = SamplingParams.from_dict({**defaults, **own})
    prompt = request.get("prompt")
    if "messages" in request:
        prompt = llm.get_tokenizer().encode_chat(request["messages"])
    elif not isinstance(prompt, (str, list)):
        raise TypeError(f"prompt is {shown(prompt)}; it must be a text or a list of token ids")
    return llm.client.submit(prompt, params, options=options, stream=False)


def _is_done(client: EngineClient, line: Line) -> bool:
    return line.request_id is None or client.is_finished(line.request_id)


def _result(client: EngineClient, line: Line) -> dict[str, Any]:
    """What is written for a line that is done."""
    if line.request_id is None:
        return {"error": line.error, "line": line.number}
    output = client.collect(line.request_id)
    client.release(line.request_id)
    if output is None:
        return {"error": "the request has no output", "line": line.number}
    result = dict(output)
    if len(output.outputs) > 1:
        result["choices"] = [
            {"index": c.index, "text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
            | ({} if c.logprobs is None else {"logprobs": _logprobs(c.logprobs)})
            for c in output.outputs
        ]
    choice = output.outputs[0]
    if choice.logprobs is not None:
        result["logprobs"] = _logprobs(choice.logprobs)
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    errors = [choice.error for choice in output.outputs if choice.error is not None]
    if errors:
        result |= {"error": errors[0], "line": line.number}
    return result


def _logprobs(rows: Sequence[Mapping[int, Logprob] | None]) -> list[dict[str, float] | None]:
    """By token id; null for a prompt's first token, which nothing stands before."""
    return [None if row is None else {str(token): entry.logprob for token, entry in row.items()} for row in rows]


def line_progress(path: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """(advance, done) of a progress bar on standard error, when that is a terminal."""
    if not sys.stderr.isatty() or path == "-":
        return (lambda: None), (lambda: None)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with open(path, "rb") as file:
        total = sum(1 for line in file if line.strip())
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("prompts", total=total)
    bar.start()
    return (lambda: bar.advance(task)), bar.stop

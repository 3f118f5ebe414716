"""`pellucid run`: prompts from a JSON-lines file, results as JSON lines in the same order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from pellucid.engine.client import EngineClient
from pellucid.entrypoints.llm import LLM
from pellucid.errors import PellucidError
from pellucid.outputs import RequestOutput
from pellucid.params import SamplingParams

# Lines read ahead of what runs: enough to keep the batch full, few enough to bound memory.
LOOKAHEAD = 4
_OWN_KEYS = ("prompt", "messages")


@dataclass
class Line:
    """One line of the input on its way: submitted, or refused."""

    number: int
    request_id: str | None = None
    error: str | None = None


def run_jsonl(llm: LLM, source: TextIO, target: TextIO, defaults: dict[str, Any], advance: Callable[[], None]) -> int:
    """Runs every line; gives the number of lines that were refused.

    A line is an object with `prompt` (text or token ids) or `messages`, and any sampling parameters. A line that cannot be run gives
    {"error": …, "line": n}; the others run all the same.
    """
    client, failed = llm.client, 0
    pending: list[Line] = []
    lines = _submitted(llm, source, defaults)
    capacity = LOOKAHEAD + 2 * llm.config.max_num_seqs
    exhausted = False
    while not exhausted or pending:
        while not exhausted and len(pending) < capacity:
            line = next(lines, None)
            exhausted = line is None
            if line is not None:
                pending.append(line)
        if client.has_unfinished:
            client.step()
        while pending and _is_done(client, pending[0]):
            line = pending.pop(0)
            failed += line.error is not None
            _write(target, client, line)
            advance()
    return failed


def _submitted(llm: LLM, source: TextIO, defaults: dict[str, Any]) -> Iterator[Line]:
    for number, text in enumerate(source, start=1):
        if not text.strip():
            continue
        try:
            yield Line(number, request_id=_submit(llm, json.loads(text), defaults))
        except RecursionError:
            yield Line(number, error="the line is nested too deeply")
        except (PellucidError, ValueError, TypeError) as error:
            yield Line(number, error=str(error))


def _submit(llm: LLM, request: Any, defaults: dict[str, Any]) -> str:
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
        raise TypeError(f"prompt is {prompt!r}; it must be a text or a list of token ids")
    return llm.client.submit(prompt, params)


def _is_done(client: EngineClient, line: Line) -> bool:
    return line.request_id is None or client.is_finished(line.request_id)


def _write(target: TextIO, client: EngineClient, line: Line) -> None:
    if line.request_id is None:
        result: dict[str, Any] = {"error": line.error, "line": line.number}
    else:
        output = client.collect(line.request_id)
        client.release(line.request_id)
        result = _result(output) if output is not None else {}
    target.write(json.dumps(result, ensure_ascii=False) + "\n")
    target.flush()


def _result(output: RequestOutput) -> dict[str, Any]:
    result = dict(output)
    if len(output.outputs) > 1:
        result["choices"] = [
            {"index": c.index, "text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
            for c in output.outputs
        ]
    choice = output.outputs[0]
    if choice.logprobs is not None:
        result["logprobs"] = [
            {str(token): entry.logprob for token, entry in position.items()} for position in choice.logprobs
        ]
    if choice.error is not None:
        result["error"] = choice.error
    return result


def line_progress(path: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """(advance, done) of a progress bar on standard error, when that is a terminal."""
    if not sys.stderr.isatty() or path == "-":
        return (lambda: None), (lambda: None)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with open(path, encoding="utf-8") as file:
        total = sum(1 for line in file if line.strip())
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("prompts", total=total)
    bar.start()
    return (lambda: bar.advance(task)), bar.stop

"""What an error or an output of a random request may be, and what is a fault."""

from __future__ import annotations

import math
import re
import traceback
from pathlib import Path
from typing import Any

import pellucid
from kit.calls import Call
from kit.findings import signature_of
from pellucid import errors
from pellucid.api.outputs import RequestOutput
from pellucid.api.sampling_params import SamplingParams

_PACKAGE = str(Path(pellucid.__file__).parent)
# What an engine says when there is no room: right for any request.
_OF_THE_ENGINE = (errors.QueueFullError, errors.EngineDrainingError)
# What methods call their inputs, where that is not `prompt`.
_POSITIONAL = {"encode": frozenset({"texts"}), "score": frozenset({"prompts", "continuations"})}
# A request that ends with an error must be told of itself, in its own terms.
_FOREIGN = ("the step failed", "rows[", "token_ids[")


def judge_error(call: Call, error: Exception) -> str | None:
    """The signature of a fault; None where the error is typed and names a field of the request."""
    if isinstance(error, errors.InvalidRequestError):
        return _judge_named(call, error)
    if isinstance(error, _OF_THE_ENGINE):
        return None
    if isinstance(error, errors.TokenizerError):
        return None if call.method == "chat" else f"{call.method}: {_told(error)}"
    if type(error) in (TypeError, ValueError) and _names_a_field(call, str(error)):
        return None
    return f"untyped error: {type(error).__name__} in {place_of(error)}"


def _judge_named(call: Call, error: errors.InvalidRequestError) -> str | None:
    if error.param is None:
        return f"an error names no field: {_told(error)}"
    root = re.split(r"[.\[]", error.param)[0]
    if root not in call.fields | _POSITIONAL.get(call.method, frozenset()):
        return f"an error names {error.param!r}, which was not given: {_told(error)}"
    return None if str(error).strip() else f"an error about {error.param!r} says nothing"


def _names_a_field(call: Call, text: str) -> bool:
    names = {name for name in call.fields | set(call.structure or ()) if len(name) > 1} | {"prompts", "continuations"}
    return any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)


def _told(error: BaseException) -> str:
    """Class, text and place, without what differs from case to case."""
    return f"{type(error).__name__} in {place_of(error)}: {signature_of(str(error))}"


def place_of(error: BaseException) -> str:
    """The innermost function of the package that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    return f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "no function of the package"


def judge_output(call: Call, params: Any, output: RequestOutput) -> tuple[str, str] | None:
    """(signature, detail) of a fault in what an accepted request brought."""
    if not isinstance(params, SamplingParams):
        allowed = (
            isinstance(params, (list, tuple))
            and all(one is None for one in params)  # each is then the default
            and call.method in ("generate", "generate_many", "chat")
        )
        return None if allowed else ("parameters of another type are accepted", str(call))
    for choice in output.outputs:
        if choice.finish_reason == "error":
            text = str(choice.error)
            if not text or any(part in text for part in _FOREIGN):
                return f"a request ended with another's error: {signature_of(text)}", text
            continue
        told = _judge_choice(params, choice.token_ids, choice.logprobs)
        if told is not None:
            return f"an output is wrong: {told}", f"choice {choice.index}: {choice}"
    return _judge_shape(call, params, output)


def _judge_choice(params: SamplingParams, token_ids: list[int], rows: object) -> str | None:
    if params.max_tokens is not None and len(token_ids) > params.max_tokens:
        return "more tokens than max_tokens"
    if params.allowed_token_ids is not None and params.structured_outputs is None:
        outside = set(token_ids) - set(params.allowed_token_ids)
        if any(token not in (1, 2) for token in outside):
            return "a token that is not among allowed_token_ids"
    if (params.logprobs is None) != (rows is None):
        return "logprobs are there or not, against what was asked"
    if isinstance(rows, list):
        if len(rows) != len(token_ids):
            return "as many logprobs as tokens"
        if not all(math.isfinite(entry.logprob) for row in rows for entry in row.values()):
            return "a log-probability that is not finite"
    return None


def _judge_shape(call: Call, params: SamplingParams, output: RequestOutput) -> tuple[str, str] | None:
    told = None
    rows, ends = output.prompt_logprobs, [choice.finish_reason for choice in output.outputs]
    if len(output.outputs) != params.n:
        told = "the number of choices is not n"
    elif params.prompt_logprobs is not None and "error" not in ends and "abort" not in ends:
        if rows is None or len(rows) != len(output.prompt_token_ids) or rows[0] is not None:
            told = "prompt_logprobs are not one row for each token of the prompt, None the first"
    elif params.prompt_logprobs is None and rows is not None:
        told = "prompt_logprobs that nobody asked for"
    return None if told is None else (f"an output is wrong: {told}", f"{ends} {rows!r:.200}\n{call}")

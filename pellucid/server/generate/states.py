"""Hidden states in a request and in an answer."""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.outputs import CompletionOutput, EngineCoreOutput
from pellucid.api.request_options import RequestOptions
from pellucid.errors import InvalidRequestError
from pellucid.json_text import encode
from pellucid.server.generate.protocol import RequestFields
from pellucid.server.http.settings import ServerSettings

F32 = npt.NDArray[np.float32]
Format = Literal["float", "base64"]
FORMATS: tuple[Format, ...] = ("float", "base64")
_PIECE = 3 << 16  # values; their bytes are a multiple of three, so that pieces in base64 join without padding


def wanted_options(request: RequestFields, settings: ServerSettings) -> RequestOptions:
    """What a request says beside its prompt and its sampling parameters.

    Raises:
        InvalidRequestError: naming the field; also where the server does not allow what it asks for.
    """
    for name, is_allowed in (("capture", settings.capture), ("steering", settings.steering)):
        if getattr(request, name) is not None and not is_allowed:
            raise InvalidRequestError(name, f": this server does not allow it (see its option --{name})")
    return RequestOptions(
        request.priority or 0,
        request.cache_salt,
        _hidden_states(request),
        CaptureParams.from_request(request.capture),
        SteeringParams.from_request(request.steering),
    )


def _hidden_states(request: RequestFields) -> HiddenStatesParams | None:
    flag = False if request.return_hidden_states is None else request.return_hidden_states
    streamed = False if request.hidden_states_stream is None else request.hidden_states_stream
    if request.hidden_states_format is not None and request.hidden_states_format not in FORMATS:
        raise InvalidRequestError(
            "hidden_states_format", "is", request.hidden_states_format, f"it must be one of: {', '.join(FORMATS)}"
        )
    found = HiddenStatesParams.from_request(
        flag, request.hidden_states_for_tokens, request.hidden_states_layers, streamed
    )
    if found is not None and found.stream and not request.stream:
        raise InvalidRequestError("hidden_states_stream", "is true, but stream is not")
    return found


def state_fields(source: CompletionOutput | EngineCoreOutput, request: RequestFields) -> dict[str, Any]:
    """`hidden_states` and what stands beside it, and `captured`; nothing of what there is not."""
    form: Format = "base64" if request.hidden_states_format == "base64" else "float"
    fields: dict[str, Any] = {}
    if source.hidden_states is not None:
        fields = encoded("hidden_states", source.hidden_states, form)
    if source.hidden_states_positions is not None:
        fields["hidden_states_positions"] = source.hidden_states_positions
    if source.captured is not None:
        fields["captured"] = {name: encoded("values", rows, form) for name, rows in source.captured.items()}
    return fields


def encoded(name: str, values: F32, form: Format) -> dict[str, Any]:
    """Lists of numbers that read back to the same bits, or little-endian float32 with shape and dtype beside it.

    Large ones take seconds. They are made piece by piece, so that other threads go on; on the event loop nothing else would.
    """
    if form == "float":
        return {name: msgspec.Raw(_numbers(values))}
    text = msgspec.Raw(b'"' + to_base64(values) + b'"')
    return {name: text, f"{name}_shape": list(values.shape), f"{name}_dtype": "float32"}


def to_base64(values: F32) -> bytes:
    """The bytes of little-endian float32."""
    flat = values.astype("<f4", copy=False).reshape(-1)
    pieces = range(0, len(flat), _PIECE)
    return b"".join([base64.b64encode(flat[begin : begin + _PIECE].tobytes()) for begin in pieces])


def _numbers(values: F32) -> bytes:
    inner = [encode(values.tolist())[1:-1]] if values.ndim == 1 else map(_numbers, values)
    return b"[" + b",".join(inner) + b"]"

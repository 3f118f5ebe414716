"""`RequestOptions`: what a request says beside its prompt and its sampling parameters. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.sampling_params import check_well_formed
from pellucid.errors import InvalidRequestError

MAX_CACHE_SALT_CHARACTERS = 512
MAX_REQUEST_ID_CHARACTERS = 512


@dataclass(frozen=True)
class RequestOptions:
    """A lower `priority` is served first. Requests share cached prompt blocks only where their `cache_salt` is the same."""

    priority: int = 0
    cache_salt: str | None = None
    hidden_states: HiddenStatesParams | None = None
    capture: CaptureParams | None = None
    steering: SteeringParams | None = None


NO_OPTIONS = RequestOptions()


def check_options(request_id: str | None, options: RequestOptions) -> None:
    """Checks what needs no model. An engine makes up an id where none is given.

    Raises:
        InvalidRequestError: naming the field, the value and the limit.
    """
    if not isinstance(options, RequestOptions):
        raise InvalidRequestError("options", f"is a {type(options).__name__}", limit="it must be RequestOptions")
    priority = options.priority
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise InvalidRequestError("priority", "is", priority, "it must be an integer of 32 bits")
    if options.cache_salt is not None:
        _check_name("cache_salt", options.cache_salt, MAX_CACHE_SALT_CHARACTERS)
    if request_id is not None:
        _check_name("request_id", request_id, MAX_REQUEST_ID_CHARACTERS)


def _check_name(name: str, value: object, limit: int) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        shown = f"has {len(value):,} characters" if isinstance(value, str) else f"is a {type(value).__name__}"
        raise InvalidRequestError(name, shown, limit=f"it must be a text of 1 to {limit} characters")
    check_well_formed(name, value)

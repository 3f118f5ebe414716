"""What the endpoints of one server share."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from starlette.requests import Request

from pellucid.engine.async_engine import AsyncLLMEngine
from pellucid.errors import EngineDrainingError, InvalidRequestError
from pellucid.params import SamplingParams, model_defaults
from pellucid.server.answers import Identity
from pellucid.server.errors import HttpError
from pellucid.server.generation import Generator
from pellucid.server.job import Job
from pellucid.server.logprobs import LogprobFormat
from pellucid.server.metrics import Metrics
from pellucid.server.prompts import Prompts
from pellucid.server.protocol_base import RequestFields
from pellucid.server.settings import ServerSettings
from pellucid.server.tracing import Tracing

MAX_CHOICES = 1024  # of one HTTP request


@dataclass
class ServerContext:
    """One server: its engine, its settings and what is derived from them."""

    engine: AsyncLLMEngine
    settings: ServerSettings
    draining: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.names = self.settings.served_model_name or (self.engine.model.name,)
        self.metrics = Metrics(self.names[0])
        self.tracing = Tracing(self.settings)
        self.generator = Generator(self.engine, self.metrics, self.settings.request_timeout)
        self.prompts = Prompts(self.engine.tokenizer)
        self.logprobs = LogprobFormat(self.engine.tokenizer)
        self.sampling_defaults = model_defaults(self.engine.model.default_sampling)

    def close(self) -> None:
        """Ends what the server itself runs; the engine is its owner's."""
        self.prompts.close()
        self.tracing.close()

    def check_model(self, name: str | None) -> None:
        """Raises HttpError 404 for a model that is not served; none named is the one that is."""
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise HttpError(
                404, f"model {name!r} is not served here; known: {known}", param="model", code="model_not_found"
            )

    def check_not_draining(self) -> None:
        """Raises EngineDrainingError once the server is going down."""
        if self.draining:
            raise EngineDrainingError("the server is shutting down and takes no new requests")

    def sampling_params(self, request: RequestFields) -> SamplingParams:
        """The request's own values, over the model's generation_config.json, over the neutral ones.

        Raises:
            InvalidRequestError: naming field, value and limit.
        """
        values = request.sampling_values()
        try:
            # None is "not given" for all but max_tokens, where it means as many as the model's length allows.
            return SamplingParams.with_defaults({**self.sampling_defaults, "max_tokens": None}, **values)
        except InvalidRequestError as error:
            raise InvalidRequestError(*_renamed(request, error)) from None

    def job(self, http: Request, request: RequestFields, prompts: list[list[int]], params: SamplingParams) -> Job:
        """A job under the name that was asked for, else one that carries the HTTP request's id.

        Raises:
            InvalidRequestError: a job of this name runs, or there would be too many choices.
        """
        if len(prompts) * params.n > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts):,} prompts of n {params.n} are {len(prompts) * params.n:,} choices; the limit is {MAX_CHOICES:,}",
                "n",
            )
        name = request.request_id
        if name is None:
            name = http.state.request_id if "x-request-id" not in http.headers else _unique(http.state.request_id)
        elif self.generator.is_running(name):
            raise InvalidRequestError(f"request_id {name!r} is in use", "request_id")
        return Job(name, prompts, params, request.priority or 0, request.cache_salt, bool(request.stream))

    def identity(self, prefix: str, request_id: str, model: str | None) -> Identity:
        """Of an answer."""
        fingerprint = f"fp_{self.engine.model.fingerprint[:12]}"
        return Identity(prefix, request_id, model or self.names[0], int(time.time()), fingerprint)


def _unique(request_id: str) -> str:
    """A client may send one X-Request-Id twice; the engine's names must differ."""
    return f"{request_id[:110]}-{uuid.uuid4().hex[:12]}"


# What a request calls a field that `SamplingParams` knows under another name.
_ALIASES = {"max_tokens": "max_completion_tokens", "logprobs": "top_logprobs"}


def _renamed(request: RequestFields, error: InvalidRequestError) -> tuple[str, str | None]:
    name, message = error.param, str(error)
    alias = _ALIASES.get(name or "")
    if name is not None and alias is not None and getattr(request, alias, None) is not None:
        return message.replace(name, alias, 1), alias
    return message, name

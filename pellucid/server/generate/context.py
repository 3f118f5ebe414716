"""What the endpoints of one server share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from pellucid.api.outputs import RequestOutput
from pellucid.api.sampling_params import SamplingParams, model_defaults
from pellucid.errors import EngineDrainingError, FieldName, InvalidRequestError
from pellucid.server.chat.preparing import Preparer
from pellucid.server.generate.answers import Identity
from pellucid.server.generate.generation import Generation, Generator
from pellucid.server.generate.job import CallStructure, Job
from pellucid.server.generate.logprobs import LogprobFormat
from pellucid.server.generate.prompts import Prompts
from pellucid.server.generate.protocol import RequestFields, Strict
from pellucid.server.generate.states import wanted_options
from pellucid.server.http.access import given_key
from pellucid.server.http.body import read_json
from pellucid.server.http.errors import HttpError
from pellucid.server.http.metrics import Metrics
from pellucid.server.http.settings import ServerSettings
from pellucid.server.http.sse import JsonResponse, unless_gone
from pellucid.server.http.tracing import Tracing
from pellucid.server.responses.store import Owner, ResponseStore
from pellucid.service.async_engine import AsyncLLMEngine

MAX_CHOICES = 1024  # of one HTTP request
_Model = TypeVar("_Model", bound=Strict)


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
        self.preparer = Preparer(self.prompts, self.settings, self.engine.model.model_type)
        self.logprobs = LogprobFormat(self.engine.tokenizer)
        self.responses = ResponseStore(self.settings.max_stored_responses, self.settings.max_stored_bytes)
        self.sampling_defaults = model_defaults(self.engine.model.generation_config)

    def close(self) -> None:
        """Ends what the server itself runs; the engine is its owner's."""
        self.prompts.close()
        self.tracing.close()

    async def read(self, http: Request, model: type[_Model]) -> _Model:
        """The body of a request, for a model that is served.

        Raises:
            EngineDrainingError, HttpError, InvalidRequestError: as `check_not_draining`, `read_json` and `check_model` do.
        """
        self.check_not_draining()
        request = await read_json(http, model, self.settings.max_body_bytes, self.settings.body_timeout)
        http.state.field_names = request.field_names
        self.check_model(getattr(request, "model", None))
        return request

    async def submit(self, http: Request, job: Job) -> Generation:
        """Queues a job. Compiling its structure may take long: a client that leaves meanwhile takes it out of the queue.

        Raises:
            InvalidRequestError, QueueFullError, EngineDrainingError, EngineDeadError: as the engine says.
            ClientLeftError: it left.
        """
        submitting = self.generator.submit(job)
        is_slow = job.params.structured_outputs is not None
        try:
            generation = await (unless_gone(http.receive, submitting) if is_slow else submitting)
        except InvalidRequestError as error:
            if job.calls is None:
                raise
            raise await self.prompts.run(job.calls.blamed, error, self.prompts.tokenizer) from None
        http.state.generation = generation
        return generation

    async def whole(self, http: Request, generation: Generation) -> list[RequestOutput]:
        """The outputs of a generation, which ends when the client leaves."""
        async with generation:
            return await unless_gone(http.receive, generation.wait())

    async def json(self, make: Callable[[], Any], *, is_slow: bool) -> JsonResponse:
        """The answer that `make` gives; on a thread where that, or its encoding, may take long."""
        if is_slow:
            return await self.prompts.run(lambda: JsonResponse(make()))
        return JsonResponse(make())

    def owner(self, http: Request) -> Owner:
        """Whose the request is: the key that it carries, where keys are needed."""
        return given_key(http.scope["headers"]) if self.settings.api_key else b""

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
        # None is "not given" for all but max_tokens, where it means as many as the model's length allows.
        return SamplingParams.with_defaults({**self.sampling_defaults, "max_tokens": None}, **values)

    def job(
        self,
        http: Request,
        request: RequestFields,
        prompts: list[list[int]],
        params: SamplingParams,
        calls: CallStructure | None = None,
    ) -> Job:
        """A job under the name that was asked for, else one that carries the HTTP request's id.

        Raises:
            InvalidRequestError: a job of this name runs, or there would be too many choices.
        """
        if len(prompts) * params.n > MAX_CHOICES:
            raise InvalidRequestError(
                "n",
                (
                    f"{len(prompts):,} prompts of ",
                    FieldName("n"),
                    f" {params.n} are {len(prompts) * params.n:,} choices",
                ),
                limit=f"the limit is {MAX_CHOICES:,}",
            )
        name = self.job_name(http, request.request_id)
        return Job(
            name,
            prompts,
            params,
            [wanted_options(request, self.settings)] * len(prompts),
            calls=calls,
            stream=bool(request.stream),
        )

    def job_name(self, http: Request, asked: str | None) -> str:
        """The name that was asked for, else one that carries the HTTP request's id.

        Raises:
            InvalidRequestError: a job of this name runs.
        """
        if asked is None:
            return http.state.request_id if "x-request-id" not in http.headers else _unique(http.state.request_id)
        if self.generator.is_running(asked):
            raise InvalidRequestError("request_id", f"{asked!r} is in use")
        return asked

    def identity(self, prefix: str, request_id: str, model: str | None) -> Identity:
        """Of an answer."""
        fingerprint = f"fp_{self.engine.model.contract.digest[:12]}"
        return Identity(prefix, request_id, model or self.names[0], int(time.time()), fingerprint)


def _unique(request_id: str) -> str:
    """A client may send one X-Request-Id twice; the engine's names must differ."""
    return f"{request_id[:110]}-{uuid.uuid4().hex[:12]}"

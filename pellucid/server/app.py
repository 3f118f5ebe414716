"""The application: which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pellucid.errors import InvalidRequestError, shown
from pellucid.server.anthropic.endpoints import MessagesEndpoints
from pellucid.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from pellucid.server.chat.answer import ChatAnswer
from pellucid.server.chat.protocol import ChatCompletionRequest
from pellucid.server.chat.turns import ToolUse, Turn, turn_of
from pellucid.server.completions.answer import CompletionAnswer
from pellucid.server.completions.protocol import CompletionRequest, check_ids
from pellucid.server.debug.live import live_view
from pellucid.server.debug.protocol import DetokenizeRequest, TokenizeRequest
from pellucid.server.embeddings import answer as embeddings
from pellucid.server.embeddings.protocol import EmbeddingRequest
from pellucid.server.generate.answers import stream_events
from pellucid.server.generate.context import ServerContext
from pellucid.server.generate.job import Job
from pellucid.server.generate.protocol import Strict
from pellucid.server.http import metrics
from pellucid.server.http.access import Access
from pellucid.server.http.errors import HttpError, plain_error, sanitised
from pellucid.server.http.gate import Gate
from pellucid.server.http.openapi import json_body, publish
from pellucid.server.http.page import Page
from pellucid.server.http.settings import ServerSettings
from pellucid.server.http.sse import EventStream, JsonResponse
from pellucid.server.responses.endpoints import ResponsesEndpoints
from pellucid.server.responses.protocol import ResponsesRequest
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.version import VERSION

MAX_STEPS = 4096
ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "msg_")
ANTHROPIC_HEADERS = ("x-api-key", "anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access")


def create_app(engine: AsyncLLMEngine, settings: ServerSettings) -> FastAPI:
    """The application over a running engine. `app.state.context` is its `ServerContext`."""
    context = ServerContext(engine, settings)
    app = FastAPI(title="Pellucid", version=VERSION, docs_url=None, redoc_url=None)
    app.state.context = context
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    endpoints = _Endpoints(context)
    endpoints.add_to(app)
    page = Page() if settings.page else None
    if page is not None:
        page.add_to(app)
    app.add_middleware(
        Gate,
        access=Access(settings, page.paths if page else ()),
        metrics=context.metrics,
        tracing=context.tracing,
        log_requests=settings.log_requests,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id", *ANTHROPIC_HEADERS],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    publish(app, [model for _, _, model in endpoints.bodies])
    return app


async def _query_error(_: Request, error: Exception) -> Response:
    """A value of the query or the path, in our shape."""
    found: Any = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": ("",), "msg": "failed"}
    name, text = str(found["loc"][-1]), str(found["msg"])
    raise InvalidRequestError(name, f"is {shown(found.get('input'))}: {text[:1].lower()}{text[1:]}")


async def _routing_error(_: Request, error: Exception) -> Response:
    """Unknown paths and methods, in our shape: the gate writes it."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "failed"
    raise plain_error(status, f"{detail}: see /openapi.json for the paths that there are")


class _Endpoints:
    """One method a path."""

    def __init__(self, context: ServerContext) -> None:
        self._context, self._engine = context, context.engine
        self._responses, self._messages = ResponsesEndpoints(context), MessagesEndpoints(context)

    @property
    def bodies(self) -> list[tuple[str, Callable[[Request], Awaitable[Response]], type[Strict]]]:
        """(path, endpoint, model of its body)"""
        return [
            ("/v1/chat/completions", self.chat_completions, ChatCompletionRequest),
            ("/v1/completions", self.completions, CompletionRequest),
            ("/v1/embeddings", self.embeddings, EmbeddingRequest),
            ("/v1/responses", self._responses.create_response, ResponsesRequest),
            ("/v1/messages", self._messages.create_message, MessagesRequest),
            ("/v1/messages/count_tokens", self._messages.count_tokens, CountTokensRequest),
            ("/tokenize", self.tokenize, TokenizeRequest),
            ("/detokenize", self.detokenize, DetokenizeRequest),
        ]

    def add_to(self, app: FastAPI) -> None:
        """Registers every path."""
        for path, endpoint, model in self.bodies:
            app.post(path, openapi_extra=json_body(model))(endpoint)
        app.post("/v1/requests/{request_id}/cancel")(self.cancel)
        app.post("/debug/reset_prefix_cache")(self.reset_prefix_cache)
        app.delete("/v1/responses/{response_id}")(self._responses.delete_response)
        for path, answer in (
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/v1/responses/{response_id}", self._responses.retrieve_response),
            ("/v1/responses/{response_id}/input_items", self._responses.input_items),
            ("/health", self.health),
            ("/version", self.version),
            ("/metrics", self.metrics),
            ("/debug/kv_cache_stats", self.kv_cache_stats),
            ("/debug/steps", self.steps),
            ("/debug/live", self.live),
        ):
            app.get(path)(answer)

    # ---- generating -------------------------------------------------------------------------------------------------

    async def chat_completions(self, http: Request) -> Response:
        """Answers a conversation."""
        context = self._context
        request = await self._context.read(http, ChatCompletionRequest)
        prepared = await context.preparer.prepare(turn_of(request), context.sampling_params(request))
        prompt, params = prepared.prompt_token_ids, prepared.params
        job = context.job(http, request, [prompt], params, prepared.calls)
        identity = context.identity("chatcmpl", job.request_id, request.model)
        reader = prepared.style.reader()
        answer = ChatAnswer(request, identity, prompt, params.n, context.logprobs, reader, prepared.begun)
        generation = await self._context.submit(http, job)
        if request.stream:
            return EventStream(stream_events(generation, answer, request, context.prompts), generation)
        outputs = await self._context.whole(http, generation)
        is_slow = job.wants_states or not prepared.style.is_plain
        return await context.json(partial(answer.whole, outputs, generation.usage), is_slow=is_slow)

    async def completions(self, http: Request) -> Response:
        """Continues one prompt or several."""
        context = self._context
        request = await self._context.read(http, CompletionRequest)
        params = context.sampling_params(request)
        prompts, texts = await self._prompts(request)
        job = context.job(http, request, prompts, params)
        identity = context.identity("cmpl", job.request_id, request.model)
        answer = CompletionAnswer(request, identity, prompts, params.n, context.logprobs, texts)
        generation = await self._context.submit(http, job)
        if request.stream:
            return EventStream(stream_events(generation, answer, request, context.prompts), generation)
        outputs = await self._context.whole(http, generation)
        return await context.json(partial(answer.whole, outputs, generation.usage), is_slow=job.wants_states)

    async def embeddings(self, http: Request) -> Response:
        """A vector for each input."""
        context = self._context
        request = await context.read(http, EmbeddingRequest)
        special = True if request.add_special_tokens is None else request.add_special_tokens
        prompts = [
            prompt if isinstance(prompt, list) else await context.prompts.encode(prompt, add_special_tokens=special)
            for prompt in request.prompts()
        ]
        options = embeddings.wanted_options(request, prompts, self._engine.model.hidden_size)
        name = context.job_name(http, request.request_id)
        job = Job(name, prompts, embeddings.ONE_TOKEN, options, stream=False)
        generation = await context.submit(http, job)
        outputs = await context.whole(http, generation)
        made = partial(embeddings.answer, request, request.model or context.names[0], outputs, generation.usage)
        return await context.json(made, is_slow=True)

    async def _prompts(self, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """(ids of each prompt, its text where it is echoed)"""
        prompts, ids, texts = self._context.prompts, list[list[int]](), list[str]()
        special = True if request.add_special_tokens is None else request.add_special_tokens
        skip = True if request.skip_special_tokens is None else request.skip_special_tokens
        for prompt in request.prompts():
            if isinstance(prompt, str):
                ids.append(await prompts.encode(prompt, add_special_tokens=special))
                texts.append(prompt)
                continue
            ids.append(prompt)
            texts.append(await prompts.decode(prompt, skip_special_tokens=skip) if request.echo else "")
        return ids, texts

    async def cancel(self, request_id: str) -> Response:
        """Ends a request; whoever reads it gets what there is. The id is the answer's, with or without its prefix; a request's own name
        may begin like one."""
        names = [request_id, *(request_id.removeprefix(one) for one in ID_PREFIXES if request_id.startswith(one))]
        for name in names:
            if await self._context.generator.cancel(name):
                return JsonResponse({"request_id": name, "cancelled": True})
        raise HttpError(404, f"request {request_id[:128]!r} is unknown", param="request_id", code="request_not_found")

    # ---- tokens -----------------------------------------------------------------------------------------------------

    async def tokenize(self, http: Request) -> Response:
        """The ids of a text or of a conversation."""
        request = await self._context.read(http, TokenizeRequest)
        prompts = self._context.prompts
        if request.prompt is not None:
            special = True if request.add_special_tokens is None else request.add_special_tokens
            ids = await prompts.encode(request.prompt, add_special_tokens=special)
        else:
            ids = await self._context.preparer.encode(
                Turn(
                    request.messages or [],
                    ToolUse([tool.to_template() for tool in request.tools or ()]),
                    request.add_generation_prompt,
                    request.continue_final_message,
                    request.add_special_tokens,
                    request.chat_template_kwargs or {},
                )
            )
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": self._engine.model.max_model_len, "tokens": ids}
        if request.return_token_strs:
            answer["token_strs"] = [prompts.tokenizer.raw_token(token) or "" for token in ids]
        return JsonResponse(answer)

    async def detokenize(self, http: Request) -> Response:
        """The text of ids."""
        request = await self._context.read(http, DetokenizeRequest)
        tokens = check_ids(request.tokens, "tokens") if isinstance(request.tokens, list) else None
        if tokens is None:
            raise HttpError(400, "tokens must be a list of token ids", param="tokens")
        text = await self._context.prompts.decode(tokens, skip_special_tokens=bool(request.skip_special_tokens))
        return JsonResponse({"prompt": text})

    # ---- about the server -------------------------------------------------------------------------------------------

    async def models(self) -> Response:
        """The model, under each of its names."""
        return JsonResponse({"object": "list", "data": [self._model_card(name) for name in self._context.names]})

    async def model(self, name: str) -> Response:
        """One model."""
        self._context.check_model(name)
        return JsonResponse(self._model_card(name))

    async def health(self) -> Response:
        """200 while requests are taken; else 503 and why."""
        error = self._engine.error
        if not self._engine.is_alive:
            reason = "the engine is dead" if error is None else f"the engine is dead: {sanitised(str(error))}"
            return JsonResponse({"status": "dead", "reason": reason}, 503)
        if self._context.draining:
            return JsonResponse({"status": "draining", "reason": "the server is shutting down"}, 503)
        return JsonResponse({"status": "ok"})

    async def version(self) -> Response:
        """Of Pellucid."""
        return JsonResponse({"version": VERSION})

    async def metrics(self) -> Response:
        """In Prometheus' text format."""
        stats = await self._engine.stats() if self._engine.is_alive else None
        return Response(self._context.metrics.render(stats), media_type=metrics.CONTENT_TYPE)

    async def kv_cache_stats(self) -> Response:
        """Blocks in use and free, and what the prefix cache saved."""
        return JsonResponse((await self._engine.stats()).kv_cache)

    async def reset_prefix_cache(self) -> Response:
        """Forgets all cached blocks; 409 while requests hold blocks."""
        if not await self._engine.reset_prefix_cache():
            message = "requests hold blocks of the KV cache: ask again when /debug/kv_cache_stats says used_blocks 0"
            raise HttpError(409, message, code="blocks_in_use")
        return JsonResponse({"reset": True})

    async def steps(
        self, since: int = Query(0, ge=0, le=2**62), limit: int = Query(256, ge=1, le=MAX_STEPS)
    ) -> Response:
        """Records of scheduler steps from number `since` on, the oldest first."""
        records = await self._engine.steps(since, limit)
        following = records[-1].step + 1 if records else since
        return JsonResponse({"steps": records, "next": following})

    async def live(self, since: int | None = Query(None, ge=0, le=2**62)) -> Response:
        """What the page draws: figures, the queue, and steps from number `since` on, or the newest where it is not given."""
        return JsonResponse(await live_view(self._context, since))

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _model_card(self, name: str) -> dict[str, Any]:
        model = self._engine.model
        return {
            "id": name,
            "object": "model",
            "created": self._engine.created,
            "owned_by": "pellucid",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
        }

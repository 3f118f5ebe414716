"""One load against a server: what is asked, a request that tries it, warm-ups, the run, and the report."""

from __future__ import annotations

import asyncio
import datetime
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.bench import serve_dataset as dataset
from pellucid.bench.serve_client import CHAT, COMPLETIONS, Answer, OpenAIClient, ServerError
from pellucid.bench.serve_dataset import LoadRequest
from pellucid.bench.serve_load import LoadRun, run_load
from pellucid.bench.serve_metrics import Timing, metrics, timing_of
from pellucid.bench.serve_options import ServeOptions
from pellucid.errors import InvalidRequestError, about
from pellucid.json_text import well_formed
from pellucid.text.tokenizer import Tokenizer

# Where neither a tokenizer nor the server tells the size of the vocabulary: few models have less.
_DEFAULT_VOCAB = 4_096
_WARM_UP_SEED = 1_000_003  # added, so that no warm-up prompt is a counted one, which a prefix cache would then know
_REFUSALS = (400, 422)

Note = Callable[[str], None]


@dataclass
class ServeResult:
    """What a load came to, and what it was made of."""

    report: dict[str, Any]
    run: LoadRun
    requests: list[LoadRequest]
    timings: dict[int, Timing]

    def detailed(self) -> dict[str, Any]:
        """The report with every request's own figures, in the order in which they were to be sent. Seconds."""
        numbers = sorted(self.run.answers)
        answers = [self.run.answers[number] for number in numbers]
        timings = [self.timings.get(number) for number in numbers]
        return self.report | {
            "input_lens": [t.prompt_tokens if t else 0 for t in timings],
            "output_lens": [t.output_tokens if t else 0 for t in timings],
            "start_times": [a.started - self.run.began for a in answers],
            "ttfts": [t.ttft if t else 0.0 for t in timings],
            "itls": [t.itl if t else [] for t in timings],
            "e2els": [t.e2el if t else 0.0 for t in timings],
            "chunks": [len(a.chunk_times) for a in answers],
            "generated_texts": [a.text for a in answers],
            "errors": [a.error for a in answers],
        }


def load_tokenizer(name: str) -> Tokenizer:
    """Of a folder, a GGUF file, or a model that `pellucid pull` knows.

    Raises:
        ModelNotFoundError: there is none.
        TokenizerError: it has no tokenizer that can be used.
    """
    from pellucid.weights.gguf import open_gguf
    from pellucid.weights.hub import resolve_model

    path = resolve_model(name)
    if path.suffix != ".gguf":
        return Tokenizer.from_directory(path if path.is_dir() else path.parent)
    with about(path.name):
        return Tokenizer.from_gguf(open_gguf(path).metadata)


class _Bench:
    """The steps of one load, on one client."""

    def __init__(self, options: ServeOptions, client: OpenAIClient, note: Note) -> None:
        self.options, self.client, self.note = options, client, note
        self.model = options.model or ""
        self.entry: dict[str, Any] = {}  # the server's own description of the model
        self.tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None

    async def find_model(self) -> None:
        """The model that was named, else the server's first; its entry where the server lists it."""
        try:
            entries = await self.client.models()
        except ServerError:
            if not self.model:
                raise
            return
        self.entry = next((entry for entry in entries if entry["id"] == self.model), entries[0])
        self.model = self.model or entries[0]["id"]

    def vocab_size(self) -> int:
        """From the options, the tokenizer, or what servers tell of a model."""
        meta = self.entry.get("meta")
        told = [
            self.options.random_vocab_size,
            self.tokenizer.vocab_size if self.tokenizer else None,
            self.entry.get("vocab_size"),
            meta.get("n_vocab") if isinstance(meta, dict) else None,
        ]
        return next((size for size in told if isinstance(size, int)), _DEFAULT_VOCAB)

    def drawn(self, pool: Sequence[int], count: int, seed: int) -> list[LoadRequest]:
        """Requests of the data set whose prompts are token ids."""
        o = self.options
        if o.dataset_name == "random":
            return dataset.random_requests(
                pool,
                count,
                input_len=o.random_input_len,
                output_len=o.random_output_len,
                range_ratio=o.random_range_ratio,
                prefix_len=o.random_prefix_len,
                seed=seed,
            )
        return dataset.prefix_requests(
            pool,
            count,
            prefix_len=o.prefix_repetition_prefix_len,
            suffix_len=o.prefix_repetition_suffix_len,
            num_prefixes=min(o.prefix_repetition_num_prefixes, count),
            output_len=o.prefix_repetition_output_len,
            seed=seed,
        )

    async def requests(self) -> tuple[list[LoadRequest], list[LoadRequest]]:
        """(warm-ups, counted), in a form that the server takes: a first request has tried it."""
        o = self.options
        if o.dataset_path is not None:
            made = dataset.custom_requests(
                o.dataset_path, o.num_prompts, output_len=o.custom_output_len, is_chat=o.is_chat
            )
            why = await self.refusal(made[0])
            if why:
                raise ServerError(f"the first request failed: {why}")
            return [made[i % len(made)] for i in range(o.num_warmups)], made
        if o.dataset_name == "prefix_repetition" and o.num_prompts < o.prefix_repetition_num_prefixes:
            raise InvalidRequestError(
                None,
                f"num_prompts is {o.num_prompts}",
                limit=f"prefix_repetition_num_prefixes is {o.prefix_repetition_num_prefixes}",
            )
        pool = dataset.id_pool(self.vocab_size())
        trial = self.drawn(pool, 1 + o.num_warmups, o.seed + _WARM_UP_SEED)
        why = "" if o.is_chat else await self.refusal(trial[0])
        if o.is_chat or why:
            return await self.text_requests(why)
        return trial[1:], self.drawn(pool, o.num_prompts, o.seed)

    async def text_requests(self, why: str) -> tuple[list[LoadRequest], list[LoadRequest]]:
        """As `requests`, for a server that takes no ids."""
        o = self.options
        if self.tokenizer is None:
            needs = "a chat takes text" if o.is_chat else f"the server refused token ids ({why})"
            raise InvalidRequestError("tokenizer", (f"{needs}: --tokenizer makes texts of exact lengths",))
        pool = dataset.word_pool(self.tokenizer)
        made = self.drawn(pool, 1 + o.num_warmups, o.seed + _WARM_UP_SEED)
        trial = dataset.as_texts(made, self.tokenizer, pool)
        text_why = await self.refusal(trial[0])
        if text_why:
            raise ServerError(f"the first request failed: {text_why}")
        if why:
            self.note(f"the server refused token ids ({why}): prompts are texts")
        counted = dataset.as_texts(self.drawn(pool, o.num_prompts, o.seed), self.tokenizer, pool)
        return trial[1:], counted

    async def refusal(self, request: LoadRequest) -> str:
        """Empty when the server answers a short request of this kind; why, when it refuses it.

        Raises:
            ServerError: it fails in another way than that it refuses the request.
        """
        answer = await self.ask(LoadRequest(request.prompt, request.prompt_tokens, 1))
        if answer.error and answer.status not in _REFUSALS:
            raise ServerError(f"the first request failed: {answer.error}")
        return answer.error

    async def ask(self, request: LoadRequest) -> Answer:
        """Sends one request."""
        o = self.options
        payload: dict[str, Any] = {"model": self.model, "temperature": o.temperature}
        payload |= dataset.payload_of(request, o.is_chat)
        if o.ignore_eos:
            payload["ignore_eos"] = True
        return await self.client.stream(CHAT if o.is_chat else COMPLETIONS, payload | o.extra, o.endpoint)


async def run_bench(
    options: ServeOptions,
    *,
    note: Note = lambda text: None,
    on_start: Callable[[int], None] = lambda count: None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    stop: asyncio.Event | None = None,
) -> ServeResult:
    """Tries the server, warms it up, and plays the load; `stop` ends it early with what it has.

    Raises:
        InvalidRequestError: the options ask for what cannot be made.
        ServerError: the server does not answer a first request.
    """
    client = OpenAIClient(options.url, options.api_key, options.request_timeout)
    try:
        bench = _Bench(options, client, note)
        await bench.find_model()
        warm_ups, requests = await bench.requests()
        if warm_ups:
            note(f"warming up with {len(warm_ups)} requests")
            await run_load(
                lambda number: bench.ask(warm_ups[number]),
                [0.0] * len(warm_ups),
                max_concurrency=options.max_concurrency,
                stop=stop,
            )
        on_start(len(requests))
        run = await run_load(
            lambda number: bench.ask(requests[number]),
            options.arrivals.times(len(requests)),
            max_concurrency=options.max_concurrency,
            on_answer=on_answer,
            stop=stop,
        )
    finally:
        await client.close()
    return _result(bench, run, requests)


def _result(bench: _Bench, run: LoadRun, requests: list[LoadRequest]) -> ServeResult:
    options, tokenizer = bench.options, bench.tokenizer
    count = None if tokenizer is None else lambda text: len(tokenizer.encode(well_formed(text), False))
    timings = {
        number: timing_of(answer, requests[number].prompt_tokens, count)
        for number, answer in run.answers.items()
        if not answer.error
    }
    report = _head(bench, requests) | metrics(
        run, timings, percentiles=options.percentiles, selected=options.metrics, limits=options.limits
    )
    report["was_interrupted"] = run.was_interrupted
    report["failures"] = dict(Counter(a.error for a in run.answers.values() if a.error).most_common(10))
    report["protocol_problems"] = dict(Counter(p for a in run.answers.values() for p in a.problems).most_common(10))
    return ServeResult(report, run, requests, timings)


def _form(request: LoadRequest, is_chat: bool) -> str:
    return "messages" if is_chat else "text" if isinstance(request.prompt, str) else "token ids"


def _rate(value: float) -> float | str:
    """A number of the options, which may be infinite: JSON has no such numbers."""
    return value if math.isfinite(value) else "inf"


def _head(bench: _Bench, requests: list[LoadRequest]) -> dict[str, Any]:
    o = bench.options
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": o.backend,
        "backend": o.backend,
        "base_url": o.url,
        "model_id": bench.model,
        "tokenizer_id": o.tokenizer,
        "dataset_name": o.dataset_name,
        "prompt_form": _form(requests[0], o.is_chat),
        "num_prompts": len(requests),
        "request_rate": _rate(o.request_rate),
        "burstiness": _rate(o.burstiness),
        "ramp_up_strategy": o.ramp_up_strategy,
        "ramp_up_start_rps": o.ramp_up_start_rps,
        "ramp_up_end_rps": o.ramp_up_end_rps,
        "max_concurrency": o.max_concurrency,
        "temperature": o.temperature,
        "ignore_eos": o.ignore_eos,
        "seed": o.seed,
    }

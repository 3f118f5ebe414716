"""The options of `pellucid bench serve`, one field each: name, default and help stand here alone. Names are vLLM's where it has them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.errors import InvalidRequestError
from pellucid.json_text import loads

if TYPE_CHECKING:
    from pellucid.bench.serve_load import Arrivals

BACKENDS = ("openai", "openai-chat")
DATASETS = ("random", "custom", "prefix_repetition")
_API_KEY_VARIABLE = "OPENAI_API_KEY"
API_KEY_HELP = f"By default the variable {_API_KEY_VARIABLE}."
_SERVER, _LOAD, _DATA, _RESULT = "Server", "Load", "Data set", "Result"
_LEAST = {"num_prompts": 1, "max_concurrency": 1, "num_warmups": 0, "custom_output_len": 1}


def _option(default: Any, panel: str, text: str) -> Any:
    return field(default=default, metadata={"help": text, "panel": panel})


@dataclass(frozen=True)
class ServeOptions:
    """Lengths in tokens, times in seconds unless a name says milliseconds.

    Raises:
        InvalidRequestError: an option is out of range or does not fit the others.
    """

    backend: str = _option("openai", _SERVER, "openai (completions) or openai-chat.")
    base_url: str | None = _option(None, _SERVER, "Where the server is; over host and port.")
    host: str = _option("127.0.0.1", _SERVER, "Of the server.")
    port: int = _option(8000, _SERVER, "Of the server.")
    endpoint: str | None = _option(None, _SERVER, "Path of requests; the backend's own by default.")
    model: str | None = _option(None, _SERVER, "Name to ask for; the server's first by default.")
    api_key: str | None = _option(None, _SERVER, API_KEY_HELP)
    request_timeout: float = _option(600.0, _SERVER, "Seconds for one request.")

    dataset_name: str = _option("random", _DATA, "random, custom or prefix_repetition.")
    dataset_path: Path | None = _option(None, _DATA, "JSON lines: prompt or messages, output_tokens.")  # noqa: RUF009
    num_prompts: int = _option(1000, _DATA, "Requests.")
    tokenizer: str | None = _option(None, _DATA, "Model whose tokenizer makes texts, for servers that take no ids.")
    seed: int = _option(0, _DATA, "Of prompts and arrivals: the same seed is the same load.")
    random_input_len: int = _option(1024, _DATA, "Tokens of a prompt.")
    random_output_len: int = _option(128, _DATA, "Tokens asked for.")
    random_range_ratio: float = _option(0.0, _DATA, "Lengths lie between 1 - this and 1 + this of those given.")
    random_prefix_len: int = _option(0, _DATA, "Tokens before each prompt that all share.")
    random_vocab_size: int | None = _option(None, _DATA, "Ids are drawn below it; the tokenizer's or server's own.")
    prefix_repetition_prefix_len: int = _option(256, _DATA, "Tokens of a common beginning.")
    prefix_repetition_suffix_len: int = _option(256, _DATA, "Tokens of a prompt's own end.")
    prefix_repetition_num_prefixes: int = _option(10, _DATA, "Common beginnings.")
    prefix_repetition_output_len: int = _option(128, _DATA, "Tokens asked for.")
    custom_output_len: int = _option(256, _DATA, "Tokens asked for where a line has no output_tokens.")

    request_rate: float = _option(math.inf, _LOAD, "Requests a second; inf sends all at once.")
    burstiness: float = _option(1.0, _LOAD, "Shape of the gaps: 1 Poisson, below it burstier, inf even.")
    ramp_up_strategy: str | None = _option(None, _LOAD, "linear or exponential.")
    ramp_up_start_rps: float | None = _option(None, _LOAD, "Requests a second at first.")
    ramp_up_end_rps: float | None = _option(None, _LOAD, "Requests a second at last.")
    max_concurrency: int | None = _option(None, _LOAD, "Most requests that are open at once.")
    num_warmups: int = _option(0, _LOAD, "Requests before the load, not counted.")
    temperature: float = _option(0.0, _LOAD, "0 is greedy.")
    ignore_eos: bool = _option(False, _LOAD, "Ask for all tokens, whatever the model says.")
    extra_body: str | None = _option(None, _LOAD, "JSON object that is added to each request.")

    goodput: tuple[str, ...] = _option((), _RESULT, "KEY:MILLISECONDS pairs of ttft, tpot, e2el.")
    percentile_metrics: str = _option("ttft,tpot,itl,e2el", _RESULT, "Metrics to describe.")
    metric_percentiles: str = _option("99", _RESULT, "Percentiles, as 50,90,99.")

    def __post_init__(self) -> None:
        one_of("backend", self.backend, BACKENDS)
        one_of("dataset_name", self.dataset_name, DATASETS)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidRequestError(name, f"is {value}", limit=f"it must be at least {least}")
        if not 0 < self.request_timeout < math.inf:
            raise InvalidRequestError(None, f"request_timeout is {self.request_timeout}", limit="it must be above 0")
        if not 0 <= self.temperature < math.inf:
            raise InvalidRequestError("temperature", f"is {self.temperature}", limit="it must be at least 0")
        if (self.dataset_path is None) == (self.dataset_name == "custom"):
            raise InvalidRequestError("dataset_path", "is for --dataset-name custom, and needed there")
        # Read here, so that what is wrong is refused before anything runs.
        _ = self.arrivals, self.limits, self.percentiles, self.metrics, self.extra

    @property
    def url(self) -> str:
        """The server's address."""
        return self.base_url or f"http://{self.host}:{self.port}"

    @property
    def is_chat(self) -> bool:
        return self.backend == "openai-chat"

    @cached_property
    def arrivals(self) -> Arrivals:
        """When requests are sent."""
        from pellucid.bench.serve_load import Arrivals

        return Arrivals(
            request_rate=self.request_rate,
            burstiness=self.burstiness,
            ramp_up_strategy=self.ramp_up_strategy,
            ramp_up_start_rps=self.ramp_up_start_rps,
            ramp_up_end_rps=self.ramp_up_end_rps,
            seed=self.seed,
        )

    @cached_property
    def limits(self) -> dict[str, float]:
        """Milliseconds of a good request, by metric."""
        from pellucid.bench.serve_metrics import goodput_limits

        return goodput_limits(self.goodput)

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that are described."""
        from pellucid.bench.serve_metrics import METRICS

        names = [name.strip() for name in self.percentile_metrics.split(",")]
        for name in names:
            one_of("percentile_metrics", name, METRICS)
        return names

    @cached_property
    def percentiles(self) -> list[float]:
        """Percents, 0..100."""
        found = []
        for text in self.metric_percentiles.split(","):
            try:
                found.append(float(text))
            except ValueError:
                found.append(math.nan)
            if not 0 <= found[-1] <= 100:
                raise InvalidRequestError(
                    None, f"metric_percentiles has {text!r}", limit="it takes numbers from 0 to 100, as 50,99"
                )
        return found

    @cached_property
    def extra(self) -> dict[str, Any]:
        """`extra_body`, read."""
        try:
            found = loads(self.extra_body) if self.extra_body else {}
        except ValueError as error:
            raise InvalidRequestError("extra_body", f"is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise InvalidRequestError("extra_body", "is no JSON object")
        return found


def api_key_of(given: str | None) -> str | None:
    """The key that was given, else the environment's."""
    return given or os.environ.get(_API_KEY_VARIABLE) or None


def one_of(name: str, value: str, allowed: Any) -> None:
    """Raises InvalidRequestError for a value that is none of those."""
    if value not in allowed:
        raise InvalidRequestError(name, f"has {value!r}", limit=f"it takes {', '.join(allowed)}")

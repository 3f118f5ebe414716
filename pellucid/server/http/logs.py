"""Log lines: one each, with the request's id; plain or as JSON objects."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

from pellucid.api.outputs import RequestOutput
from pellucid.json_text import dumps
from pellucid.server.generate.job import Job
from pellucid.server.http.settings import ServerSettings

generation_logger = logging.getLogger("pellucid.requests")
access_logger = logging.getLogger("pellucid.access")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Keys that a record may carry besides its message.
FIELDS = (
    *("request_id", "method", "path", "status", "seconds", "client"),
    *("prompt_tokens", "completion_tokens", "reasons", "queue_seconds", "first_token_seconds"),
)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry: dict[str, object] = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return dumps(entry, ascii_only=True)


def set_up_logging(settings: ServerSettings) -> None:
    """Sends the server's and uvicorn's lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_json else logging.Formatter(_FORMAT))
    for name, threshold in (
        ("pellucid", settings.log_threshold),
        ("uvicorn", max(settings.log_threshold, logging.WARNING)),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(threshold)
    generation_logger.disabled = not settings.log_requests


def log_access(fields: dict[str, object]) -> None:
    """A line for one answer; `fields` are keys of `FIELDS`."""
    text = "%(method)s %(path)s %(status)s %(seconds).3fs id=%(request_id)s client=%(client)s"
    access_logger.info(text, fields, extra=fields)


def generation_fields(job: Job, outputs: Sequence[RequestOutput]) -> dict[str, object]:
    """What is told of one job that ended; without outputs it was left before its end."""
    fields: dict[str, object] = {
        "request_id": job.request_id,
        "prompt_tokens": sum(map(len, job.prompts)),
        "seconds": time.perf_counter() - job.arrived,
        "completion_tokens": sum(output.usage["completion_tokens"] for output in outputs),
        "reasons": ",".join(str(choice.finish_reason) for output in outputs for choice in output.outputs) or "abort",
    }
    metrics = outputs[0].metrics if outputs else None
    fields["queue_seconds"] = metrics.queue_time if metrics else None
    fields["first_token_seconds"] = metrics.time_to_first_token if metrics else None
    return fields


def log_generation(fields: dict[str, object]) -> None:
    """A line for one job that ended; `fields` as `generation_fields` gives them."""
    generation_logger.info(
        "ended: %(prompt_tokens)d prompt tokens, %(completion_tokens)d made, %(reasons)s, %(seconds).3fs id=%(request_id)s",
        fields,
        extra=fields,
    )

"""`EngineClient`: submit, step, collect, cancel. What the offline API and servers are built on."""

from __future__ import annotations

from collections import OrderedDict

from pellucid.engine.admission import Prompt
from pellucid.engine.engine import LLMEngine, StepOutputs
from pellucid.options import NO_OPTIONS, RequestOptions
from pellucid.outputs import RequestOutput
from pellucid.params import SamplingParams

# Outputs of ended requests that nobody collected are kept up to this many, the oldest dropped first.
MAX_UNCOLLECTED = 10_000


class EngineClient:
    """Drives an engine inline and keeps what has ended until it is collected."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._finished: OrderedDict[str, RequestOutput] = OrderedDict()
        self._history: dict[str, list[str]] = {}

    def submit(
        self,
        inputs: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions = NO_OPTIONS,
        stream: bool = True,
    ) -> str:
        """Queues one request and gives its id. Without `stream` it has no chunks. Raises as `LLMEngine.add_request` does."""
        request_id = self.engine.add_request(inputs, params, request_id=request_id, options=options, stream=stream)
        self._finished.pop(request_id, None)
        self._history[request_id] = ["waiting"]
        return request_id

    def step(self) -> list[RequestOutput]:
        """Runs one step; gives the requests that ended in it."""
        return self.step_outputs().finished

    def step_outputs(self) -> StepOutputs:
        """Runs one step; gives its chunks as well."""
        outputs = self.engine.step()
        for state in self.engine.output.take_moved():
            self._note(state.request_id, state.status)
        for output in outputs.finished:
            self._note(output.request_id, output.status)
            self._finished[output.request_id] = output
        while len(self._finished) > MAX_UNCOLLECTED:
            dropped, _ = self._finished.popitem(last=False)
            self._history.pop(dropped, None)
        return outputs

    def _note(self, request_id: str, status: str) -> None:
        history = self._history.setdefault(request_id, ["waiting"])
        if history[-1] != status:
            history.append(status)

    def collect(self, request_id: str) -> RequestOutput | None:
        """The output of a request that has ended; None while it runs.

        Raises:
            KeyError: the id is unknown, or its output was dropped.
        """
        if request_id in self._finished:
            return self._finished[request_id]
        if request_id in self.engine.output.requests:
            return None
        raise KeyError(f"request {request_id!r} is unknown")

    def release(self, request_id: str) -> None:
        """Forgets an ended request's output."""
        self._finished.pop(request_id, None)
        self._history.pop(request_id, None)

    def cancel(self, request_id: str) -> bool:
        """Ends a request; True also when it had ended, False when it is unknown."""
        return request_id in self._finished or self.engine.cancel(request_id)

    def get_request_status(self, request_id: str) -> str | None:
        """Where a request stands; None when it is unknown."""
        if request_id in self._finished:
            return self._finished[request_id].status
        state = self.engine.output.requests.get(request_id)
        return None if state is None else state.status

    def get_request_history(self, request_id: str) -> list[str]:
        """The statuses that a request went through, in order; empty when it is unknown."""
        return list(self._history.get(request_id, ()))

    def is_finished(self, request_id: str) -> bool:
        """True when the request has ended."""
        return request_id in self._finished

    @property
    def has_unfinished(self) -> bool:
        """True while a step could bring something."""
        return self.engine.has_unfinished

    def kv_cache_stats(self) -> dict[str, int | float]:
        """Blocks in use and free, and what the prefix cache saved."""
        return self.engine.block_manager.stats()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks; False while requests hold blocks."""
        return self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Frees the engine."""
        self.engine.close()

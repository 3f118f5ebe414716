"""`EngineClient`: submit, step, collect, cancel. What the offline API is built on; any thread may call it at any time."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pellucid.api.outputs import EngineCoreOutput, RequestOutput
from pellucid.api.request_options import NO_OPTIONS, RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import CustomStructure, Grammar
from pellucid.engine.admission import Prompt
from pellucid.engine.engine import LLMEngine, StepOutputs
from pellucid.engine.turns import Turns, Waiter
from pellucid.errors import EngineDeadError

# Outputs of ended requests that nobody collected are kept up to this many, the oldest dropped first.
MAX_UNCOLLECTED = 10_000


@dataclass(frozen=True)
class Submission:
    """A request before it is queued. `text` is what its token ids were made from."""

    prompt: Prompt
    params: SamplingParams | None = None
    options: RequestOptions = NO_OPTIONS
    request_id: str | None = None
    stream: bool = True
    text: str | None = None
    grammar: Grammar | None = None  # held until the engine has found it


class Reader(Waiter):
    """Where the chunks and outputs of some requests go: to the one caller who made them, and to nobody else.

    With `is_eager` there is something to read with each chunk and each request that ends; else when all have ended.
    """

    def __init__(self, *, is_eager: bool) -> None:
        super().__init__()
        self.is_eager = is_eager
        self.open: set[str] = set()  # the requests that run
        self.chunks: deque[EngineCoreOutput] = deque()
        self.outputs: dict[str, RequestOutput] = {}
        self._num_told = 0

    def is_ready(self) -> bool:
        """True when there is something to read."""
        has_news = self.is_eager and (bool(self.chunks) or len(self.outputs) > self._num_told)
        return has_news or not self.open

    def take_ended(self) -> int:
        """How many requests have ended since the last call."""
        before, self._num_told = self._num_told, len(self.outputs)
        return self._num_told - before


class EngineClient:
    """Drives an engine inline and keeps what has ended until it is collected.

    Threads share it as `Turns` says: a step carries the requests of all, and a method waits for one step at most. What has no
    `Reader` is told to whoever calls `step` next: of several threads that do, each one asks `collect` for its own requests.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._turns = Turns("the engine of this LLM", self._advance)
        engine.owner, engine.sink = self._turns, self._book
        self._readers: dict[str, Reader] = {}
        # These three are read without the turn. A request that ends is in `_finished` before it leaves `_living`.
        self._living: set[str] = set()
        self._finished: OrderedDict[str, RequestOutput] = OrderedDict()
        self._history: dict[str, list[str]] = {}
        self._unread: dict[str, list[EngineCoreOutput]] = {}  # that no `step` has told yet
        self._untold: deque[RequestOutput] = deque(maxlen=MAX_UNCOLLECTED)

    # ---- requests -------------------------------------------------------------------------------------------------

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
        return self.submit_all([Submission(inputs, params, options, request_id, stream)])[0]

    def submit_all(self, submissions: Sequence[Submission], reader: Reader | None = None) -> list[str]:
        """Queues requests between the same two steps, or none of them; what they bring goes to `reader` alone, where there is one."""
        self._turns.check()
        self._turns.refuse_when_over()
        prepared = [self._prepared(one) for one in submissions]
        return self._turns.do(partial(self._add_all, prepared, reader))

    def _prepared(self, given: Submission) -> Submission:
        """Does what takes long before it is the caller's turn: text to tokens, structures to grammars."""
        checker, params = self.engine.checker, given.params
        text, token_ids = checker.tokenise(given.prompt)
        structure = params.structured_outputs if isinstance(params, SamplingParams) else None
        if params is not None and structure is not None and not isinstance(structure, CustomStructure):
            checker.check(token_ids, params, given.options)
            return replace(given, prompt=token_ids, text=text, grammar=checker.grammar(params))
        return replace(given, prompt=token_ids, text=text)

    def _add_all(self, prepared: Sequence[Submission], reader: Reader | None) -> list[str]:
        self._turns.refuse_when_over()
        added: list[str] = []
        try:
            for one in prepared:
                added.append(self._add(one, reader))
        except BaseException:
            self._end(added)
            raise
        return added

    def _add(self, given: Submission, reader: Reader | None) -> str:
        request_id = self.engine.add_request(
            given.prompt,
            given.params,
            request_id=given.request_id,
            options=given.options,
            stream=given.stream,
            prompt_text=given.text,
        )
        self.release(request_id)
        self._history[request_id] = ["waiting"]
        if reader is not None:
            self._readers[request_id] = reader
            reader.open.add(request_id)
        self._living.add(request_id)
        return request_id

    def wait(self, reader: Reader) -> None:
        """Takes steps until there is something to read, or sleeps while another thread does.

        Raises:
            EngineDeadError: there never will be: the engine was closed, or has failed.
        """
        self._turns.wait(reader)

    def abandon(self, reader: Reader) -> None:
        """Ends what still runs for a reader who has left. Does not wait for that: it may be called from a finaliser."""
        if reader.open or not reader.outputs:  # it may not have been told yet what was queued for it
            self._turns.post(lambda: self._end(sorted(reader.open)))

    def _end(self, request_ids: Sequence[str]) -> None:
        if self._turns.error is None:
            for request_id in request_ids:
                self._trust(partial(self.engine.cancel, request_id))
            self._trust(self.engine.take_ended)

    def settle(self) -> None:
        """Takes the empty step with which a padded batch ends, when it has."""
        if self.engine.scheduler.account.is_open:
            self._turns.do(self._settle)

    def _settle(self) -> None:
        if self.engine.has_unfinished and not self.engine.scheduler.has_unfinished:
            self._step()

    def step(self) -> list[RequestOutput]:
        """Runs one step; gives the requests that ended in it."""
        return self.step_outputs().finished

    def step_outputs(self) -> StepOutputs:
        """Runs one step; gives its chunks as well, and what the steps of other threads brought since the last call."""
        return self._turns.do(self._step_and_tell)

    def _step_and_tell(self) -> StepOutputs:
        self._step()
        unread, self._unread = self._unread, {}
        untold = list(self._untold)
        self._untold.clear()
        return StepOutputs([chunk for chunks in unread.values() for chunk in chunks], untold)

    def _advance(self) -> bool:
        if not self.engine.has_unfinished:
            return False
        self._step()
        return True

    def _step(self) -> None:
        self._turns.refuse_when_over()
        self._trust(self.engine.step)

    def _trust(self, call: Callable[[], object]) -> None:
        """Behind an error, the state of the engine can no longer be trusted."""
        try:
            call()
        except EngineDeadError as error:
            self._turns.end(error)
            raise
        except BaseException as error:
            self._turns.end(EngineDeadError(f"the engine failed: {type(error).__name__}: {error}"))
            raise

    def _book(self, outputs: StepOutputs) -> None:
        """Takes in what a step brought, on the thread that took it."""
        for state in self.engine.output.take_moved():
            self._note(state.request_id, state.status)
        for chunk in outputs.chunks:
            reader = self._readers.get(chunk.request_id)
            if reader is None:
                self._unread.setdefault(chunk.request_id, []).append(chunk)
            else:
                reader.chunks.append(chunk)
                self._turns.ring(reader)
        for output in outputs.finished:
            self._book_end(output)
        while len(self._finished) > MAX_UNCOLLECTED:
            dropped, _ = self._finished.popitem(last=False)
            self._history.pop(dropped, None)
            self._unread.pop(dropped, None)

    def _book_end(self, output: RequestOutput) -> None:
        request_id = output.request_id
        reader = self._readers.pop(request_id, None)
        if reader is None:
            self._note(request_id, output.status)
            self._finished[request_id] = output
            self._untold.append(output)
        else:
            self._history.pop(request_id, None)
            reader.outputs[request_id] = output
            reader.open.discard(request_id)
            self._turns.ring(reader)
        self._living.discard(request_id)

    def _note(self, request_id: str, status: str) -> None:
        history = self._history.setdefault(request_id, ["waiting"])
        if history[-1] != status:
            history.append(status)

    def collect(self, request_id: str) -> RequestOutput | None:
        """The output of a request that has ended; None while it runs.

        Raises:
            KeyError: the id is unknown, or its output was dropped.
        """
        if request_id in self._living or request_id in self.engine.output.requests:
            return None
        output = self._finished.get(request_id)
        if output is None:
            raise KeyError(f"request {request_id!r} is unknown")
        return output

    def release(self, request_id: str) -> None:
        """Forgets an ended request's output."""
        if self._finished.pop(request_id, None) is not None:
            self._history.pop(request_id, None)
            self._unread.pop(request_id, None)

    def cancel(self, request_id: str) -> bool:
        """Ends a request; True also when it had ended, False when it is unknown."""
        return request_id in self._finished or self._turns.do(partial(self.engine.cancel, request_id))

    def get_request_status(self, request_id: str) -> str | None:
        """Where a request stands; None when it is unknown."""
        history = self._history.get(request_id)
        if history is not None:
            return history[-1]
        state = self.engine.output.requests.get(request_id)  # one that was added past this client
        return None if state is None else state.status

    def get_request_history(self, request_id: str) -> list[str]:
        """The statuses that a request went through, in order; empty when it is unknown."""
        return list(self._history.get(request_id, ()))

    def is_finished(self, request_id: str) -> bool:
        """True when the request has ended."""
        return request_id in self._finished

    # ---- the engine -----------------------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """True while a step could bring something."""
        return self.engine.has_unfinished or bool(self._unread or self._untold)

    def kv_cache_stats(self) -> dict[str, int | float]:
        """Blocks in use and free, and what the prefix cache saved."""
        return self._turns.do(self.engine.block_manager.stats)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks; False while requests hold blocks."""
        return self._turns.do(self.engine.reset_prefix_cache)

    def close(self) -> None:
        """Frees the engine; who waits for outputs gets an `EngineDeadError` at once. Harmless when called again."""
        self._turns.end(EngineDeadError("the engine is closed"))
        if self._turns.is_left:
            return  # it belongs to the process that this one was forked from
        if self._turns.is_mine:  # a signal handler that runs within a step
            self._turns.post(self.engine.close)
        else:
            self._turns.do(self.engine.close)

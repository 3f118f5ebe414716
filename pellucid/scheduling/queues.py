"""Who waits, who runs, and who is in a plan that was not applied yet."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Set

from pellucid.errors import InvariantError
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.request import Request, RequestStatus, queue_key


class Queues:
    """Waiting requests by priority, then arrival; running ones by admission, with `newest_first` the other way round.

    Iteration yields running requests, then waiting ones in the order in which they will be admitted.
    """

    def __init__(self, blocks: BlockManager, newest_first: bool = False) -> None:
        self._blocks, self._newest_first = blocks, newest_first
        self._waiting: list[Request] = []  # sorted by queue_key
        self._waiting_ids: tuple[str, ...] | None = ()  # of the same; None when they have changed
        self._running: list[Request] = []
        self._in_flight: dict[int, dict[str, Request]] = {}  # step id -> living requests of a plan not yet applied

    # ---- questions -------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Waiting requests in queue order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """Running requests in order."""
        return tuple(self._running)

    @property
    def head(self) -> Request:
        """The waiting request that is admitted next. There must be one."""
        return self._waiting[0]

    @property
    def waiting_ids(self) -> tuple[str, ...]:
        """Ids of the waiting requests in queue order."""
        if self._waiting_ids is None:
            self._waiting_ids = tuple([request.request_id for request in self._waiting])
        return self._waiting_ids

    @property
    def steps_in_flight(self) -> list[int]:
        """Numbers of the plans that were not applied yet."""
        return sorted(self._in_flight)

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def living(self, step_id: int) -> Set[str]:
        """The requests of a plan in flight that have neither ended nor been preempted since."""
        return self._in_flight.get(step_id, {}).keys()

    def check_invariants(self, num_living: int) -> None:
        """Check that the `num_living` requests that have not ended stand in one queue each, and in the right one.

        Raises:
            InvariantError: one does not.
        """
        queued = {RequestStatus.WAITING, RequestStatus.PREEMPTED}
        for request in self._running:
            if request.status is not RequestStatus.RUNNING:
                raise InvariantError(f"{request} stands among the running requests")
        for request in self._waiting:
            if request.status not in queued or request.next_start:
                raise InvariantError(f"{request} stands among the waiting requests")
        if num_living != len({request.request_id for request in self}) or num_living != len(list(self)):
            raise InvariantError(f"{num_living} requests live but the queues hold {[r.request_id for r in self]}")

    # ---- changes ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request."""
        insort(self._waiting, request, key=queue_key)
        self._waiting_ids = None

    def admit(self, request: Request) -> None:
        """From the head of the queue to those that run."""
        request.transition(RequestStatus.RUNNING)
        self._waiting.pop(0)
        self._waiting_ids = None
        self._running.insert(0 if self._newest_first else len(self._running), request)

    def preempt(self, request: Request) -> None:
        """Blocks away, outputs kept, back to the front of its priority's queue."""
        request.transition(RequestStatus.PREEMPTED)
        _remove(self._running, request, is_sorted=False)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.add(request)  # it came before all that were never admitted

    def end(self, request: Request, status: RequestStatus) -> None:
        """Out of its queue, and its blocks away. What was computed by a request that failed is not cached."""
        queue = self._running if request.status is RequestStatus.RUNNING else self._waiting
        request.transition(status)
        _remove(queue, request, is_sorted=queue is self._waiting)
        self._waiting_ids = None
        self._release(request, discard=status is RequestStatus.FINISHED_ERROR)

    def launch(self, step_id: int, requests: dict[str, Request]) -> None:
        """A plan for these requests is in flight."""
        self._in_flight[step_id] = requests

    def land(self, step_id: int) -> dict[str, Request]:
        """A plan is applied: its living requests by id; none when it had no entries.

        Raises:
            InvariantError: it is not in flight.
        """
        if step_id not in self._in_flight:
            raise InvariantError(f"step {step_id} is not in flight; in flight: {self.steps_in_flight}")
        return self._in_flight.pop(step_id)

    def _release(self, request: Request, discard: bool = False) -> None:
        """Take a request's blocks away and whatever plans in flight compute for it.

        Those plans still write to the blocks. Whoever gets them next is in a later plan, and plans are executed in order.
        """
        self._blocks.free(request, discard=discard)
        request.num_scheduled_tokens = request.num_placeholders = 0
        for requests in self._in_flight.values():
            requests.pop(request.request_id, None)


def _remove(queue: list[Request], request: Request, is_sorted: bool) -> None:
    index = bisect_left(queue, request.queue_key, key=queue_key) if is_sorted else queue.index(request)
    if queue[index] is not request:
        raise InvariantError(f"{request} is not in its queue")
    del queue[index]

"""From sampled tokens to what callers read: text, stop strings, logprobs; the choices of a request put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.outputs import (
    CompletionOutput,
    EngineCoreOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import Grammar
from pellucid.contract.plan import CapturedRows
from pellucid.engine.hidden_output import F32, CapturedOfChoice, HiddenStatesOfChoice
from pellucid.scheduling.request import FINISH_REASONS, RequestStatus
from pellucid.scheduling.scheduler import TokenEvent
from pellucid.text.detokenizer import IncrementalDetokenizer
from pellucid.text.stop import StopChecker
from pellucid.text.tokenizer import Tokenizer


@dataclass
class ChoiceState:
    """One choice while it runs."""

    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    stop: StopChecker | None
    num_checked: int = 0  # tokens that `stop_check` has seen
    unsent_text: str = ""
    unsent_token_ids: list[int] = field(default_factory=list)
    unsent_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    end_sent: bool = False
    last_token_at: float | None = None
    hidden: HiddenStatesOfChoice | None = None
    captured: CapturedOfChoice | None = None


@dataclass
class RequestState:
    """One request with all its choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    choices: list[ChoiceState]
    submitted_at: float
    stream: bool = True  # somebody reads chunks; else text is made when a choice ends
    grammar: Grammar | None = None  # kept compiled until the executor asks for it, which may be after many others
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # up to where they have been computed
    num_cached_tokens: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # nothing stands before the first token, be it the only one

    @property
    def finished(self) -> bool:
        """True when every choice has ended."""
        return all(choice.output.finished for choice in self.choices)

    @property
    def status(self) -> str:
        """Of the first choice that has not ended, else of choice 0."""
        for choice in self.choices:
            if not choice.output.finished:
                return choice.status.value
        return self.choices[0].status.value

    def to_output(self) -> RequestOutput:
        """What the caller gets."""
        since = self.submitted_at
        metrics = RequestMetrics(
            queue_time=_between(since, self.scheduled_at),
            time_to_first_token=_between(since, self.first_token_at),
            e2e_time=_between(since, self.finished_at),
            num_preemptions=self.num_preemptions,
            prefill_time=_between(self.scheduled_at, self.first_token_at),
            decode_time=_between(self.first_token_at, self.finished_at),
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[choice.output for choice in self.choices],
            finished=self.finished,
            status=self.status,
            prompt_logprobs=self._whole_prompt_logprobs(),
            num_cached_tokens=self.num_cached_tokens,
            metrics=metrics,
        )

    def _whole_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """One entry a prompt token, also of a request that ended before all were computed."""
        rows = self.prompt_logprobs
        return None if rows is None else rows + [None] * (len(self.prompt_token_ids) - len(rows))


class OutputProcessor:
    """Keeps the caller's side of every request that runs. `choice_id` is the scheduler's request id of one choice."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        observe_gap: Callable[[float], None] = lambda seconds: None,
        hidden_size: int = 0,
    ) -> None:
        self.tokenizer, self._hidden_size = tokenizer, hidden_size
        self._observe_gap = observe_gap  # told the seconds between two tokens of a choice
        self.requests: dict[str, RequestState] = {}
        self._choices: dict[str, tuple[RequestState, ChoiceState]] = {}
        self._num_with_stops = 0  # living choices that have stop strings
        self._moved: dict[str, RequestState] = {}  # requests with a choice whose status changed

    def add(self, state: RequestState, choice_ids: list[str]) -> None:
        """Begins to follow a request."""
        self.requests[state.request_id] = state
        for choice_id, choice in zip(choice_ids, state.choices, strict=True):
            self._choices[choice_id] = (state, choice)
            self._num_with_stops += choice.stop is not None

    def new_choice(
        self,
        index: int,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: list[int],
        hidden: HiddenStatesParams | None = None,
        capture: tuple[str, ...] = (),
    ) -> ChoiceState:
        """An empty choice with its own detokeniser and stop strings."""
        detokenizer = stop = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
            stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        output = CompletionOutput(index, seed=None if params.is_greedy else seed)
        if params.logprobs is not None:
            output.logprobs, output.cumulative_logprob = [], 0.0
        kept = None if hidden is None else HiddenStatesOfChoice(hidden, len(prompt_token_ids), self._hidden_size)
        captured = CapturedOfChoice(capture, len(prompt_token_ids)) if capture else None
        return ChoiceState(output, detokenizer, stop, hidden=kept, captured=captured)

    def state_of(self, choice_id: str) -> RequestState:
        """The request that a choice belongs to."""
        return self._choices[choice_id][0]

    def follows(self, choice_id: str) -> bool:
        """True from `add` until the choice has ended."""
        return choice_id in self._choices

    def drop_work(self, choice_id: str) -> None:
        """Makes nothing more of a choice than it has: its detokeniser, its stop strings or its rows have failed."""
        choice = self._choices[choice_id][1]
        self._num_with_stops -= choice.stop is not None
        choice.detokenizer = choice.stop = choice.hidden = choice.captured = None

    @property
    def watches_stops(self) -> bool:
        """True while a living choice has stop strings: then `stop_check` must see its tokens."""
        return self._num_with_stops > 0

    def stop_check(self, choice_id: str, token_id: int) -> str | None:
        """Takes a token that is neither eos nor a stop token into the text, where there are stop strings; the one that it
        completes, if any."""
        state, choice = self._choices[choice_id]
        if choice.detokenizer is None or choice.stop is None:
            return None
        choice.num_checked += 1
        delta = choice.detokenizer.add((token_id,))
        released, matched = choice.stop.push(delta)
        self._release(choice, released)
        # A stop string that ends before the least number of tokens is part of the text.
        if matched is not None and choice.num_checked <= state.params.min_tokens:
            self._release(choice, "" if state.params.include_stop_str_in_output else matched)
            choice.stop = StopChecker(state.params.stop, state.params.include_stop_str_in_output)
            return None
        return matched

    def add_token(self, event: TokenEvent, now: float) -> RequestState:
        """Books the token of an event. Its text came through `stop_check` where there are stop strings; else it is made here
        while somebody reads it, or all at once when the choice ends."""
        state, choice = self._choices[event.request_id]
        output, logprobs, token_id = choice.output, event.logprobs, event.token_id
        if token_id is None:
            return state
        output.token_ids.append(token_id)
        if state.first_token_at is None:
            state.first_token_at = now
        if choice.last_token_at is not None and choice.last_token_at != now:  # equal: accepted drafts of one step
            self._observe_gap(now - choice.last_token_at)
        choice.last_token_at = now
        if state.stream:
            choice.unsent_token_ids.append(token_id)
            if choice.stop is None and choice.detokenizer is not None and not _ends_by_id(event):
                self._release(choice, choice.detokenizer.add((token_id,)))
        if logprobs is not None and output.logprobs is not None:
            entry = self.logprob_dict(logprobs)
            output.logprobs.append(entry)
            if state.stream:
                choice.unsent_logprobs.append(entry)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs.logprob
        return state

    def add_prompt_logprobs(self, choice_id: str, start: int, rows: list[TokenLogprobs]) -> None:
        """Books the rows of prompt positions `start` + 1 and on; position 0 has none. Positions computed twice are kept once."""
        state, _ = self._choices[choice_id]
        if state.prompt_logprobs is not None:
            del state.prompt_logprobs[start + 1 :]
            state.prompt_logprobs += [self.logprob_dict(row) for row in rows]

    def add_hidden_states(self, choice_id: str, positions: list[int], rows: F32) -> None:
        """Books rows [n, layers, D] that a step computed for a choice that wants them."""
        kept = self._choices[choice_id][1].hidden
        if kept is not None:
            kept.add(positions, rows)

    def add_captured(self, choice_id: str, rows: CapturedRows) -> None:
        """Books activations that a step computed for a choice that wants them."""
        kept = self._choices[choice_id][1].captured
        if kept is not None:
            kept.add(rows)

    def set_status(self, choice_id: str, status: RequestStatus) -> None:
        """Notes where a choice stands."""
        state, choice = self._choices[choice_id]
        choice.status = status
        self._moved[state.request_id] = state

    def take_moved(self) -> list[RequestState]:
        """The requests whose status may have changed since the last call."""
        moved = list(self._moved.values())
        self._moved.clear()
        return moved

    def finish(self, event: TokenEvent, status: RequestStatus, now: float) -> RequestState:
        """Ends a choice: text that was held back is released, unless a stop string cut it. It is followed until that is done."""
        state, choice = self._choices[event.request_id]
        if choice.detokenizer is not None:
            if choice.stop is None and not state.stream:
                known = len(choice.output.token_ids) - _ends_by_id(event)
                self._release(choice, choice.detokenizer.add(choice.output.token_ids[:known]))
            tail = choice.detokenizer.flush()
            if choice.stop is None:
                self._release(choice, tail)
            elif not (status is RequestStatus.FINISHED_STOPPED and isinstance(event.stop_reason, str)):
                released, _ = choice.stop.push(tail)
                self._release(choice, released + choice.stop.flush())
        choice.status = status
        choice.output.finish_reason = FINISH_REASONS[status]
        choice.output.stop_reason, choice.output.error = event.stop_reason, event.error
        if choice.hidden is not None:
            states, positions = choice.hidden.result(len(choice.output.token_ids))
            choice.output.hidden_states, choice.output.hidden_states_positions = states, positions
        if choice.captured is not None:
            choice.output.captured = choice.captured.result(len(choice.output.token_ids))
        del self._choices[event.request_id]
        self._num_with_stops -= choice.stop is not None
        self._moved[state.request_id] = state
        if state.finished:
            state.finished_at = now
            del self.requests[state.request_id], self._moved[state.request_id]
        return state

    def take_chunks(self, state: RequestState) -> list[EngineCoreOutput]:
        """What is new in each choice since the last call; each choice has exactly one chunk with a finish reason. None for a
        request that nobody reads."""
        chunks: list[EngineCoreOutput] = []
        if not state.stream:
            return chunks
        for choice in state.choices:
            ends = choice.output.finished and not choice.end_sent
            if choice.unsent_text or choice.unsent_token_ids or ends:
                choice.end_sent = choice.output.finished
                chunks.append(self._chunk(state, choice))
        return chunks

    def _chunk(self, state: RequestState, choice: ChoiceState) -> EngineCoreOutput:
        chunk = EngineCoreOutput(
            state.request_id,
            choice.output.index,
            choice.unsent_text,
            choice.unsent_token_ids,
            choice.unsent_logprobs if choice.output.logprobs is not None else None,
            choice.output.finish_reason,
            choice.output.stop_reason,
            choice.output.error,
            *self._chunk_states(choice),
            choice.output.captured,
        )
        choice.unsent_text, choice.unsent_token_ids, choice.unsent_logprobs = "", [], []
        return chunk

    @staticmethod
    def _chunk_states(choice: ChoiceState) -> tuple[F32 | None, list[int] | None]:
        if choice.hidden is None:
            return None, None
        if choice.hidden.params.stream:
            return choice.hidden.take_streamed(len(choice.output.token_ids)), None
        return choice.output.hidden_states, choice.output.hidden_states_positions  # None until it ends

    def logprob_dict(self, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        """By token id: the most likely first, the chosen one always among them."""
        text = self._token_text
        entry = {token: Logprob(value, rank, text(token)) for rank, (token, value) in enumerate(logprobs.top, start=1)}
        chosen = Logprob(logprobs.logprob, logprobs.rank, text(logprobs.token_id))
        return entry if logprobs.token_id in entry else {**entry, logprobs.token_id: chosen}

    def _token_text(self, token_id: int) -> str | None:
        """None for padding rows of the output matrix, which are no tokens."""
        if self.tokenizer is None or self.tokenizer.raw_token(token_id) is None:
            return None
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    @staticmethod
    def _release(choice: ChoiceState, text: str) -> None:
        choice.output.text += text
        choice.unsent_text += text


def _between(since: float | None, until: float | None) -> float | None:
    return None if since is None or until is None else until - since


def _ends_by_id(event: TokenEvent) -> bool:
    """True when the token itself ends the choice, as eos or stop token: it is then no part of the text."""
    return event.finish_status is RequestStatus.FINISHED_STOPPED and not isinstance(event.stop_reason, str)

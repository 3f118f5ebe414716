"""`ModelRunner`: keeps each request's tokens and blocks, turns plans into batches, and samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.api.outputs import TokenLogprobs
from pellucid.api.structured_outputs import Matcher
from pellucid.contract.batch import BatchInput
from pellucid.contract.executor import F32, Executable
from pellucid.contract.facts import ModelFacts
from pellucid.contract.plan import AcceptedDraft, ModelRunnerOutput, NewRequest, PlanEntry, StepPlan
from pellucid.core import abi
from pellucid.errors import sendable
from pellucid.executor.batch import RequestRows, RunnerRequest
from pellucid.executor.blame import Errors, blamed, note
from pellucid.executor.checksum import row_checksums
from pellucid.executor.hidden_rows import HiddenRows
from pellucid.executor.row_stats import native_row_stats
from pellucid.sampling.native import NativeSampler
from pellucid.sampling.sampler import SampledToken, SamplingRow, prompt_logprobs
from pellucid.text.tokenizer import Tokenizer


class ModelRunner:
    """Runs plans on one executable, and samples on the threads of `context`."""

    def __init__(
        self,
        executable: Executable,
        context: abi.Context,
        facts: ModelFacts,
        *,
        block_size: int,
        max_blocks_per_request: int,
        max_num_seqs: int,
        max_logit_rows: int,
        trace_logits: bool = False,
    ) -> None:
        self.executable, self.row_stats = executable, native_row_stats(context)
        self.max_logit_rows, self._trace_logits = max_logit_rows, trace_logits
        self._rows = RequestRows(block_size, max_blocks_per_request, max_num_seqs)
        self._native, self._facts = NativeSampler(context, facts.vocab_size, max_num_seqs), facts
        self._requests: dict[str, RunnerRequest] = {}
        self._num_wanting = 0  # of them that want hidden states
        self._ended_at = time.perf_counter()

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        """Runs one plan: books what is new, computes, samples.

        A request that fails is forgotten at once and named in `errors`. What it spoiled for the others is computed again without
        it, and before anything was sampled, so that no state is advanced twice. Plans that were made before its error was read
        may still have entries of it: they are passed over.
        """
        errors = self._book(plan)
        entries, output = self._known(plan.entries, errors), None
        while entries and output is None:
            requests = [self._requests[entry.request_id] for entry in entries]
            batch = self._rows.build(entries, requests)
            try:
                forward = self._forward(entries, requests, batch)
            except Exception as error:
                guilty = blamed(error, entries, requests, batch)
                if not guilty:
                    raise
                for request_id in guilty:
                    note(errors, request_id, error)
                entries = [entry for entry in entries if entry.request_id not in errors]
                continue
            output = self._output(entries, requests, batch, forward, errors)
        for request_id in errors:
            self._forget(request_id)
        return ModelRunnerOutput({}, errors=errors) if output is None else output

    def _forward(self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], batch: BatchInput) -> _Forward:
        began = time.perf_counter()
        hidden = HiddenRows(entries, requests, batch.query_start) if self._num_wanting else None
        if hidden is None:
            logits = self.executable.run(batch)
        else:
            logits = self.executable.run(batch, hidden.activations, hidden.steering)
        return _Forward(logits, hidden, began, time.perf_counter())

    def _output(
        self,
        entries: Sequence[PlanEntry],
        requests: Sequence[RunnerRequest],
        batch: BatchInput,
        forward: _Forward,
        errors: Errors,
    ) -> ModelRunnerOutput:
        """Samples, and gathers what else is wanted of a forward pass."""
        sampled = _Sampled(errors)
        self._sample(entries, requests, forward.logits, sampled)
        prompt_logprobs = self._prompt_logprobs(entries, requests, batch.query_start, errors)
        kept = {} if forward.hidden is None else self._gather(forward.hidden, sampled)
        idle = forward.began - self._ended_at
        self._ended_at = time.perf_counter()
        return ModelRunnerOutput(
            sampled_token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            accepted_drafts=sampled.accepted_drafts,
            logits_checksums=sampled.checksums,
            execute_seconds=forward.computed - forward.began,
            sample_seconds=self._ended_at - forward.computed,
            idle_seconds=idle,
            **kept,
        )

    def _gather(self, hidden: HiddenRows, sampled: _Sampled) -> dict[str, Any]:
        states, positions = hidden.gather_hidden(self.executable, sampled.accepted_drafts, sampled.errors)
        captured = hidden.gather_captured(self.executable, sampled.accepted_drafts, sampled.errors)
        return {
            "last_hidden_states": states or None,
            "hidden_states_positions": positions or None,
            "captured": captured,
        }

    def _book(self, plan: StepPlan) -> Errors:
        """Forgets what has ended and takes in what is new; why some of it could not be taken in."""
        errors: Errors = {}
        for request_id in (*plan.finished, *plan.preempted):
            self._forget(request_id)
        for new in plan.new_requests:
            self._forget(new.request_id)  # the plan that preempted it may have failed before it came here
            try:
                request = self._rows.add(new, self._row(new))
            except Exception as error:
                note(errors, new.request_id, error)
                continue
            self._requests[new.request_id] = request
            self._num_wanting += request.wants_rows
        for entry in plan.entries:
            if entry.new_block_ids and entry.request_id in self._requests:
                self._rows.add_blocks(self._requests[entry.request_id], entry.new_block_ids)
        return errors

    def _known(self, entries: Sequence[PlanEntry], errors: Errors) -> Sequence[PlanEntry]:
        """The entries of requests that have not failed in this plan or one before."""
        known = [entry for entry in entries if entry.request_id in self._requests]
        if len(known) < len(entries):
            for entry in entries:
                if entry.request_id not in self._requests:
                    errors.setdefault(entry.request_id, "the request failed in a step before")
        return known

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._num_wanting -= request.wants_rows
            self._rows.remove(request)

    def _row(self, new: NewRequest) -> SamplingRow:
        sampling = new.sampling
        return SamplingRow(
            sampling.params,
            sampling.seed,
            sampling.choice_index,
            new.prompt_token_ids,
            list(new.output_token_ids),
            sampling.bad_words_token_ids,
            sampling.eos_token_ids,
            self._matcher(new),
        )

    def _matcher(self, new: NewRequest) -> Matcher | None:
        params, eos_token_ids = new.sampling.params, new.sampling.eos_token_ids
        if params.structured_outputs is None:
            return None
        from pellucid.structure.grammar import grammar_of

        grammar = grammar_of(params, self._tokenizer, self._facts.vocab_size, eos_token_ids)
        return None if grammar is None else grammar.matcher(new.output_token_ids)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        """Read when the first structure comes, and kept: in a process of its own nobody else holds it."""
        return Tokenizer.of(self._facts)

    def _sample(
        self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], logits: F32, found: _Sampled
    ) -> None:
        """A token for each entry that samples. A draft that is the sampled token brings its request one more, in a round of
        its own: the sampler then knows all tokens before it, as it would have without drafts."""
        pending = []
        first_row = 0
        for entry, request in zip(entries, requests, strict=True):
            if entry.samples:
                pending.append(_Pending(entry, request, first_row))
                first_row += 1 + len(entry.draft_token_ids)
        sampling = pending
        while pending:
            rows = [one.row + one.num_accepted for one in pending]
            some = logits if len(rows) == len(logits) else logits[rows]
            if self._trace_logits:
                for one, checksum in zip(pending, row_checksums(some), strict=True):
                    found.checksums.setdefault(one.entry.request_id, []).append(checksum)
            outcomes = self._native.sample(some, [one.request.native_row for one in pending])
            pending = [one for one, token in zip(pending, outcomes, strict=True) if one.take(token, found)]
        living = [one for one in sampling if one.entry.request_id in found.token_ids]
        if living:
            newest = [found.token_ids[one.entry.request_id] for one in living]
            self._rows.set_newest([one.request for one in living], newest)

    def _prompt_logprobs(
        self,
        entries: Sequence[PlanEntry],
        requests: Sequence[RunnerRequest],
        query_start: npt.NDArray[np.int32],
        errors: Errors,
    ) -> dict[str, tuple[int, list[TokenLogprobs]]]:
        """The chunk's rows predict the prompt's next tokens; logits are made in slices that fit the logits buffer."""
        found: dict[str, tuple[int, list[TokenLogprobs]]] = {}
        for i, (entry, request) in enumerate(zip(entries, requests, strict=True)):
            top_n = request.row.sampling_params.prompt_logprobs
            end = min(entry.start + entry.num_tokens, len(request.row.prompt_token_ids) - 1)
            if top_n is None or request.row.choice_index > 0 or end <= entry.start:
                continue
            rows = np.arange(end - entry.start, dtype=np.int32) + query_start[i]
            targets = request.row.prompt_token_ids[entry.start + 1 : end + 1]
            try:
                found[entry.request_id] = (entry.start, self._logprobs_of(rows, targets, top_n))
            except Exception as error:
                note(errors, entry.request_id, error)
        return found

    def _logprobs_of(self, rows: npt.NDArray[np.int32], targets: Sequence[int], top_n: int) -> list[TokenLogprobs]:
        logprobs: list[TokenLogprobs] = []
        for begin in range(0, len(rows), self.max_logit_rows):
            part = rows[begin : begin + self.max_logit_rows]
            logits = self.executable.logits_of(part)
            some = targets[begin : begin + self.max_logit_rows]
            logprobs += prompt_logprobs(logits, self.row_stats(logits), some, top_n)
        return logprobs


@dataclass(frozen=True)
class _Forward:
    """What a forward pass left, and when."""

    logits: F32
    hidden: HiddenRows | None
    began: float
    computed: float


@dataclass
class _Sampled:
    """What sampling brought, by request id."""

    errors: Errors
    token_ids: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    accepted_drafts: dict[str, list[AcceptedDraft]] = field(default_factory=dict)
    checksums: dict[str, list[int]] = field(default_factory=dict)


class _Pending:
    """A request that is sampled for, as far as its drafts have been accepted."""

    __slots__ = ("entry", "num_accepted", "request", "row")

    def __init__(self, entry: PlanEntry, request: RunnerRequest, row: int) -> None:
        self.entry, self.request, self.row = entry, request, row
        self.num_accepted = 0

    def take(self, token: SampledToken, found: _Sampled) -> bool:
        """Books a token; True when it is the draft that stood in its place, so that the row behind it counts too."""
        request_id, drafts = self.entry.request_id, self.entry.draft_token_ids
        if token.error is not None:
            found.errors[request_id] = sendable(token.error)
            return False
        try:
            problem = self.request.row.advance(token.token_id)
        except Exception as error:  # of a custom matcher
            note(found.errors, request_id, error)
            return False
        if problem is not None:
            found.errors[request_id] = sendable(problem)
            return False
        if self.num_accepted < len(drafts) and drafts[self.num_accepted] == token.token_id:
            self.num_accepted += 1
            found.accepted_drafts.setdefault(request_id, []).append(AcceptedDraft(token.token_id, token.logprobs))
            return True
        found.token_ids[request_id] = token.token_id
        if token.logprobs is not None:
            found.logprobs[request_id] = token.logprobs
        return False

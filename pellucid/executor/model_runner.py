"""`ModelRunner`: keeps each request's tokens and blocks, turns plans into batches, and samples."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pellucid.executor.base import F32, Executable
from pellucid.executor.batch import RunnerRequest, build_batch
from pellucid.executor.row_stats import native_row_stats
from pellucid.ops import abi
from pellucid.outputs import TokenLogprobs
from pellucid.plan import ModelRunnerOutput, NewRequest, PlanEntry, StepPlan
from pellucid.sampling.native import NativeSampler
from pellucid.sampling.sampler import SamplingRow, prompt_logprobs


class ModelRunner:
    """Runs plans on one executable, and samples on the threads of `context`."""

    def __init__(
        self,
        executable: Executable,
        context: abi.Context,
        *,
        vocab_size: int,
        block_size: int,
        max_blocks_per_request: int,
        max_logit_rows: int,
    ) -> None:
        self.executable, self.row_stats = executable, native_row_stats(context)
        self.block_size, self.max_logit_rows = block_size, max_logit_rows
        self._max_blocks = max_blocks_per_request
        self._native = NativeSampler(context, vocab_size, max_logit_rows)
        self._requests: dict[str, RunnerRequest] = {}

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        """Runs one plan: books what is new, computes, samples."""
        self._book(plan)
        if not plan.entries:
            return ModelRunnerOutput({})
        requests = [self._requests[entry.request_id] for entry in plan.entries]
        began = time.perf_counter()
        batch = build_batch(plan.entries, requests, self.block_size)
        logits = self.executable.run(batch)
        computed = time.perf_counter()
        sampling = [
            (entry.request_id, request) for entry, request in zip(plan.entries, requests, strict=True) if entry.samples
        ]
        tokens, logprobs, errors = self._sample(sampling, logits)
        prompt_logprobs = self._prompt_logprobs(plan.entries, requests, batch.query_start)
        return ModelRunnerOutput(
            sampled_token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            execute_seconds=computed - began,
            sample_seconds=time.perf_counter() - computed,
        )

    def _book(self, plan: StepPlan) -> None:
        for request_id in (*plan.finished, *plan.preempted):
            self._requests.pop(request_id, None)
        for new in plan.new_requests:
            row = self._row(new)
            self._requests[new.request_id] = RunnerRequest.from_new(new, row, self.block_size, self._max_blocks)
        for entry in plan.entries:
            self._requests[entry.request_id].append_blocks(entry.new_block_ids)

    @staticmethod
    def _row(new: NewRequest) -> SamplingRow:
        return SamplingRow(
            new.sampling_params,
            new.seed,
            new.choice_index,
            new.prompt_token_ids,
            list(new.output_token_ids),
            new.bad_words_token_ids,
            new.eos_token_ids,
        )

    def _sample(
        self, sampling: Sequence[tuple[str, RunnerRequest]], logits: F32
    ) -> tuple[dict[str, int], dict[str, TokenLogprobs], dict[str, str]]:
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprobs] = {}
        errors: dict[str, str] = {}
        if not sampling:
            return tokens, logprobs, errors
        sampled = self._native.sample(logits, [request.native_row for _, request in sampling])
        for (request_id, request), token in zip(sampling, sampled, strict=True):
            if token.error is not None:
                errors[request_id] = token.error
                continue
            tokens[request_id] = token.token_id
            request.append_token(token.token_id)
            request.row.output_token_ids.append(token.token_id)
            if token.logprobs is not None:
                logprobs[request_id] = token.logprobs
        return tokens, logprobs, errors

    def _prompt_logprobs(
        self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], query_start: npt.NDArray[np.int32]
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
            found[entry.request_id] = (entry.start, self._logprobs_of(rows, targets, top_n))
        return found

    def _logprobs_of(self, rows: npt.NDArray[np.int32], targets: Sequence[int], top_n: int) -> list[TokenLogprobs]:
        logprobs: list[TokenLogprobs] = []
        for begin in range(0, len(rows), self.max_logit_rows):
            part = rows[begin : begin + self.max_logit_rows]
            logits = self.executable.logits_of(part)
            some = targets[begin : begin + self.max_logit_rows]
            logprobs += prompt_logprobs(logits, self.row_stats(logits), some, top_n)
        return logprobs

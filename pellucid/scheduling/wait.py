"""Why a waiting request waits: the closed set of reasons, with their numbers, and their labels in metrics."""

from __future__ import annotations

from pellucid.contract.plan import WAIT_BEHIND_HEAD

WAIT_NO_BLOCKS = "no free blocks: needs {needs}, {free} free"
WAIT_MAX_NUM_SEQS = "max_num_seqs {limit} reached"
WAIT_BUDGET_SPENT = "token budget of {budget} spent"
WAIT_BUDGET_SHORT = "token budget of {budget}: needs {needs}, {left} left"
WAIT_SHARED_PROMPT = "waits for the shared prompt of its first choice"
WAIT_PREEMPTING = "blocks are short: {preempted} preempted in this step"
WAIT_ONE_PROMPT = "one prompt a step"
WAIT_TKV_LENGTH = "max_model_len {limit}: the batch would come to {length} from tkv {tkv}"
WAIT_TKV_VOLUME = "max_batch_tkv_limit {limit}: the batch would come to {volume} from tkv {tkv}"
WAIT_BEHIND_HEAD_LABEL = "behind_head"
# A label for each beginning of a reason.
_LABELS = {
    WAIT_NO_BLOCKS: "no_blocks",
    WAIT_MAX_NUM_SEQS: "max_num_seqs",
    WAIT_BUDGET_SPENT: "token_budget",
    WAIT_BUDGET_SHORT: "token_budget",
    WAIT_SHARED_PROMPT: "shared_prompt",
    WAIT_PREEMPTING: "preempting",
    WAIT_ONE_PROMPT: "one_prompt",
    WAIT_TKV_LENGTH: "tkv_length",
    WAIT_TKV_VOLUME: "tkv_volume",
    WAIT_BEHIND_HEAD: WAIT_BEHIND_HEAD_LABEL,
}
WAIT_REASONS = tuple(_LABELS)
_LABEL_OF_BEGINNING = {reason.partition("{")[0]: label for reason, label in _LABELS.items()}


def wait_label(reason: str | None) -> str:
    """The label of a reason; `just_arrived` where there is none yet."""
    if reason is None:
        return "just_arrived"
    return next(label for beginning, label in _LABEL_OF_BEGINNING.items() if reason.startswith(beginning))

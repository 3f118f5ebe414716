"""Which requests a step takes. A policy orders the passes of a step; the passes themselves are the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pellucid.config import EngineConfig
from pellucid.errors import ConfigError
from pellucid.scheduling import padded
from pellucid.scheduling.account import BatchAccount
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import SchedulerConfig
from pellucid.scheduling.limits import RequestLimits
from pellucid.scheduling.passes import Step


def mixed(step: Step) -> None:
    """Running requests first, then waiting ones, prompts cut into chunks by what is left of the budget."""
    step.continue_running(step.running)
    step.admit_waiting(whole_prompts=False)


def prefill_first(step: Step) -> None:
    """Whole prompts, in order, as long as they fit; a decode of all that runs only where no prefill was possible.

    A resumed request (prompt + outputs) that is longer than a step may be is the one exception to whole prompts: it
    is cut.
    """
    step.continue_running(request for request in step.running if request.is_prefill)
    step.admit_waiting(whole_prompts=True)
    if step.is_empty:
        step.continue_running(step.running)


def _plain_account(config: SchedulerConfig, blocks: BlockManager) -> BatchAccount:
    return BatchAccount(blocks)


@dataclass(frozen=True)
class Policy:
    """How a step is put together, and what holds for its requests."""

    take: Callable[[Step], None]
    account: Callable[[SchedulerConfig, BlockManager], BatchAccount] = _plain_account
    whole_prompts: bool = False  # a prompt is never cut, so it must fit a step
    newest_first: bool = False  # the order of those that run: by admission, or the other way round
    one_shape: bool = False  # shapes are static: one step at a time, without drafts; prompts take whole blocks


POLICIES: dict[str, Policy] = {
    "mixed": Policy(mixed),
    "prefill_first": Policy(prefill_first, whole_prompts=True),
    "padded": Policy(padded.take, padded.account, whole_prompts=True, newest_first=True, one_shape=True),
}


def limits_of(
    config: SchedulerConfig | EngineConfig, *, max_model_len: int, num_blocks: int, block_size: int
) -> RequestLimits:
    """What a request may ask for under the policy of `config`.

    Raises:
        ConfigError: `max_batch_tkv_limit` is below 1.
    """
    policy = POLICIES[config.policy]
    return RequestLimits(
        max_model_len,
        num_blocks,
        block_size,
        config.policy,
        config.max_num_batched_tokens if policy.whole_prompts else None,
        padded.tkv_limit(config.max_batch_tkv_limit, config.max_num_seqs, max_model_len) if policy.one_shape else None,
    )


def policy_of(config: SchedulerConfig) -> Policy:
    """The policy that `config` names.

    Raises:
        ConfigError: it is not known, or cannot honour another setting.
    """
    policy = POLICIES.get(config.policy)
    if policy is None:
        raise ConfigError(f"policy {config.policy!r} is not known; policies: {', '.join(sorted(POLICIES))}")
    if policy.whole_prompts and config.max_prefill_chunk is not None:
        raise ConfigError(f"max_prefill_chunk {config.max_prefill_chunk}: {config.policy} computes whole prompts")
    if policy.one_shape and (config.async_scheduling or config.drafts is not None):
        raise ConfigError(f"{config.policy} plans step by step: neither ahead nor with drafts")
    if policy.one_shape and config.max_num_seqs > config.max_num_batched_tokens:
        raise ConfigError(
            f"max_num_seqs is {config.max_num_seqs}; {config.policy} decodes all requests in one step, and "
            f"max_num_batched_tokens is {config.max_num_batched_tokens}"
        )
    return policy

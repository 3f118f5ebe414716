"""`EngineConfig`: every setting of an engine, validated when it is made. The command line is generated from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid.errors import ConfigError, shown

# The model that is used when none is named.
DEFAULT_MODEL = "smollm2-135m-instruct"

DEFAULT_BLOCK_SIZE = 16
ALIASES = {"max_batch_size": "max_num_seqs", "model_path": "model"}
DTYPES = ("auto", "float32", "bfloat16")
KV_CACHE_DTYPES = (*DTYPES, "int8")
QUANTIZATIONS = ("int8", "int8_channel", "int4")
POLICIES = ("mixed", "prefill_first", "padded")
PADDED_BLOCK_SIZE = 64  # the unit in which static shapes grow
# What cannot stand beside policy `padded`: field, its only value, why.
PADDED_ONLY: tuple[tuple[str, object, str], ...] = (
    ("kv_layout", "block", f"counts blocks of {PADDED_BLOCK_SIZE} tokens, and the cells of a slot hold 1"),
    ("speculative_method", None, "computes exactly one token of each request in a decode"),
    ("async_scheduling", False, "plans a step by what ended in the one before"),
)
# (device, distributed executor backend) -> "module:Class" of the executor.
EXECUTORS: dict[tuple[str, str], str] = {("cpu", "uniproc"): "pellucid.executor.uniproc:UniProcExecutor"}
SPECULATIVE_METHODS = ("ngram",)
MAX_SPECULATIVE_TOKENS = 16


def _setting(default: Any, text: str, *flags: str) -> Any:
    """A field with its help, and what its option is called beside the field's own name."""
    return field(default=default, metadata={"help": text, "flags": flags})


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine, with vLLM's names where it has them.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    model: str = _setting(DEFAULT_MODEL, "Directory, .gguf file, hub id, or a name that `pellucid pull` knows.")
    tokenizer: str | None = _setting(None, "Directory with a tokenizer.json to use in place of the model's own.")
    dtype: str = _setting("auto", "Weights and matrix inputs: auto, float32 or bfloat16. auto: float32 if stored so.")
    quantization: str | None = _setting(None, "Round matrices at load: int8, int8_channel or int4.")
    kv_cache_dtype: str = _setting("auto", "Keys and values: auto (as dtype), float32, bfloat16 or int8.")
    kv_layout: str = _setting("block", "How the cache is addressed: block, or slot for cells of one token each.")
    block_size: int = _setting(DEFAULT_BLOCK_SIZE, "Tokens in a block of the cache, 1 to 256; 1 with kv_layout slot.")
    num_blocks: int | None = _setting(
        None, "Blocks (slot: cells) in the cache; by default from the memory that is free."
    )
    max_model_len: int | None = _setting(None, "Longest prompt + output; by default what model and memory allow.")
    max_num_seqs: int = _setting(32, "Most requests that run at once, 1 to 1,024.")
    max_num_batched_tokens: int = _setting(512, "Most tokens computed in one step, 1 to 65,536.")
    policy: str = _setting("mixed", "Scheduling: mixed, prefill_first, or padded (static shapes).")
    max_batch_tkv_limit: int | None = _setting(
        None, "policy padded: most requests x common length; by default max_num_seqs x max_model_len."
    )
    async_scheduling: bool = _setting(False, "Plan the next step while the core executes this one.")
    speculative_method: str | None = _setting(None, "Guess tokens ahead: ngram, from the request's own text.")
    num_speculative_tokens: int = _setting(4, "Most tokens guessed at once, 1 to 16.")
    prompt_lookup_min: int = _setting(2, "Fewest last tokens that must occur earlier for a guess, 1 to 16.")
    prompt_lookup_max: int = _setting(4, "Most last tokens that are looked for, 1 to 16.")
    speculative_max_num_seqs: int = _setting(4, "No guesses while more requests than this run, 1 to 1,024.")
    enable_prefix_caching: bool = _setting(True, "Share the blocks of equal prompt beginnings.")
    num_threads: int = _setting(0, "Threads of the core; 0: one for each physical core.")
    device: str = _setting("cpu", "Where the model runs: cpu.")
    distributed_executor_backend: str = _setting("uniproc", "What runs the model on it: uniproc, this process alone.")
    isa: str = _setting("auto", "Kernels: auto, portable, avx2 or avx512.")
    enforce_eager: bool = _setting(False, "Run the module op by op through torch instead of as a program.")
    tensor_parallel_size: int = _setting(1, "Workers that share each layer: 1.")
    pipeline_parallel_size: int = _setting(1, "Workers in a row of layers: 1.")
    verify: bool = _setting(False, "Read the whole packed model against its checksums before anything runs.")
    program_cache_max_mb: int = _setting(
        32_000, "Most megabytes (10^6 bytes) of packed models in the cache; the least recently used go first."
    )
    hidden_states: bool = _setting(True, "Whether requests may ask for hidden states.")
    hidden_states_max_mb: int = _setting(64, "Most megabytes (10^6 bytes) of hidden states a request may ask for.")
    seed: int = _setting(0, "Seed from which requests without one draw theirs.")
    trace_path: str | None = _setting(None, "File that gets all that happens, as JSON lines: docs/trace.md.", "--trace")
    trace_max_mb: int = _setting(
        1024, "Most megabytes (10^6 bytes) of trace that are kept; the oldest part goes first."
    )
    trace_logits: bool = _setting(False, "Trace a checksum of all logits that are sampled from.")

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            problem = check(value)
            if problem:
                raise ConfigError(f"{name} is {shown(value)}; {problem}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min}; it must be at most prompt_lookup_max, "
                f"{self.prompt_lookup_max}"
            )
        if self.kv_layout == "slot":
            if self.block_size not in (1, DEFAULT_BLOCK_SIZE):
                raise ConfigError(f"block_size is {self.block_size}; with kv_layout 'slot' every cell holds 1 token")
            object.__setattr__(self, "block_size", 1)  # said or not, it is what the layout means
        if self.policy == "padded":
            _check_padded(self)
            object.__setattr__(self, "block_size", PADDED_BLOCK_SIZE)  # said or not, it is what the policy means
        elif self.max_batch_tkv_limit is not None:
            raise ConfigError(
                f"max_batch_tkv_limit is {self.max_batch_tkv_limit}; policy {self.policy!r} has no common length: only "
                "policy 'padded' has"
            )

    @classmethod
    def from_kwargs(cls, model: str | Path, kwargs: Mapping[str, Any]) -> EngineConfig:
        """A config from keyword arguments; aliases are accepted.

        Raises:
            TypeError: a keyword is unknown or given twice.
            ConfigError: a value is not allowed.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {"model": str(model)}
        for key, value in kwargs.items():
            name = ALIASES.get(key, key)
            if name not in known:
                raise TypeError(f"LLM() got an unknown keyword argument {key!r}; known: {', '.join(sorted(known))}")
            if name in values and name != "model":
                raise TypeError(f"LLM() got {name!r} twice: as {key!r} too")
            values[name] = str(value) if name == "model" else value
        return cls(**values)


def register_executor(device: str, backend: str, target: str) -> None:
    """Makes `EngineConfig(device=..., distributed_executor_backend=...)` run on an executor of one's own.

    Args:
        target: `"module:Class"`; the class has what `pellucid.contract.executor.Executor` says.

    Raises:
        ConfigError: `target` is no such text.
    """
    module, _, name = target.partition(":") if isinstance(target, str) else ("", "", "")
    if not module or not name.isidentifier():
        raise ConfigError(f"target is {shown(target)}; it must be 'module:Class'")
    EXECUTORS[device, backend] = target


def _check_padded(config: EngineConfig) -> None:
    for name, only, why in PADDED_ONLY:
        value = getattr(config, name)
        if value != only:
            raise ConfigError(f"{name} is {value!r}; policy 'padded' {why}: it must be {only!r}")
    if config.block_size not in (DEFAULT_BLOCK_SIZE, PADDED_BLOCK_SIZE):
        raise ConfigError(f"block_size is {config.block_size}; with policy 'padded' it is {PADDED_BLOCK_SIZE}")
    if config.max_num_seqs > config.max_num_batched_tokens:
        raise ConfigError(
            f"max_num_seqs is {config.max_num_seqs:,}; policy 'padded' decodes all requests in one step: it must be at most "
            f"max_num_batched_tokens, {config.max_num_batched_tokens:,}"
        )


def _integer(low: int, high: int, *, optional: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return f"it must be an integer from {low:,} to {high:,}"
        return None

    return check


def _one_of(*allowed: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in allowed else f"it must be one of: {', '.join(allowed)}"

    return check


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it must be true or false"


def _text(*, optional: bool) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is None and optional:
            return None
        return None if isinstance(value, str) and value.strip() else "it must be a text that is not empty"

    return check


def _only_one(value: Any) -> str | None:
    is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
    return None if is_one else "this version runs a model in one process: it must be 1"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "model": _text(optional=False),
    "tokenizer": _text(optional=True),
    "dtype": _one_of(*DTYPES),
    "quantization": lambda value: None if value is None else _one_of(*QUANTIZATIONS)(value),
    "kv_cache_dtype": _one_of(*KV_CACHE_DTYPES),
    "kv_layout": _one_of("block", "slot"),
    "block_size": _integer(1, 256),
    "num_blocks": _integer(1, 2**30, optional=True),
    "max_model_len": _integer(2, 2**24, optional=True),
    "max_num_seqs": _integer(1, 1024),
    "max_num_batched_tokens": _integer(1, 65_536),
    "policy": _one_of(*POLICIES),
    "max_batch_tkv_limit": _integer(1, 2**40, optional=True),
    "async_scheduling": _boolean,
    "speculative_method": lambda value: None if value is None else _one_of(*SPECULATIVE_METHODS)(value),
    "num_speculative_tokens": _integer(1, MAX_SPECULATIVE_TOKENS),
    "prompt_lookup_min": _integer(1, 16),
    "prompt_lookup_max": _integer(1, 16),
    "speculative_max_num_seqs": _integer(1, 1024),
    "enable_prefix_caching": _boolean,
    "num_threads": _integer(0, 256),
    "device": lambda value: _one_of(*dict.fromkeys(device for device, _ in EXECUTORS))(value),
    "distributed_executor_backend": lambda value: _one_of(*dict.fromkeys(backend for _, backend in EXECUTORS))(value),
    "isa": _one_of("auto", "portable", "avx2", "avx512"),
    "enforce_eager": _boolean,
    "tensor_parallel_size": _only_one,
    "pipeline_parallel_size": _only_one,
    "verify": _boolean,
    "program_cache_max_mb": _integer(0, 10**9),
    "hidden_states": _boolean,
    "hidden_states_max_mb": _integer(1, 1_000_000),
    "seed": _integer(0, 2**63 - 1),
    "trace_path": _text(optional=True),
    "trace_max_mb": _integer(1, 1_000_000),
    "trace_logits": _boolean,
}

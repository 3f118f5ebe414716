"""The executor of one process: the model, its cache and its runner, called directly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pellucid.config import EngineConfig
from pellucid.contract.executor import Executable, KVCacheSize
from pellucid.contract.facts import ModelFacts
from pellucid.contract.plan import ModelRunnerOutput, StepPlan
from pellucid.core import abi
from pellucid.errors import PellucidError
from pellucid.executor.loader import (
    LoadedModel,
    kv_bytes_per_token,
    load_model,
    resolve_max_model_len,
    resolve_num_blocks,
)
from pellucid.executor.model_runner import ModelRunner
from pellucid.json_text import well_formed
from pellucid.owners import Exclusive
from pellucid.program.identity import contract_of
from pellucid.program.runner import NativeProgram
from pellucid.program.variant import activation_widths, steerable
from pellucid.program.verify import Verification


class UniProcExecutor:
    """Loads the model and runs plans in this process and thread."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        self._alone, self._config = Exclusive("the executor"), config
        self.context = abi.Context(num_threads=config.num_threads, isa=config.isa)
        try:
            loaded = load_model(config, self.context, progress)
            self.model: LoadedModel = loaded
            max_model_len = resolve_max_model_len(config.max_model_len, loaded.config)
            self.kv_cache, kv = make_kv_cache(config, loaded, max_model_len)
            if config.max_model_len is None:  # a lone request has the whole cache, not more
                max_model_len = min(max_model_len, self.kv_cache.num_blocks * config.block_size)
            executable = self._executable(config, kv)
            self.facts = self._facts(executable, max_model_len)
        except BaseException:
            self.context.close()
            raise
        self.runner = ModelRunner(
            executable,
            self.context,
            self.facts,
            block_size=config.block_size,
            max_blocks_per_request=math.ceil(max_model_len / config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_logit_rows=max_logit_rows(config),
            trace_logits=config.trace_logits,
        )

    def _executable(self, config: EngineConfig, kv: abi.KVCache) -> Executable:
        if config.enforce_eager or self.model.file is None:
            from pellucid.executor.eager import EagerModel

            return EagerModel(config, self.model, self.context, kv)
        return NativeProgram(
            self.context,
            self.model.program,
            kv,
            max_tokens=config.max_num_batched_tokens,
            max_logit_rows=max_logit_rows(config),
        )

    def _facts(self, executable: Executable, max_model_len: int) -> ModelFacts:
        model, config, context, path = self.model, self._config, self.context, Path(self._config.model)
        kv_dtype = kv_cache_dtype(config, model)
        if model.file is not None:
            known: dict[str, Any] = {
                "activations": activation_widths(model.file),
                "steerable": steerable(model.file),
                "contract": contract_of(model.file, context.isa, kv_dtype),
                "tokenizer": model.file.sections["tokenizer"].data,
            }
        else:
            from pellucid.executor.eager import described

            known = described(executable, model, context.isa, kv_dtype)
        return ModelFacts(
            name=well_formed(path.resolve().name if path.exists() else config.model),
            model_type=model.config.model_type,
            dtype=model.dtype,
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            num_layers=model.config.num_hidden_layers,
            max_model_len=max_model_len,
            eos_token_ids=model.eos_token_ids,
            generation_config=model.generation_config,
            fingerprint=model.fingerprint,
            num_threads=context.num_threads,
            **known,
        )

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        """Computes a plan's tokens and samples where it says so. What it reads of the core's buffers is of the step before: one
        thread at a time, others are refused."""
        with self._alone:
            return self.runner.execute(plan)

    def verify(self, on_damage: Callable[[PellucidError], None]) -> Verification | None:
        """Reads the packed model against its checksums at idle priority; a bad one of the cache is removed. None: nothing is packed."""
        if self.model.file is None:
            return None
        return Verification(self.model.file, on_damage, is_ours=self.model.is_ours)

    def close(self) -> None:
        """Frees the program, the cache and the threads."""
        with self._alone:
            self.runner.executable.close()
            self.context.close()


def kv_cache_dtype(config: EngineConfig, model: LoadedModel) -> str:
    """The type of keys and values: as asked, else the model's."""
    return model.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


def max_logit_rows(config: EngineConfig) -> int:
    """Rows of logits that a step can ask for: one a request, and one a draft."""
    if config.speculative_method is None:
        return config.max_num_seqs
    drafting = min(config.max_num_seqs, config.speculative_max_num_seqs)
    return min(config.max_num_batched_tokens, config.max_num_seqs + drafting * config.num_speculative_tokens)


def make_kv_cache(config: EngineConfig, model: LoadedModel, max_model_len: int) -> tuple[KVCacheSize, abi.KVCache]:
    """The cache, sized by the config or by the memory that is free."""
    dtype = kv_cache_dtype(config, model)
    per_token = kv_bytes_per_token(model.config, dtype)
    available = psutil.virtual_memory().available
    num_blocks = resolve_num_blocks(config, max_model_len, per_token, available)
    kv = abi.KVCache(
        n_layers=model.config.num_hidden_layers,
        n_kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
        block_size=config.block_size,
        n_blocks=num_blocks,
        dtype={"float32": abi.F32, "bfloat16": abi.BF16, "int8": abi.I8}[dtype],
    )
    return KVCacheSize(num_blocks, config.block_size, per_token, per_token * config.block_size * num_blocks), kv

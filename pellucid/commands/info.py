"""`pellucid info`: what the machine has and what was chosen; what a model is and what it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import psutil

from pellucid.commands.load import packing_progress
from pellucid.commands.program import program_lines
from pellucid.config import EngineConfig
from pellucid.core import abi
from pellucid.executor.loader import (
    LoadedModel,
    kv_bytes_per_token,
    load_model,
    resolve_max_model_len,
    resolve_num_blocks,
)
from pellucid.executor.uniproc import kv_cache_dtype
from pellucid.ops.spec import OP_KINDS
from pellucid.program.checksums import content_bytes, num_blocks
from pellucid.program.file import ProgramFile
from pellucid.program.runner import load_program
from pellucid.program.scheme import DTYPE_NAMES
from pellucid.program.variant import activation_widths
from pellucid.text.tokenizer import Tokenizer
from pellucid.version import VERSION
from pellucid.weights.hub import cache_dir

Row = tuple[str, str]


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} GiB"


def machine_rows(config: EngineConfig) -> list[Row]:
    """What was detected, and what was chosen from it."""
    cpu = abi.cpu_info()
    context = abi.Context(config.num_threads, config.isa)
    try:
        chosen = f"{context.isa} kernels on {context.num_threads} threads"
    finally:
        context.close()
    features = {
        "AVX2": cpu.has_avx2,
        "AVX-512": cpu.has_avx512,
        "AVX512-BF16": cpu.has_avx512_bf16,
        "AVX512-VNNI": cpu.has_avx512_vnni,
    }
    memory = psutil.virtual_memory()
    has_torch = importlib.util.find_spec("torch") is not None
    backends = "program (native core); eager: " + ("native, reference" if has_torch else "needs torch")
    return [
        ("pellucid", f"{VERSION}, core ABI {abi.library().pld_abi_version()}"),
        ("processor", cpu.model_name or "unknown"),
        ("cores", f"{cpu.physical_cores} physical, {cpu.logical_cores} logical that this process may use"),
        ("instructions", ", ".join(name for name, has in features.items() if has) or "baseline"),
        ("chosen", chosen),
        ("memory", f"{size(memory.available)} free of {size(memory.total)}"),
        ("ops", f"{len(OP_KINDS)}: {', '.join(OP_KINDS)}"),
        ("dispatch", backends),
        ("torch", "installed" if has_torch else "not installed (serving does not need it)"),
        ("cache folder", str(cache_dir())),
    ]


def model_rows(config: EngineConfig) -> tuple[list[Row], list[Row]]:
    """(architecture and sizes, memory table) of a model, which is packed if it was not yet."""
    context = abi.Context(config.num_threads, config.isa)
    try:
        with packing_progress() as progress:
            model = load_model(config, context, progress)
        program = load_program(context, model.program, config.max_num_batched_tokens, config.max_num_seqs)
        arena = program.arena_bytes
        program.close()
    finally:
        context.close()
    return [*_architecture(model), ("checksums", _checksums(model, config.verify))], _memory(config, model, arena)


def _checksums(model: LoadedModel, is_verified: bool) -> str:
    blocks = num_blocks(content_bytes(model.program.path.stat().st_size) or 0)
    if not is_verified:
        return f"{blocks:,} blocks of 1 MiB; those of the weights were not read: --verify"
    return f"all {blocks:,} blocks of 1 MiB are as they were written"


def stored_as(model: LoadedModel) -> str:
    """Types of the matrices, the most bytes first."""
    sizes: dict[str, int] = {}
    for _, rows, _, dtype, _, _, nbytes in model.program.meta["weights"]:
        if rows > 1:
            sizes[DTYPE_NAMES[dtype]] = sizes.get(DTYPE_NAMES[dtype], 0) + nbytes
    return ", ".join(f"{name} ({size(sizes[name])})" for name in sorted(sizes, key=lambda name: -sizes[name]))


def plan_lines(config: EngineConfig) -> Iterator[str]:
    """The plan of a model."""
    yield from program_lines(_program_file(config))


def activation_lines(config: EngineConfig) -> Iterator[str]:
    """The names that `capture` takes, in the order in which they are computed, and the width of each."""
    for name, width in activation_widths(_program_file(config)).items():
        yield f"{name:<40} {width:>8,}"


def _program_file(config: EngineConfig) -> ProgramFile:
    """Of a model, which is packed if it was not yet; the core has checked it."""
    context = abi.Context(config.num_threads, config.isa)
    try:
        with packing_progress() as progress:
            file = load_model(config, context, progress).program
        load_program(context, file, max_tokens=1, max_logit_rows=1).close()
        return file
    finally:
        context.close()


def _architecture(model: LoadedModel) -> list[Row]:
    c, tokenizer = model.config, Tokenizer.from_json(model.program.sections["tokenizer"].data, model.program.path.name)
    weights = model.program.meta["weights"]
    parameters = sum(rows * cols for name, rows, cols, *_ in weights if not name.startswith("constant."))
    window = f"{c.sliding_window:,} positions" if c.sliding_window else "none"
    return [
        ("architecture", c.architecture),
        ("parameters", f"{parameters:,}" + (" (embedding and head are one matrix)" if c.tie_word_embeddings else "")),
        ("layers", f"{c.num_hidden_layers}"),
        ("width", f"{c.hidden_size:,}, ffn {c.intermediate_size:,} ({c.hidden_act})"),
        ("heads", f"{c.num_attention_heads} of {c.head_dim}, {c.num_key_value_heads} for keys and values"),
        ("sliding window", window),
        ("vocabulary", f"{c.vocab_size:,}"),
        ("context", f"{c.max_position_embeddings:,} positions"),
        ("end tokens", ", ".join(map(str, model.eos_token_ids)) or "none"),
        ("chat template", "yes" if tokenizer is not None and tokenizer.chat_template else "no"),
        ("weights stored as", stored_as(model)),
        ("not quantised, and keys and values", f"{model.dtype}; activations float32"),
        ("program", f"{len(model.program.sections['ops']) // abi.OP_DTYPE.itemsize} ops, {model.program.path.name}"),
    ]


def _memory(config: EngineConfig, model: LoadedModel, arena: int) -> list[Row]:
    dtype = kv_cache_dtype(config, model)
    per_token = kv_bytes_per_token(model.config, dtype)
    max_model_len = resolve_max_model_len(config.max_model_len, model.config)
    weights = model.program.sections["data"].nbytes
    available = psutil.virtual_memory().available
    num_blocks = resolve_num_blocks(config, max_model_len, per_token, available)
    tokens = num_blocks * config.block_size
    full = per_token * max_model_len
    return [
        ("weights", size(weights)),
        ("activations", f"{size(arena)} for {config.max_num_batched_tokens} tokens a step"),
        ("KV per token", f"{size(per_token)} ({dtype})"),
        (f"KV of {max_model_len:,} tokens", size(full)),
        (f"KV of {config.max_num_seqs} such requests", size(full * config.max_num_seqs)),
        ("KV cache here", f"{size(tokens * per_token)}: {num_blocks:,} blocks, {tokens:,} tokens"),
        ("fits at once here", f"{tokens / max_model_len:.1f} requests of {max_model_len:,} tokens"),
        ("weights + cache", f"{size(weights + arena + tokens * per_token)} of {size(available)} free"),
    ]


def print_table(title: str, rows: Iterable[Row]) -> None:
    """Two columns; plain text, so that it can be piped."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print(f"{title}\n{'-' * len(title)}")
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}")


def as_dict(rows: Iterable[Row]) -> dict[str, Any]:
    """For --json."""
    return dict(rows)

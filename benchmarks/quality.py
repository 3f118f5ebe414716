"""What rounding costs: perplexity, and Kullback-Leibler divergence from float32, on a fixed text, beside llama.cpp with the same files.

    python benchmarks/quality.py [--model smollm2|smollm2-shuffled] [--peers FOLDER] [--windows 8] [--markdown F]

The text is Python's own documentation of the language (`pydoc_data.topics`), in windows of 512 tokens. The reference is Pellucid's float32
with the bfloat16 weights of SmolLM2-135M-Instruct; every row begins from those weights, as they lie in the packaged file or with their
channels shuffled off its grid (make_models.py). llama.cpp runs in its own environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.config import EngineConfig
from pellucid.contract.batch import BatchInput
from pellucid.core import abi
from pellucid.executor.loader import load_model
from pellucid.executor.uniproc import make_kv_cache
from pellucid.program.runner import NativeProgram
from pellucid.text.tokenizer import Tokenizer

WINDOW, SLICE = 512, 64
F32 = npt.NDArray[np.float32]

# name: format of make_models.py, settings, file for llama.cpp
ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "float32": ("hf", {"dtype": "float32"}, False),
    "bfloat16": ("hf", {"dtype": "bfloat16"}, False),
    "int8": ("hf", {"quantization": "int8"}, False),
    "int8, int8 cache": ("hf", {"quantization": "int8", "kv_cache_dtype": "int8"}, False),
    "int8_channel": ("hf", {"quantization": "int8_channel"}, False),
    "int4": ("hf", {"quantization": "int4"}, False),
    "GGUF BF16": ("gguf", {"dtype": "bfloat16"}, True),
    "GGUF Q8_0": ("q8_0", {}, True),
    "GGUF Q6_K": ("q6_k", {}, True),
    "GGUF Q4_K_M": ("q4_k", {}, True),
    "GGUF Q4_1": ("q4_1", {}, True),
    "GGUF Q4_0": ("q4_0", {}, True),
}

_LLAMA_CPP = """
import json, sys
import llama_cpp as C, numpy as np
path, source, target = sys.argv[1:4]
windows = json.load(open(source))
C.llama_backend_init()
model = C.llama_model_load_from_file(path.encode(), C.llama_model_default_params())
params = C.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = len(windows[0])
params.n_threads = params.n_threads_batch = 2
context = C.llama_init_from_model(model, params)
vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
out = np.lib.format.open_memmap(target, "w+", np.float32, (len(windows), len(windows[0]), vocab))
batch = C.llama_batch_init(len(windows[0]), 0, 1)
for w, window in enumerate(windows):
    C.llama_memory_clear(C.llama_get_memory(context), True)
    batch.n_tokens = len(window)
    for i, token in enumerate(window):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert C.llama_decode(context, batch) == 0
    for i in range(len(window)):
        out[w, i] = np.ctypeslib.as_array(C.llama_get_logits_ith(context, i), shape=(vocab,))
out.flush()
"""


def text_windows(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """The first `count` windows of the documentation, its topics in order of their names."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[: count * WINDOW * 8]
    ids = tokenizer.encode(text)
    print(f"text: sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}, {len(ids):,} tokens", flush=True)
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def own_logits(model: str, settings: dict[str, Any], windows: list[list[int]]) -> Iterator[F32]:
    """[WINDOW, V] of each window."""
    config = EngineConfig(model=model, max_num_batched_tokens=WINDOW, max_num_seqs=SLICE, num_blocks=40, **settings)
    context = abi.Context(0)
    loaded = load_model(config, context)
    _, kv = make_kv_cache(config, loaded, WINDOW)
    program = NativeProgram(context, loaded.file, kv, max_tokens=WINDOW, max_logit_rows=SLICE)
    positions = np.arange(WINDOW, dtype=np.int32)
    for window in windows:
        program.run(
            BatchInput(
                input_ids_T=np.array(window, np.int32),
                positions_T=positions,
                query_start=np.array([0, WINDOW], np.int32),
                seq_lens=np.array([WINDOW], np.int32),
                block_tables=np.arange(WINDOW // config.block_size, dtype=np.int32)[None],
                slot_mapping_T=positions.astype(np.int64),
                logit_rows=positions[:1],
            )
        )
        yield np.concatenate([program.logits_of(positions[i : i + SLICE]).copy() for i in range(0, WINDOW, SLICE)])
    program.close()
    context.close()


def peer_logits(python: Path, model: str, windows: list[list[int]], folder: Path) -> Iterator[F32]:
    """The same, by llama.cpp."""
    source, target = folder / "windows.json", folder / "logits.npy"
    source.write_text(json.dumps(windows))
    subprocess.run([python, "-c", _LLAMA_CPP, model, source, target], check=True, stderr=subprocess.DEVNULL)
    yield from np.load(target, mmap_mode="r")


def log_softmax(logits: F32) -> F32:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def compare(found: Iterator[F32], reference: list[F32], windows: list[list[int]]) -> dict[str, float]:
    """Perplexity of the text; mean and 99th percentile of the divergence; how often the likeliest token is another."""
    losses, divergences, changed = [], [], []
    for logits, expected, window in zip(found, reference, windows, strict=True):
        own = log_softmax(np.asarray(logits))
        losses.append(-own[np.arange(WINDOW - 1), window[1:]])
        divergences.append((np.exp(expected) * (expected - own)).sum(-1))
        changed.append(own.argmax(-1) != expected.argmax(-1))
    divergence = np.concatenate(divergences)
    return {
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
        "divergence": float(divergence.mean()),
        "divergence_99": float(np.percentile(divergence, 99)),
        "changed": float(np.concatenate(changed).mean()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "smollm2-shuffled"), default="smollm2")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    script = Path(__file__).with_name("make_models.py")
    formats = sorted({format for format, _, _ in ROWS.values()})
    made = [sys.executable, script, options.model, "--peers", options.peers, "--formats", *formats]
    paths = json.loads(subprocess.run(made, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    tokenizer = Tokenizer.from_directory(Path(paths["hf"]))
    windows = text_windows(tokenizer, options.windows)
    reference = [log_softmax(logits) for logits in own_logits(paths["hf"], ROWS["float32"][1], windows)]
    lines = ["| weights | engine | perplexity | mean KL | 99 % KL | other first token |", "|---|---|---|---|---|---|"]
    for name, (format, settings, has_peer) in ROWS.items():
        results = {"pellucid": compare(own_logits(paths[format], settings, windows), reference, windows)}
        if has_peer:
            with tempfile.TemporaryDirectory() as folder:
                python = options.peers / "llama.cpp" / "bin" / "python"
                found = peer_logits(python, paths[format], windows, Path(folder))
                results["llama.cpp"] = compare(found, reference, windows)
        for engine, r in results.items():
            lines.append(
                f"| {name} | {engine} | {r['perplexity']:.3f} | {r['divergence']:.5f} | {r['divergence_99']:.4f} |"
                f" {100 * r['changed']:.1f} % |"
            )
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""A tiny Llama in GGUF whose matrices are random blocks of chosen types; no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from utils.quantised import STORED, random_blocks

_WIDTH, _FFN, _LAYERS, _HEADS, _KV_HEADS, _VOCAB = 256, 512, 2, 4, 2, 288
_SHAPES = {
    "attn_q": (_WIDTH, _WIDTH),
    "attn_k": (_KV_HEADS * _WIDTH // _HEADS, _WIDTH),
    "attn_v": (_KV_HEADS * _WIDTH // _HEADS, _WIDTH),
    "attn_output": (_WIDTH, _WIDTH),
    "ffn_gate": (_FFN, _WIDTH),
    "ffn_up": (_FFN, _WIDTH),
    "ffn_down": (_WIDTH, _FFN),
}
# Every stored type, and fused matrices of several types.
MIXED_TYPES = {
    "attn_q": "q4_k",
    "attn_k": "q4_k",
    "attn_v": "q6_k",
    "attn_output": "q8_0",
    "ffn_gate": "q4_0",
    "ffn_up": "q4_1",
    "ffn_down": "q5_k",
    "token_embd": "q6_k",
}


def build_tiny_gguf(folder: Path, types: Mapping[str, str], *, context_length: int = 512) -> Path:
    """Writes `tiny.gguf` into `folder`; `types` names the type of each matrix, `token_embd` among them (the head is tied)."""
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(context_length)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(_VOCAB)
    names = ("token_embd", *(f"blk.{layer}.{matrix}" for layer in range(_LAYERS) for matrix in _SHAPES))
    for seed, name in enumerate(names, 1):
        matrix = name.split(".")[-1]
        rows, cols = (_VOCAB, _WIDTH) if matrix == "token_embd" else _SHAPES[matrix]
        blocks = random_blocks(types[matrix], rows, cols, seed)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=STORED[types[matrix]][2])
    norms = [f"blk.{layer}.{norm}_norm" for layer in range(_LAYERS) for norm in ("attn", "ffn")]
    for name in ("output_norm", *norms):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Model files made from random recipes."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models

from fuzzing.programs import Recipe, recipe_of
from pellucid.core import abi
from pellucid.program.builder import FORMAT_VERSION, PackedWeight, encode_plan, encode_weights
from pellucid.program.file import Bytes, aligned, write_program_file
from pellucid.text.tokenizer import Tokenizer


def file_recipe(seed: int, number: int) -> Recipe:
    """A recipe that a model file can hold: without buffers that the caller writes."""
    at = 1000 * (number + 1)
    while True:
        recipe = recipe_of(seed, at)
        if not recipe.inputs:
            return recipe
        at += 1


def texts_of(recipe: Recipe, *, with_tokenizer: bool) -> dict[str, object]:
    """The documents beside a program: a configuration of its shape, and a tokenizer of bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocab_size,
        "hidden_size": int(recipe.buffers["width"][recipe.hidden]),
        "intermediate_size": 64,
        "num_hidden_layers": max(recipe.n_layers, 1),
        "num_attention_heads": recipe.n_kv_heads,
        "num_key_value_heads": recipe.n_kv_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    }
    return {
        "config": config,
        "generation_config": {"eos_token_id": [2], "temperature": 0.7},
        "tokenizer": _tokenizer() if with_tokenizer else None,
    }


@lru_cache(maxsize=1)
def _tokenizer() -> dict[str, object]:
    vocab = {chr(code): code - 97 for code in range(97, 123)}
    model = models.WordLevel(vocab, unk_token="a")
    with tempfile.TemporaryDirectory() as folder:
        Backend(model).save(f"{folder}/tokenizer.json")
        return Tokenizer.from_directory(Path(folder)).to_bundle()


def write_model(path: Path, recipe: Recipe, texts: dict[str, object]) -> None:
    """Writes a model file as `pellucid compile` does."""
    placed, offset = [], 0
    for index, w in enumerate(recipe.weights):
        nbytes = abi.packed_bytes(w.rows, w.cols, w.dtype)
        if w.layout == abi.ROW_MAJOR:
            nbytes = w.rows * abi.row_bytes(w.dtype, w.cols)
        placed.append(PackedWeight(f"w{index}", w.rows, w.cols, w.dtype, w.layout, offset, nbytes))
        offset = aligned(offset + nbytes)
    total = placed[-1].offset + placed[-1].nbytes

    def fill(data: Bytes) -> None:
        for weight, place in zip(recipe.weights, placed, strict=True):
            data[place.offset : place.offset + place.nbytes] = weight.data[: place.nbytes]

    model = {
        "n_layers": max(recipe.n_layers, 1),
        "n_kv_heads": recipe.n_kv_heads,
        "head_dim": recipe.head_dim,
        "max_positions": 512,
        "kv_dtype": abi.BF16,
        "end_tokens": [1, 2],
    }
    meta = {
        "kind": "program",
        "model": "random",
        "source": "random",
        "dtype": "bfloat16",
        "format_version": FORMAT_VERSION,
        "n_forward_ops": recipe.n_forward_ops,
        "hidden": recipe.hidden,
        "logits": recipe.logits,
        "vocab_size": recipe.vocab_size,
        "activations": {},
        "weights": [place.as_meta() for place in placed],
    }
    small = {
        "plan": encode_plan(recipe.recording, recipe.vocab_size, model).tobytes(),
        "weights": encode_weights(placed).tobytes(),
        "ops": recipe.ops.tobytes(),
        "buffers": recipe.buffers.tobytes(),
        **{name: json.dumps(text).encode() for name, text in texts.items()},
    }
    write_program_file(path, meta, small, total, fill)

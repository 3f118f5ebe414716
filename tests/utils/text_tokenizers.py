"""Small real vocabularies, trained in a moment, as tokenizer.json directories and as GGUF metadata."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what we'll see, isn't it? I'm sure they've gone.",
    "In 1984 there were 365 days; 3.14159 is not 22/7, and 12 345 678 is a number.",
    "def main():\n    for i in range(10):\n        print(i)\n\n    return  0\n",
    "Größe, naïve, café, e\u0301tude, señor, Straße, œuvre.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "你好，世界！今天天气很好。日本語のテキストです。こんにちは。한국어 문장입니다.",
    "नमस्ते दुनिया। مرحبا بالعالم. שלום עולם. สวัสดีชาวโลก",
    "emoji 😀 😃 👩‍👩‍👧 🇫🇷 ❤️ 🏳️‍🌈 end",
]
SAMPLES = [
    *CORPUS,
    "",
    " ",
    "   three  leading and  12  twice",
    "\n\n\ttabs\r\nand\rreturns \n x",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<s> </s> <unk> <0x0A>",
    "\u2581\u2581x \u2581",
    "a" * 40,
    "\x00\x7f\u200b\ufffd\ufeff",
    "ᚠᛇᚻ 𓀀 \U0001f9ff",
    "DON'T we'LL 123456 ABCdef",
]
BYTE_LEVEL_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_level_backend(pattern: str | None = None) -> Tokenizer:
    """Byte-level BPE with some 670 tokens; `pattern` cuts words, GPT-2's own by default."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(BYTE_LEVEL_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


@functools.cache
def sentencepiece_pieces() -> tuple[tuple[str, float, int], ...]:
    """(token, score, GGUF type) as SentencePiece BPE writes them: specials, 256 bytes, pieces best first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    # Which of the rare characters fall to the limit is not fixed between runs; plain letters always stay.
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, limit_alphabet=150, initial_alphabet=letters)
    tokenizer.train_from_iterator(CORPUS, trainer)
    alphabet = {token for token in tokenizer.get_vocab() if len(token) == 1}
    merged = sorted((i, token) for token, i in tokenizer.get_vocab().items() if token not in alphabet)
    specials = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<|im_end|>", 0.0, 3), ("<think>", 0.0, 4)]
    bytes_ = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces = [(token, -float(rank), 1) for rank, (_, token) in enumerate(merged)]
    single = [(token, -float(len(merged) + rank), 1) for rank, token in enumerate(sorted(alphabet))]
    return (*specials, *bytes_, *pieces, *single)


def sentencepiece_metadata(**changes: object) -> dict[str, object]:
    """GGUF metadata of the SentencePiece vocabulary; `changes` by the last part of the key, None removes."""
    tokens, scores, types = zip(*sentencepiece_pieces(), strict=True)
    return _metadata(
        {
            "model": "llama",
            "pre": "default",
            "tokens": list(tokens),
            "scores": list(scores),
            "token_type": list(types),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        },
        changes,
    )


def byte_level_metadata(backend: Tokenizer | None = None, **changes: object) -> dict[str, object]:
    """GGUF metadata of a byte-level vocabulary; `changes` as above."""
    model = json.loads((backend or byte_level_backend()).to_str())
    vocab = {**model["model"]["vocab"], **{token["content"]: token["id"] for token in model["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [3 if token in BYTE_LEVEL_SPECIALS else 4 if token == "<think>" else 1 for token in tokens]
    return _metadata(
        {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": tokens,
            "token_type": types,
            "merges": [" ".join(merge) for merge in model["model"]["merges"]],
            "bos_token_id": vocab["<|im_start|>"],
            "eos_token_id": vocab["<|im_end|>"],
            "unknown_token_id": vocab["<|endoftext|>"],
            "padding_token_id": vocab["<|endoftext|>"],
        },
        changes,
    )


def _metadata(values: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    metadata: dict[str, object] = {"general.architecture": changes.pop("architecture", "llama")}
    template = changes.pop("chat_template", CHAT_TEMPLATE)
    values.update(changes)
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None})
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return metadata


def write_gguf(metadata: dict[str, object], path: Path) -> Path:
    """A GGUF file with this metadata and the least that makes it a model configuration."""
    architecture = str(metadata["general.architecture"])
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_string(key, str(value))
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path: Path, backend: Tokenizer, tokenizer_config: dict[str, object], **files: object) -> Path:
    """A Hugging Face directory; `files` maps names without ".json" to what they hold."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    for name, value in {"tokenizer_config": tokenizer_config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path

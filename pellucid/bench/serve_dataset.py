"""What is asked of a server: random prompts of exact lengths, prompts with common beginnings, or a file. The same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pellucid.bench.figures import spread_lengths
from pellucid.errors import InvalidRequestError
from pellucid.json_text import check_values, loads
from pellucid.text.tokenizer import Tokenizer

# Low ids are special tokens in most vocabularies.
_FIRST_TOKEN = 100
_FIT_TRIES = 16


@dataclass(frozen=True)
class LoadRequest:
    """A prompt as token ids, text or messages, its number of tokens where it is known, and how many are asked for."""

    prompt: list[int] | str | list[dict[str, Any]]
    prompt_tokens: int | None
    output_tokens: int


def id_pool(vocab_size: int) -> range:
    """The ids that prompts are drawn from where any will do.

    Raises:
        InvalidRequestError: no id is left in so small a vocabulary.
    """
    if vocab_size < 1:
        raise InvalidRequestError("random_vocab_size", f"is {vocab_size}", limit="it must be at least 1")
    return range(min(_FIRST_TOKEN, vocab_size - 1), vocab_size)


def word_pool(tokenizer: Tokenizer) -> list[int]:
    """Ids of whole words with a space before them: a text of such has as many tokens as words. In order.

    Raises:
        InvalidRequestError: the vocabulary has too few of them.
    """
    found = []
    for token in range(tokenizer.vocab_size):
        text = "" if token in tokenizer.special_token_ids else tokenizer.raw_decode([token], False)
        if text.strip().isascii() and text.strip().isalpha() and tokenizer.encode(f" {text.strip()}", False) == [token]:
            found.append(token)
    if len(found) < 2:
        raise InvalidRequestError(
            "tokenizer", ("the tokenizer has no whole words to make texts of an exact length from",)
        )
    return found


def random_requests(
    pool: Sequence[int],
    count: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[LoadRequest]:
    """`prefix_len` tokens that all share, then tokens of its own; lengths as `spread_lengths` draws them.

    Raises:
        InvalidRequestError: a length or the ratio is out of range.
    """
    _at_least("random_prefix_len", prefix_len, 0)
    _at_least("random_output_len", output_len, 1)
    _at_least("random_input_len + random_prefix_len", input_len + prefix_len, 1)
    if not 0 <= range_ratio < 1:
        raise InvalidRequestError(
            None, f"random_range_ratio is {range_ratio}", limit="it must be at least 0 and below 1"
        )
    draw = random.Random(seed)
    prefix = _ids(draw, pool, prefix_len)
    inputs = spread_lengths(input_len, range_ratio, count, seed) if input_len else [0] * count
    outputs = spread_lengths(output_len, range_ratio, count, seed + 1)
    return [_of_ids(prefix + _ids(draw, pool, own), wanted) for own, wanted in zip(inputs, outputs, strict=True)]


def prefix_requests(
    pool: Sequence[int],
    count: int,
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    seed: int = 0,
) -> list[LoadRequest]:
    """`num_prefixes` beginnings, each of count // num_prefixes prompts with an end of its own, shuffled.

    Raises:
        InvalidRequestError: a length is out of range, or there are more prefixes than prompts.
    """
    _at_least("prefix_repetition_prefix_len", prefix_len, 0)
    _at_least("prefix_repetition_suffix_len", suffix_len, 0 if prefix_len else 1)
    _at_least("prefix_repetition_output_len", output_len, 1)
    _at_least("prefix_repetition_num_prefixes", num_prefixes, 1)
    if count < num_prefixes:
        raise InvalidRequestError(
            None, f"num_prompts is {count}", limit=f"prefix_repetition_num_prefixes is {num_prefixes}"
        )
    draw = random.Random(seed)
    made = []
    for _ in range(num_prefixes):
        prefix = _ids(draw, pool, prefix_len)
        made += [_of_ids(prefix + _ids(draw, pool, suffix_len), output_len) for _ in range(count // num_prefixes)]
    draw.shuffle(made)
    return made


def custom_requests(path: Path, count: int, *, output_len: int, is_chat: bool) -> list[LoadRequest]:
    """A file of JSON lines with `prompt` (text, ids) or `messages`, and `output_tokens`; begun again where it is too short.

    Raises:
        InvalidRequestError: the file cannot be read, or a line (named) is not of this kind.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a JSON text may hold other ends of lines
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise InvalidRequestError("dataset_path", f"{path} cannot be read: {error}") from None
    try:
        made = [_of_line(line, i, output_len, is_chat) for i, line in enumerate(lines, 1) if line.strip()]
    except InvalidRequestError as error:
        raise InvalidRequestError(error.param, (f"dataset_path {path}: {error}",)) from None
    if not made:
        raise InvalidRequestError("dataset_path", f"{path} has no lines")
    return [made[i % len(made)] for i in range(count)]


def as_texts(requests: Sequence[LoadRequest], tokenizer: Tokenizer, pool: Sequence[int]) -> list[LoadRequest]:
    """Prompts of ids as texts of the same number of tokens; others as they are.

    Raises:
        InvalidRequestError: no text of that length was found.
    """
    return [
        replace(one, prompt=_fitting_text(one.prompt, tokenizer, pool)) if _is_ids(one.prompt) else one
        for one in requests
    ]


def payload_of(request: LoadRequest, is_chat: bool) -> dict[str, Any]:
    """The part of a request's body that says what is asked.

    Raises:
        InvalidRequestError: a chat is to be made of token ids.
    """
    if not is_chat:
        return {"prompt": request.prompt, "max_tokens": request.output_tokens}
    if _is_ids(request.prompt):
        raise InvalidRequestError(
            None, "a chat takes text, not token ids", limit="--tokenizer makes texts of exact lengths"
        )
    messages = request.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"messages": messages, "max_tokens": request.output_tokens}


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)


def _ids(draw: random.Random, pool: Sequence[int], count: int) -> list[int]:
    return [pool[draw.randrange(len(pool))] for _ in range(count)]


def _of_ids(ids: list[int], output_tokens: int) -> LoadRequest:
    return LoadRequest(ids, len(ids), output_tokens)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidRequestError(name, f"is {value}", limit=f"it must be at least {least}")


def _fitting_text(prompt: Any, tokenizer: Tokenizer, pool: Sequence[int]) -> str:
    """Words put next to each other may still join to other tokens: cut or lengthened until the number is right."""
    ids = list(prompt)
    for turn in range(_FIT_TRIES):
        text = tokenizer.raw_decode(ids, True)
        excess = len(tokenizer.encode(text, add_special_tokens=False)) - len(prompt)
        if not excess:
            return text
        ids = ids[: max(1, len(ids) - excess)] if excess > 0 else ids + [pool[turn % len(pool)]] * -excess
    raise InvalidRequestError(
        "tokenizer", (f"no text of exactly {len(prompt):,} tokens was found with this tokenizer",)
    )


def _of_line(line: str, number: int, output_len: int, is_chat: bool) -> LoadRequest:
    try:
        found = loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("dataset_path", (f"line {number} is not JSON: {error}",)) from None
    if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
        raise InvalidRequestError("dataset_path", (f"line {number} needs either prompt or messages",))
    check_values(found, f"line {number}")
    wanted = found.get("output_tokens", output_len)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise InvalidRequestError(
            "output_tokens", (f"line {number}: output_tokens is",), wanted, "it must be at least 1"
        )
    prompt = found.get("prompt", found.get("messages"))
    if "messages" in found and not is_chat:
        raise InvalidRequestError(
            "dataset_path", (f"line {number} has messages",), limit="they need --backend openai-chat"
        )
    if not prompt or not isinstance(prompt, (str, list)) or (is_chat and _is_ids(prompt)):
        takes = "messages or a text" if is_chat else "a text or token ids"
        raise InvalidRequestError(
            "prompt", (f"line {number}: the prompt is {str(prompt)[:40]!r}",), limit=f"it takes {takes}"
        )
    return LoadRequest(prompt, len(prompt) if _is_ids(prompt) else None, wanted)

"""Reads a tokenizer from a Hugging Face directory the way transformers' AutoTokenizer does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pellucid.errors import TokenizerError
from pellucid.text.backend import SpecialTokens, backend_from_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_directory(directory: Path) -> tuple[Any, SpecialTokens]:
    """(tokenizers.Tokenizer, special tokens) of a model directory.

    What stands around a sequence is what tokenizer.json stores; the flags `add_bos_token` and `add_eos_token` of
    tokenizer_config.json are for vocabularies without that file and are not read.

    Raises:
        TokenizerError: no tokenizer.json, or a file that is not what its name says.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"no tokenizer.json in {directory}; other tokenizer files are not read")
    backend = backend_from_json(_read_text(file), str(file))
    config = _read_json(directory / "tokenizer_config.json")
    names = _named_tokens(config, _read_json(directory / "special_tokens_map.json"))
    _add_missing_tokens(backend, config, names)
    ids = {name: backend.token_to_id(text) for name, text in names.items()}
    special = SpecialTokens(
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=_eos_token_ids(directory, ids.get("eos_token")),
        pad_token_id=ids.get("pad_token"),
        names=names,
        chat_templates=_chat_templates(directory, config),
    )
    return backend, special


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a {type(value).__name__}; it must be an object")
    return value


def _token_text(value: object, origin: str) -> str:
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise TokenizerError(f"{origin} is {value!r}; it must be a string or an object with `content`")
    return text


def _named_tokens(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str]:
    merged = {**special_tokens_map, **config}
    return {name: _token_text(merged[name], name) for name in NAMED_TOKENS if merged.get(name) is not None}


def _extra_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key) or ()
        for value in values.values() if isinstance(values, Mapping) else values:
            yield _token_text(value, key)


def _add_missing_tokens(backend: Any, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Adds the tokens that only the configuration knows: it is the later word in a model that was extended."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing: dict[str, Any] = {}
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping) or not all(key.isdecimal() for key in added):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder must be an object with ids as keys")
    for token_id in sorted(added, key=int):
        value = added[token_id]
        text = _token_text(value, f"added_tokens_decoder[{token_id}]")
        flags = {flag: bool(value[flag]) for flag in _ADDED_TOKEN_FLAGS if isinstance(value, Mapping) and flag in value}
        flags["special"] = flags.get("special", False) or text in names.values()
        if text not in known:
            missing.setdefault(text, AddedToken(text, **flags))
    for text in (*names.values(), *_extra_tokens(config)):
        if text not in known:
            missing.setdefault(text, AddedToken(text, special=True, normalized=False))
    if missing:
        backend.add_tokens(list(missing.values()))


def _eos_token_ids(directory: Path, own: int | None) -> tuple[int, ...]:
    """The tokenizer's eos, then what generation_config.json (or, without one, config.json) adds."""
    generation = _read_json(directory / "generation_config.json")
    config = generation or _read_json(directory / "config.json")
    more = config.get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in more):
        raise TokenizerError(f"eos_token_id is {more!r}; it must be an integer or a list of them")
    return tuple(dict.fromkeys([*([] if own is None else [own]), *more]))


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return {"default": _read_text(jinja)}
    value = _read_json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError) as error:
        raise TokenizerError("chat_template must be a string or a list of objects with name and template") from error
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TokenizerError("chat_template: names and templates must be strings")
    return templates

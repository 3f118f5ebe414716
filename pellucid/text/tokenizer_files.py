"""Reads a tokenizer from a Hugging Face directory the way transformers' AutoTokenizer does."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pellucid.errors import TokenizerError, WeightFormatError, shown
from pellucid.text.backend import ID_LIMIT, SpecialTokens, backend_from_json, library_errors
from pellucid.weights.json_files import GIT_LFS_POINTER, refuse_pointer

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_ID_DIGITS = 10
MAX_ID = 1 << 24  # as of a model's vocabulary; the library makes a list of all ids below the greatest


def read_directory(directory: Path) -> tuple[Any, SpecialTokens, int]:
    """(tokenizers.Tokenizer, special tokens, first id beyond the vocabulary) of a model directory.

    What stands around a sequence is what tokenizer.json stores; the flags `add_bos_token` and `add_eos_token` of
    tokenizer_config.json are for vocabularies without that file and are not read.

    Raises:
        TokenizerError: no tokenizer.json, or a file that is not what its name says.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"no tokenizer.json in {directory}; other tokenizer files are not read")
    backend = backend_from_json(_read_text(file), str(file))
    config, specials = (_read_json(directory / name) for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE))
    names = _named_tokens(config, specials)
    with library_errors(f"{directory / CONFIG_FILE} and {file.name} do not fit together"):
        _add_missing_tokens(backend, config, names)
    ids = {name: backend.token_to_id(text) for name, text in names.items()}
    special = SpecialTokens(
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=_eos_token_ids(directory, ids.get("eos_token")),
        pad_token_id=ids.get("pad_token"),
        names=names,
        chat_templates=_chat_templates(directory, config),
    )
    return backend, special, _id_limit(backend, file)


def _id_limit(backend: Any, file: Path) -> int:
    """The first id beyond the vocabulary. Refuses ids that no model has, and vocabularies that cannot be kept."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    token, last = max(vocabulary.items(), key=operator.itemgetter(1), default=("", -1))
    if last >= MAX_ID:
        raise TokenizerError(f"{file}: token {shown(token)} has id {last}; ids must be below {MAX_ID}")
    if len(set(vocabulary.values())) < len(vocabulary):  # of two tokens with one id the library keeps one
        backend_from_json(backend.to_str(), f"{file}: two tokens have one id, and without one of them it")
    return last + 1


def _read_text(file: Path, encoding: str = "utf-8-sig") -> str:
    try:
        text = file.read_text(encoding=encoding)
        refuse_pointer(file, text[: len(GIT_LFS_POINTER)].encode(errors="replace"))
    except (OSError, UnicodeDecodeError, WeightFormatError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from error
    return text


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
        raise TokenizerError(f"{origin} is {shown(value)}; it must be a string or an object with `content`")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise TokenizerError(f"{origin} is {shown(text)}; it must be well-formed Unicode")
    return text


def _named_tokens(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in NAMED_TOKENS:
        file, values = (CONFIG_FILE, config) if name in config else (SPECIAL_TOKENS_FILE, special_tokens_map)
        if values.get(name) is not None:
            found[name] = _token_text(values[name], f"{file}: {name}")
    return found


def _extra_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key) or []
        if not isinstance(values, (list, Mapping)):
            raise TokenizerError(f"{CONFIG_FILE}: {key} is {shown(values)}; it must be a list or an object")
        for value in values.values() if isinstance(values, Mapping) else values:
            yield _token_text(value, f"{CONFIG_FILE}: {key}")


def _add_missing_tokens(backend: Any, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Adds the tokens that only the configuration knows: it is the later word in a model that was extended."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing: dict[str, Any] = {}
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping) or not all(_is_id(key) for key in added):
        raise TokenizerError(f"{CONFIG_FILE}: added_tokens_decoder must be an object with ids as keys")
    for token_id in sorted(added, key=int):
        value = added[token_id]
        text = _token_text(value, f"{CONFIG_FILE}: added_tokens_decoder[{token_id}]")
        flags = {flag: bool(value[flag]) for flag in _ADDED_TOKEN_FLAGS if isinstance(value, Mapping) and flag in value}
        flags["special"] = flags.get("special", False) or text in names.values()
        if text not in known:
            missing.setdefault(text, AddedToken(text, **flags))
    for text in (*names.values(), *_extra_tokens(config)):
        if text not in known:
            missing.setdefault(text, AddedToken(text, special=True, normalized=False))
    if missing:
        backend.add_tokens(list(missing.values()))


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS


def _eos_token_ids(directory: Path, own: int | None) -> tuple[int, ...]:
    """The tokenizer's eos, then what generation_config.json (or, without one, config.json) adds."""
    file = directory / "generation_config.json"
    config = _read_json(file)
    if not config:
        file = directory / "config.json"
        config = _read_json(file)
    more = config.get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in more):
        raise TokenizerError(f"{file}: eos_token_id is {shown(more)}; it must be an integer or a list of them")
    more = [token_id for token_id in more if 0 <= token_id < ID_LIMIT]
    return tuple(dict.fromkeys([*([] if own is None else [own]), *more]))


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return {"default": _read_text(jinja, "utf-8")}
    own = _read_json(directory / "chat_template.json")
    file = "chat_template.json" if "chat_template" in own else CONFIG_FILE
    value = own.get("chat_template", config.get("chat_template"))
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            f"{file}: chat_template must be a string or a list of objects with name and template"
        ) from error
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TokenizerError(f"{file}: names and templates of chat_template must be strings")
    return templates

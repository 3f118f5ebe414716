"""The tokenizer of a model: text to ids and back, its special tokens and its chat template.

Sources are a Hugging Face directory, GGUF metadata or a bundle (`to_bundle`, kept in the packed model
cache). The work is done by the `tokenizers` library, which is imported on first use.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from pellucid.contract.facts import ModelFacts
from pellucid.errors import InvalidRequestError, TokenizerError, items_of, shown
from pellucid.json_text import lone_surrogate
from pellucid.text.backend import ID_LIMIT, SpecialTokens, backend_from_json, library_errors

if TYPE_CHECKING:
    from datetime import datetime

_BUNDLE_FORMAT = 1
_PIECES = TypeVar("_PIECES")


# By the digest of their bundle.
_living: WeakValueDictionary[str, Tokenizer] = WeakValueDictionary()
_LONG_TEXT = 4096  # characters; about a millisecond


class Decoding(enum.Enum):
    """How token pieces become text, as far as the incremental detokenizer knows better than to ask."""

    BYTE_LEVEL = "byte_level"
    BYTE_FALLBACK = "byte_fallback"
    BYTE_FALLBACK_STRIP = "byte_fallback_strip"
    OTHER = "other"


class Tokenizer:
    """A vocabulary with its special tokens. Immutable once built; safe to share between threads.

    Built by `from_directory`, `from_gguf` or `from_bundle`. Ids equal those of transformers'
    `AutoTokenizer` on the same files.
    """

    def __init__(self, backend: Any, special: SpecialTokens, id_limit: int | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = special
        self._vocab_size = int(backend.get_vocab_size(with_added_tokens=True))
        if id_limit is None:
            id_limit = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._id_limit = id_limit
        self._special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        for name, token_id in (
            ("bos_token_id", special.bos_token_id),
            ("pad_token_id", special.pad_token_id),
            *(("eos_token_id", token_id) for token_id in special.eos_token_ids),
        ):
            if token_id is not None and not (type(token_id) is int and 0 <= token_id < ID_LIMIT):
                raise TokenizerError(f"{name} is {token_id!r}; it must be an integer in 0..{ID_LIMIT - 1}")
        self._cache: dict[tuple[object, bool], Any] = {}
        self._fingerprint: str | None = None
        self.decoding = _decoding_kind(backend.decoder)

    # --- sources -----------------------------------------------------------------------------------------

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja or chat_template.json, generation_config.json and config.json (for eos).

        Raises:
            TokenizerError: no tokenizer.json there, or a file that cannot be used (named).
        """
        from pellucid.text.tokenizer_files import read_directory

        return cls(*read_directory(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Builds the vocabulary that GGUF metadata describes (keys `tokenizer.ggml.*`, `tokenizer.chat_template`).

        Raises:
            TokenizerError: metadata that is missing, of a wrong type or contradictory, or of an unknown kind (the
                text lists the known).
        """
        from pellucid.text.gguf_vocabulary import read_gguf

        text, special, id_limit = read_gguf(metadata)
        return cls(backend_from_json(text, "the GGUF vocabulary"), special, id_limit)

    @classmethod
    def from_bundle(cls, bundle: Mapping[str, object]) -> Tokenizer:
        """The inverse of `to_bundle`.

        Raises:
            TokenizerError: not a bundle of this format.
        """
        value: Any = bundle if isinstance(bundle, Mapping) else {}
        if value.get("format") != _BUNDLE_FORMAT:
            raise TokenizerError(f"tokenizer bundle has format {value.get('format')!r}; expected {_BUNDLE_FORMAT}")
        try:
            special = SpecialTokens(
                bos_token_id=value["bos_token_id"],
                eos_token_ids=tuple(value["eos_token_ids"]),
                pad_token_id=value["pad_token_id"],
                names=_texts(value["special_tokens"]),
                chat_templates=_texts(value["chat_templates"]),
            )
            return cls(backend_from_json(value["tokenizer_json"], "the bundle"), special, int(value["id_limit"]))
        except TokenizerError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TokenizerError(f"tokenizer bundle is incomplete or has wrong types: {error!r}") from error

    @classmethod
    def of(cls, facts: ModelFacts) -> Tokenizer | None:
        """The tokenizer of a model, one in a process for all who ask; None: the model has none.

        Raises:
            TokenizerError: its bundle is damaged.
        """
        key = facts.contract.tokenizer
        found = _living.get(key)
        if found is None:
            found = cls.from_json(facts.tokenizer, facts.name)
        return None if found is None else _living.setdefault(key, found)

    @classmethod
    def from_json(cls, text: bytes | memoryview, origin: str) -> Tokenizer | None:
        """From the JSON of a bundle; None for null.

        Raises:
            TokenizerError: it is damaged; `origin` says of what.
        """
        try:
            bundle = json.loads(bytes(text))
            return None if bundle is None else cls.from_bundle(bundle)
        except (ValueError, RecursionError) as error:  # a TokenizerError is a ValueError
            raise TokenizerError(f"{origin}: the tokenizer is damaged: {error}") from None

    def to_bundle(self) -> dict[str, object]:
        """All of it as one JSON-able dict."""
        return {
            "format": _BUNDLE_FORMAT,
            "tokenizer_json": self._backend.to_str(),
            "id_limit": self._id_limit,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "special_tokens": dict(self._special.names),
            "chat_templates": dict(self._special.chat_templates),
        }

    # --- text and ids ------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`; with what the vocabulary puts around a sequence (BOS, EOS) unless told otherwise.

        Raises:
            InvalidRequestError: `text` is not a `str` or holds a lone surrogate.
            TokenizerError: the vocabulary has no token for a part of it, and none for what is unknown.
        """
        _check_text(text)
        ids: list[int]
        with library_errors("the tokenizer cannot encode this text"):
            if len(text) < _LONG_TEXT:
                ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            else:  # It lets go of the interpreter lock, which `encode` holds. Not for all: it starts threads, of which a fork would warn.
                ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            InvalidRequestError: an id is not an integer or lies outside the vocabulary.
        """
        ids = list(ids)
        for index, token_id in enumerate(ids):
            if not hasattr(token_id, "__index__"):
                raise InvalidRequestError(f"token_ids[{index}]", "is", token_id, "it must be an integer")
        if ids and not (min(ids) >= 0 and max(ids) < self._id_limit):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self._id_limit)
            raise InvalidRequestError(
                "token_ids", f": token id {shown(wrong)} is not in the vocabulary 0..{self._id_limit - 1}"
            )
        return self.raw_decode(ids, skip_special_tokens)

    def raw_decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """`decode` without the checks: ids beyond the vocabulary have no text."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's spelling of an id ("Ġthe", "<0x0A>"); "" where the vocabulary has a hole.

        Raises:
            InvalidRequestError: the id lies outside the vocabulary.
        """
        if not 0 <= token_id < self._id_limit:
            raise InvalidRequestError(
                "token_ids", f": token id {shown(token_id)} is not in the vocabulary 0..{self._id_limit - 1}"
            )
        return self.raw_token(token_id) or ""

    def raw_token(self, token_id: int) -> str | None:
        """`id_to_token` without the checks: None for an id without a token."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry in its own spelling, or None."""
        _check_text(token)
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    # --- chat --------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        clock: Callable[[], datetime] | None = None,
        **template_kwargs: object,
    ) -> str:
        """Renders a conversation with the model's chat template (or the given one).

        With `tools`, a template named "tool_use" is preferred where the model has one. The template sees the
        special tokens ("bos_token", …) and `template_kwargs` as variables, and `clock` (default: local time)
        through `strftime_now`.

        Raises:
            InvalidRequestError: malformed messages (names the index), or the template refuses them.
            TokenizerError: the model has no template, or it is broken or exceeds its bounds.
        """
        from pellucid.text.chat_template import render_chat
        from pellucid.text.tool_dialects import MAX_TOOLS

        source = chat_template
        if tools is not None:
            tools = items_of("tools", tools, "functions", MAX_TOOLS)
        if source is None:
            source = self.tool_template if tools else self.chat_template
        if source is None:
            raise TokenizerError("this model has no chat template; pass `chat_template` or use raw text")
        return render_chat(
            source,
            messages,
            {**self._special.names, **template_kwargs},
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            clock=clock,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        clock: Callable[[], datetime] | None = None,
        **template_kwargs: object,
    ) -> list[int]:
        """The ids of the rendered conversation. No special tokens are added: the template has written them."""
        text = self.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            clock=clock,
            **template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    # --- facts -------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._special.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation; the tokenizer's own eos first."""
        return self._special.eos_token_ids

    @property
    def pad_token_id(self) -> int | None:
        return self._special.pad_token_id

    @property
    def chat_template(self) -> str | None:
        """The source of the default template."""
        return self._special.chat_templates.get("default")

    @property
    def tool_template(self) -> str | None:
        """The source of the template for conversations with tools."""
        templates = self._special.chat_templates
        return templates.get("tool_use", templates.get("default"))

    @property
    def fingerprint(self) -> str:
        """A name for the vocabulary: equal ones have equal names, whatever file they came from."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        return self._fingerprint

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        return self._special_token_ids

    def cached(self, build: Callable[[Tokenizer, bool], _PIECES], skip_special_tokens: bool) -> _PIECES:
        """`build(self, skip_special_tokens)`, built once."""
        key = (build, skip_special_tokens)
        if key not in self._cache:
            self._cache[key] = build(self, skip_special_tokens)
        pieces: _PIECES = self._cache[key]
        return pieces


def _texts(value: Any) -> dict[str, str]:
    found = dict(value)
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TypeError("names and texts must be strings")
    return found


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InvalidRequestError("prompt", (f"text is a {type(text).__name__}",), limit="it must be a str")
    found = lone_surrogate(text)
    if found:
        raise InvalidRequestError("prompt", (f"text holds {found}",), limit="it must be well-formed Unicode")


_SPM_DECODERS: tuple[dict[str, object], ...] = (
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
_STRIP_ONE_SPACE: dict[str, object] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _decoding_kind(decoder: Any) -> Decoding:
    """Recognises the decoders whose rules the incremental detokenizer implements."""
    if decoder is None:
        return Decoding.OTHER
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel":
        return Decoding.BYTE_LEVEL
    if tuple(steps) == _SPM_DECODERS:
        return Decoding.BYTE_FALLBACK
    if tuple(steps) == (*_SPM_DECODERS, _STRIP_ONE_SPACE):
        return Decoding.BYTE_FALLBACK_STRIP
    return Decoding.OTHER

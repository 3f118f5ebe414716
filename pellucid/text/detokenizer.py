"""Token ids to text, a few at a time, such that the pieces join to exactly what decoding all ids at once gives."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Sequence
from typing import Protocol

from pellucid.errors import InvalidRequestError, shown
from pellucid.text.byte_alphabet import token_bytes
from pellucid.text.tokenizer import Decoding, Tokenizer

REPLACEMENT = "\ufffd"
_WINDOW = 6
"""Prompt tokens that give a decoder without known rules its left context."""


class IncrementalDetokenizer:
    """Turns generated token ids into text that is final as soon as it is returned.

    The returned deltas and the flushed rest join to `tokenizer.decode(ids)`, however the ids were
    split over calls. A UTF-8 character is never split. Ids beyond the tokenizer's vocabulary (padding rows of
    the output matrix) have no text. A run of byte tokens of a SentencePiece vocabulary is held
    until it ends, because one invalid byte turns the whole run into U+FFFD.

    Args:
        tokenizer: gives the pieces.
        prompt_token_ids: what the text continues: a leading space is then kept, and a character
            that the prompt left incomplete is finished. The prompt's own text is not returned.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._stream = _STREAMS[tokenizer.decoding](tokenizer, skip_special_tokens)
        if len(prompt_token_ids):
            self._stream.prime(prompt_token_ids)
        self._parts: list[str] = []

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these ids; often empty.

        Raises:
            InvalidRequestError: an id is negative or above 2^32 - 1.
        """
        try:
            delta = self._stream.feed(token_ids)
        except OverflowError as error:
            raise InvalidRequestError(
                "token_ids", (f"token ids {shown(list(token_ids))} must lie in 0..{2**32 - 1}",)
            ) from error
        if delta:
            self._parts.append(delta)
        return delta

    def flush(self) -> str:
        """The rest, when no more ids come; what is still an incomplete character becomes U+FFFD."""
        rest = self._stream.finish()
        if rest:
            self._parts.append(rest)
        return rest

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._parts) > 1:
            self._parts[:] = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""


def bytes_of_token(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for by itself, special tokens too; b"" for an id without a token."""
    if tokenizer.decoding is Decoding.BYTE_LEVEL:
        return tokenizer.cached(_BytePieces, False)[token_id]
    if tokenizer.decoding is Decoding.OTHER:
        return b"" if tokenizer.raw_token(token_id) is None else tokenizer.raw_decode([token_id], False).encode()
    piece = tokenizer.cached(_FallbackPieces, False)[token_id]
    return piece.encode() if isinstance(piece, str) else piece or b""


class _Stream(Protocol):
    def prime(self, prompt_token_ids: Sequence[int]) -> None: ...

    def feed(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


class _BytePieces(dict[int, bytes]):
    """id -> the bytes of its token in a byte-level vocabulary; b"" where it is skipped or unknown."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._token = tokenizer.raw_token
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._token(token_id)
        piece = self[token_id] = b"" if token is None else token_bytes(token)
        return piece


class _ByteLevelStream:
    """Byte-level vocabularies: the ids are bytes, and an incremental UTF-8 decoder does the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._pieces = tokenizer.cached(_BytePieces, skip_special_tokens)
        self._decoder = _utf8_decoder()

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        # A lead byte always starts afresh and at most two bytes can follow it incompletely: three bytes are all
        # that the decoder's state can depend on.
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._pieces[token_id] + tail
            if len(tail) >= 3:
                break
        self._decoder.decode(tail[-3:])

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        if len(token_ids) == 1:
            return self._decoder.decode(pieces[token_ids[0]])
        return self._decoder.decode(b"".join([pieces[token_id] for token_id in token_ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _FallbackPieces(dict[int, "str | bytes | None"]):
    """id -> text, or one byte, or None where it is skipped or unknown, in a vocabulary with byte fallback."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._token = tokenizer.raw_token
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> str | bytes | None:
        token = None if token_id in self._skipped else self._token(token_id)
        piece: str | bytes | None = token
        if token is not None:
            piece = token.replace("\u2581", " ")
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                with contextlib.suppress(ValueError):
                    piece = bytes((int(token[3:5], 16),))
        self[token_id] = piece
        return piece


def token_bytes_of(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each id below `vocab_size` adds to a text; b"" where the vocabulary has a hole.

    Raises:
        InvalidRequestError: the text of a token depends on its neighbours in ways that are not known here.
    """
    if tokenizer.decoding is Decoding.OTHER:
        raise InvalidRequestError("structured_outputs", "need a tokenizer of bytes", limit="this model has another")
    if tokenizer.decoding is Decoding.BYTE_LEVEL:
        whole = tokenizer.cached(_BytePieces, False)
        return [whole[token_id] for token_id in range(vocab_size)]
    pieces = tokenizer.cached(_FallbackPieces, False)
    return [_encoded(pieces[token_id]) for token_id in range(vocab_size)]


def _encoded(piece: str | bytes | None) -> bytes:
    return piece.encode() if isinstance(piece, str) else piece or b""


class _ByteFallbackStream:
    """SentencePiece vocabularies: text pieces with runs of byte tokens between; one leading space may be cut."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._pieces = tokenizer.cached(_FallbackPieces, skip_special_tokens)
        self._run = bytearray()
        self._strip_next = tokenizer.decoding is Decoding.BYTE_FALLBACK_STRIP

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        run: list[bytes] = []  # the byte tokens at the prompt's end
        for token_id in reversed(prompt_token_ids):
            piece = self._pieces[token_id]
            if isinstance(piece, str):
                self._strip_next = False
                break
            if piece is not None:
                run.append(piece)
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        with contextlib.suppress(UnicodeDecodeError):
            decoder.decode(b"".join(reversed(run)))
            self._run += decoder.getstate()[0]
        if len(run) > len(self._run):
            self._strip_next = False

    def feed(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if isinstance(piece, str):
                text += (self._end_run() + piece) if self._run else piece
            elif piece is not None:
                self._run += piece
        return self._strip(text) if self._strip_next else text

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        if not text or not self._strip_next:
            return text
        self._strip_next = False
        return text.removeprefix(" ")


class _WindowStream:
    """Any other decoder: decode a short window before and after the new ids, and release the difference."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._decode = tokenizer.raw_decode
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        self._ids = list(prompt_token_ids[-_WINDOW:])
        self._read = len(self._ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(token_ids)
        before, after = self._window()
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        before, after = self._window()
        self._prefix = self._read = len(self._ids)
        return after[len(before) :]

    def _window(self) -> tuple[str, str]:
        before = self._decode(self._ids[self._prefix : self._read], self._skip_special_tokens)
        return before, self._decode(self._ids[self._prefix :], self._skip_special_tokens)


_STREAMS: dict[Decoding, type[_ByteLevelStream] | type[_ByteFallbackStream] | type[_WindowStream]] = {
    Decoding.BYTE_LEVEL: _ByteLevelStream,
    Decoding.BYTE_FALLBACK: _ByteFallbackStream,
    Decoding.BYTE_FALLBACK_STRIP: _ByteFallbackStream,
    Decoding.OTHER: _WindowStream,
}

"""Log-probabilities in the shapes of OpenAI's two APIs and vLLM's extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pellucid.api.outputs import Logprob
from pellucid.text.detokenizer import bytes_of_token
from pellucid.text.tokenizer import Tokenizer

Row = Mapping[int, Logprob]


class LogprobFormat:
    """Formats rows of log-probabilities: one row a position, the chosen token always among its candidates."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def chat(self, token_ids: Sequence[int], rows: Sequence[Row], top: int) -> dict[str, Any]:
        """`choices[].logprobs` of chat: each token with the `top` likeliest."""
        return {"content": [self._chat_token(token, row, top) for token, row in zip(token_ids, rows, strict=True)]}

    def completion(
        self, token_ids: Sequence[int], rows: Sequence[Row | None], offset: int
    ) -> tuple[dict[str, Any], int]:
        """(`choices[].logprobs` of completions, the offset behind its last token). A prompt's first token has no row."""
        tokens = [self._text(token) for token in token_ids]
        offsets = []
        for token in token_ids:
            offsets.append(offset)
            offset += len(self._decoded(token))
        shown = {
            "tokens": tokens,
            "token_logprobs": [
                None if row is None else row[token].logprob for token, row in zip(token_ids, rows, strict=True)
            ],
            "top_logprobs": [
                None if row is None else {self._text(token): entry.logprob for token, entry in row.items()}
                for row in rows
            ],
            "text_offset": offsets,
        }
        return shown, offset

    def prompt(self, rows: Sequence[Row | None] | None) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`: by token id."""
        if rows is None:
            return None
        return [
            None
            if row is None
            else {
                str(token): {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
                for token, entry in row.items()
            }
            for row in rows
        ]

    def _chat_token(self, token: int, row: Row, top: int) -> dict[str, Any]:
        likeliest = [self._chat_entry(other, entry) for other, entry in row.items() if (entry.rank or 0) <= top]
        return {**self._chat_entry(token, row[token]), "top_logprobs": likeliest[:top]}

    def _chat_entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        text, raw = self._of(token)
        return {"token": text, "logprob": entry.logprob, "bytes": None if raw is None else list(raw)}

    def _text(self, token: int) -> str:
        return self._of(token)[0]

    def _decoded(self, token: int) -> str:
        return (self._of(token)[1] or b"").decode(errors="replace")

    def _of(self, token: int) -> tuple[str, bytes | None]:
        """(text, bytes). A part of a character is spelled as bytes, as OpenAI does: its text alone would say nothing."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> tuple[str, bytes | None]:
        if self._tokenizer is None:
            return f"token_id:{token}", None
        raw = bytes_of_token(self._tokenizer, token)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

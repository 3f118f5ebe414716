"""What every source of a tokenizer gives: the library's tokenizer, and what stands beside its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pellucid.errors import PellucidError, TokenizerError

ID_LIMIT = 1 << 32  # the library's ids have 32 bits


@dataclass(frozen=True)
class SpecialTokens:
    """What a model's files say about its special tokens and its chat template, beside the vocabulary."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """name ("bos_token") -> text; chat templates see these as variables."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """name ("default", "tool_use") -> source."""


def backend_from_json(text: str, origin: str) -> Any:
    """A `tokenizers.Tokenizer` from the text of a tokenizer.json.

    Raises:
        TokenizerError: the library refuses it.
    """
    from tokenizers import Tokenizer as Backend

    with library_errors(f"{origin} is not a usable tokenizer"):
        return Backend.from_str(text)


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """What the `tokenizers` library raises inside, as a TokenizerError that begins with `problem`."""
    try:
        yield
    except (PellucidError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the library is not an Exception
        raise TokenizerError(f"{problem}: {str(error)[:300]}") from error

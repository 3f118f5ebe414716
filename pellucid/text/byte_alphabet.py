"""The printable characters that stand for the 256 bytes in byte-level vocabularies (GPT-2's table)."""

from __future__ import annotations


def _byte_of_character() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a token with foreign characters stands for its own UTF-8."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def spell_bytes(text: str) -> str:
    """`text` as a byte-level vocabulary spells it."""
    return "".join([CHARACTER_OF_BYTE[byte] for byte in text.encode()])

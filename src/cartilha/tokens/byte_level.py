"""Byte-level BPE's table: how GPT-2 writes each of the 256 bytes as one printable character; a token's bytes."""

from __future__ import annotations

import re

_PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_SHIFTED = (256 + i for i in range(256))

# The character of each byte, in the order of the bytes: itself where it is printable, else the next from U+0100 on.
BYTE_CHARACTERS = [chr(byte) if byte in _PRINTABLE else chr(next(_SHIFTED)) for byte in range(256)]
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def token_bytes(token: str) -> bytes | None:
    """The bytes that a token stands for; None if its spelling does not tell, as with a SentencePiece word."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    if token and all(character in CHARACTER_BYTES for character in token):
        return bytes(CHARACTER_BYTES[character] for character in token)
    return None

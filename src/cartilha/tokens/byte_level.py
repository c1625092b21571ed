"""Byte-level BPE's table: how GPT-2 writes each of the 256 bytes as one printable character."""

from __future__ import annotations

_PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_SHIFTED = (256 + i for i in range(256))

# The character of each byte, in the order of the bytes: itself where it is printable, else the next from U+0100 on.
BYTE_CHARACTERS = [chr(byte) if byte in _PRINTABLE else chr(next(_SHIFTED)) for byte in range(256)]
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}

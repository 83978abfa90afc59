"""Is an image file whole? Told from its structure, without decoding: much faster than every pixel.

    PNG    every chunk is there with its checksum, to IEND
    JPEG   every segment and scan is there, to the end-of-image marker; an embedded thumbnail's end does not count
    WebP   as many bytes as its header says

True means: not truncated, and a PNG not altered. What only a decoder sees (flipped bits in a JPEG's tables, too few
rows in intact chunks) is not seen; of wrong bits in scans a decoder mostly says nothing either (README.md, Decisions).
"""

from __future__ import annotations

import re
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
_NEXT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""In a scan: a marker that is neither a stuffed byte, nor filling, nor a restart."""
_END, _SCAN = 0xD9, 0xDA
_ALONE = (0x01, *range(0xD0, 0xD8))
"""Markers without a length: TEM, RST0 to RST7."""


def is_whole(data: bytes) -> bool | None:
    """None: of a format whose structure is not known here; decode it."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(PNG):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return None


def _jpeg(data: bytes) -> bool:
    at = 2
    while at + 2 <= len(data):
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif marker == _END:
            return True
        elif marker in _ALONE:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == _SCAN:
                found = _NEXT.search(data, at)
                if found is None:
                    return False
                at = found.start()
    return False


def _png(data: bytes) -> bool:
    at, view = len(PNG), memoryview(data)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 12 + size
        if end > len(data) or zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at = end
    return False

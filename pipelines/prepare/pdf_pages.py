"""Pages of PDF documents as pictures, named and not carried: PATH#page=N, N from 1 (the fragment of RFC 8118).

pdfium works in one thread at a time (ctypes lets go of Python's lock): whoever calls it holds LOCK.
"""

from __future__ import annotations

import io
import re
from threading import Lock

import pypdfium2 as pdfium

from trainer import storage
from trainer.data import media
from trainer.errors import MediaError

SCALE = 2
"""Pixels a point: 144 dots an inch."""
LOCK = Lock()
_PAGE = re.compile(r"^(?P<path>.+)#page=(?P<number>\d+)$")
_open: list[tuple[str, pdfium.PdfDocument]] = []
"""The document read last: its pages are asked for one after the other."""


def address(path: str, number: int) -> str:
    return f"{path}#page={number}"


def is_page(uri: str) -> bool:
    return _PAGE.match(uri) is not None


def open_document(data: bytes, where: str) -> pdfium.PdfDocument:
    """Call with LOCK held. Raises MediaError: no PDF, a broken one, or one that asks for a password."""
    try:
        return pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise MediaError("the PDF cannot be read", where=where, expected="a PDF without password", got=error) from None


def page_of(document: pdfium.PdfDocument, number: int, where: str) -> pdfium.PdfPage:
    """A page, counted from 1; call with LOCK held. Raises MediaError: the document's tree names no page there."""
    try:
        return document[number - 1]
    except pdfium.PdfiumError as error:
        raise MediaError("a page that cannot be read", where=address(where, number), got=error) from None


def page_png(uri: str) -> bytes:
    """The page drawn at SCALE.

    Raises:
        FileNotFoundError, StorageError
        MediaError: a broken document, no such page, or a page larger than is read.
    """
    found = _PAGE.match(uri)
    assert found is not None, uri
    path, number = found["path"], int(found["number"])
    with LOCK:
        document = _document(path)
        if not 1 <= number <= len(document):
            raise MediaError("no such page", where=uri, expected=f"1 to {len(document)}", got=number)
        page = page_of(document, number, path)
        try:
            width, height = (side * SCALE for side in page.get_size())
            if width * height > media.MAX_PIXELS:
                got = f"{width:.0f}x{height:.0f}"
                raise MediaError("a page too large", where=uri, expected=f"at most {media.MAX_PIXELS} pixels", got=got)
            picture = page.render(scale=SCALE).to_pil().convert("RGB")
        except pdfium.PdfiumError as error:
            raise MediaError("a page that cannot be drawn", where=uri, got=error) from None
        finally:
            page.close()
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def _document(path: str) -> pdfium.PdfDocument:
    if not _open or _open[0][0] != path:
        found = open_document(storage.read_bytes(path), path)
        for _, old in _open:
            old.close()
        _open[:] = [(path, found)]
    return _open[0][1]

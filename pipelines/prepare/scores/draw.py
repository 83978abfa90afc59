"""Pages of a score: drawn by verovio and resvg in a process of its own (engrave.py, worker.py). A page is named and not
carried (address.py), and drawn again where it is needed: the same bytes every time.
"""

from __future__ import annotations

import io
import lzma
import os
import xml.etree.ElementTree as ET
import zipfile
import zlib
from functools import lru_cache
from queue import LifoQueue

from pipelines.prepare.formats.rows import WRONG, BadRow, told
from pipelines.prepare.scores.address import place_of
from pipelines.prepare.scores.page import Page, Refused
from pipelines.prepare.scores.score import read_score
from pipelines.prepare.scores.worker import Ended, Worker
from trainer import storage
from trainer.errors import MediaError

PAGE = (2100, 2970)
"""A4, in verovio's tenths of a millimetre (at a scale of 100 they are pixels)."""
SCALE = 50
LARGEST_BYTES = 64 * 2**20
"""Of one score, unpacked."""
MOST_WORKERS = 4
LIMIT_S = 600.0
"""Of one score: a page takes a third of a second."""
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(KeyError, NotImplementedError, RuntimeError, ET.ParseError),
)
"""What zipfile raises for an archive that is none, or whose members are damaged."""


def page_png(uri: str) -> bytes:
    """
    Raises:
        FileNotFoundError, StorageError
        MediaError: no score, or no such page.
    """
    path, number = place_of(uri)
    try:
        pages = _pages_of(path)
    except BadRow as error:
        raise MediaError("the score cannot be drawn", where=uri, expected=error.expected, got=error.got) from None
    except WRONG as error:
        raise MediaError("the score cannot be drawn", where=uri, expected="MusicXML", got=told(error)) from None
    if not 1 <= number <= len(pages):
        raise MediaError("no such page", where=uri, expected=f"1 to {len(pages)}", got=number)
    return pages[number - 1].png


@lru_cache(maxsize=2)
def _pages_of(path: str) -> tuple[Page, ...]:
    """Pages are asked for one after the other. Any row may name one: what score.py refuses is not drawn either."""
    root = score_xml(storage.read_bytes(path))
    read_score(root)
    return tuple(pages_of(root))


# ---------------------------------------------------------------- the file


def score_xml(data: bytes) -> ET.Element:
    """The root of MusicXML, packed (.mxl) or not.

    Raises:
        BadRow: broken, packed without a score, or too large.
    """
    if data[:2] == b"PK":
        data = _unpacked(data)
    if len(data) > LARGEST_BYTES:
        raise BadRow("bad-score", f"at most {LARGEST_BYTES} bytes of MusicXML", len(data))
    try:
        return ET.fromstring(data)
    except ET.ParseError as error:
        raise BadRow("bad-xml", "well-formed XML", f"{error.msg} (line {error.position[0]})") from None
    except (ValueError, LookupError) as error:  # an encoding that the parser does not know
        raise BadRow("bad-xml", "XML in UTF-8 or UTF-16", error) from None


def _unpacked(data: bytes) -> bytes:
    """The score that META-INF/container.xml names first (MusicXML 4.0, "Compressed .mxl files")."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            container = ET.fromstring(_member(archive, "META-INF/container.xml"))
            named = next((item.get("full-path") for item in container.iter() if item.tag.endswith("rootfile")), None)
            if named is None:
                raise BadRow("bad-score", "a <rootfile full-path=...> in META-INF/container.xml", "none")
            return _member(archive, named)
    except BROKEN as error:
        raise BadRow("bad-score", "a whole .mxl with META-INF/container.xml", error) from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > LARGEST_BYTES:
        raise BadRow("bad-score", f"at most {LARGEST_BYTES} bytes in {name}", archive.getinfo(name).file_size)
    return archive.read(name)


# ---------------------------------------------------------------- the picture


class _Workers:
    """Processes that draw, started when they are needed: one for who draws one score after the other."""

    def __init__(self) -> None:
        self.fill()
        os.register_at_fork(after_in_child=self.fill)  # they belong to who started them

    def fill(self) -> None:
        self.idle: LifoQueue[Worker] = LifoQueue()
        for _ in range(min(MOST_WORKERS, os.cpu_count() or 1)):
            self.idle.put(Worker("pipelines.prepare.scores.engrave", "engrave", limit_s=LIMIT_S))

    def engrave(self, text: str, **how: int) -> list[Page] | Refused:
        """Tried twice: a process may have been ended from outside, where memory is short. Raises Ended."""
        worker = self.idle.get()
        try:
            return worker.call(text, **how)
        except Ended:
            return worker.call(text, **how)
        finally:
            self.idle.put(worker)


WORKERS = _Workers()


def pages_of(score: ET.Element, *, width: int = PAGE[0], height: int = PAGE[1], scale: int = SCALE) -> list[Page]:
    """The pages of a score. `width`, `height`: at most, in tenths of a millimetre; a page ends below its last system.

    Raises:
        BadRow: nothing is drawn, a character without glyph, or a score that ended the process that drew it (`crashed`).
    """
    text = ET.tostring(_drawable(score), encoding="unicode")
    try:
        found = WORKERS.engrave(text, width=width, height=height, scale=scale)
    except Ended as error:
        raise BadRow("crashed", "a score that verovio sets and resvg draws", error) from None
    if isinstance(found, Refused):
        raise BadRow(*found)
    return found


def _drawable(score: ET.Element) -> ET.Element:
    """Without the label before the staff where there is one part: it tells it from no other."""
    names = score.findall("part-list/score-part")
    if len(names) == 1:
        for tag in ("part-name", "part-abbreviation"):
            for label in names[0].findall(tag):
                label.text = ""
        for tag in ("part-name-display", "part-abbreviation-display"):
            for label in names[0].findall(tag):
                names[0].remove(label)
    return score

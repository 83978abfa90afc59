"""Pages of a score: verovio sets MusicXML as SVG, resvg draws it. A page is named and not
carried (address.py), and drawn again where it is needed: the same bytes every time.

Words (lyrics, tempo, chord symbols) are set in STIX (matplotlib carries it; its widths are those of Times, which
verovio counts with), characters it lacks in Noto Sans CJK (notojp-matplotlib). One that neither has is an error. The
numbers of measures where systems begin are verovio's, and no part of the ABC.
"""

from __future__ import annotations

import io
import lzma
import re
import xml.etree.ElementTree as ET
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Lock

import numpy as np
import resvg_py
import verovio
from fontTools.ttLib import TTFont
from PIL import Image

from pipelines.prepare.corpus.sources import package_folder
from pipelines.prepare.formats.rows import WRONG, BadRow, told
from pipelines.prepare.scores.address import place_of
from pipelines.prepare.scores.score import read_score
from trainer import storage
from trainer.errors import MediaError

Box = tuple[int, int, int, int]
LOCK = Lock()
"""verovio keeps state of its own beside its toolkits: one at a time."""
PAGE = (2100, 2970)
"""A4, in verovio's tenths of a millimetre (at a scale of 100 they are pixels)."""
SCALE = 50
LARGEST_BYTES = 64 * 2**20
"""Of one score, unpacked."""
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(KeyError, NotImplementedError, RuntimeError, ET.ParseError),
)
"""What zipfile raises for an archive that is none, or whose members are damaged."""
FONTS = (
    *(f"matplotlib/mpl-data/fonts/ttf/STIXGeneral{style}.ttf" for style in ("", "Italic", "Bol", "BolIta")),
    "notojp_matplotlib/fonts/NotoSansCJKjp-Regular.otf",
)
TEXT_FAMILY = "STIXGeneral"
PLAIN = {"\ueca5": "♩", "\ueca7": "♪", "\uea64": "♭", "\uea65": "♮", "\uea66": "♯", "\ue260": "♭", "\ue262": "♯"}
"""Signs of the music font in running text -> the same in the text font."""
_SIGN = re.compile(r'<tspan font-family="Leipzig" font-size="\d+px">([^<]*)</tspan>')
_WORDS = re.compile(r"<tspan[^>]*>([^<]+)</tspan>")


@dataclass(frozen=True)
class Page:
    """One page of a score."""

    png: bytes
    ink: Box
    """Left, top, right, bottom in pixels of what is drawn; right and bottom are exclusive."""
    systems: tuple[int, ...]
    """Measures in each system, from the top."""


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
    """Pages are asked for one after the other. Any row may name one: what score.py refuses is not drawn, since some of
    it ends verovio's process."""
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


def pages_of(score: ET.Element, *, width: int = PAGE[0], height: int = PAGE[1], scale: int = SCALE) -> list[Page]:
    """The pages of a score. `width`, `height`: at most, in tenths of a millimetre; a page ends below its last system.

    Raises:
        BadRow: nothing is drawn, or a character without glyph.
    """
    options = {
        **{"inputFrom": "xml", "pageWidth": width, "pageHeight": height, "adjustPageHeight": True, "scale": scale},
        **{"header": "none", "footer": "none", "breaks": "auto", "xmlIdSeed": 1, "smuflTextFont": "none"},
    }
    with LOCK:
        verovio.enableLog(verovio.LOG_OFF)  # what ABC cannot say is refused by score.py
        toolkit = verovio.toolkit(False)
        toolkit.setResourcePath(str(package_folder("verovio") / "data"))  # the path that is set at import is a thread's
        toolkit.setOptions(options)
        loaded = toolkit.loadData(ET.tostring(_drawable(score), encoding="unicode"))
        count = toolkit.getPageCount() if loaded else 0
        drawn = [toolkit.renderToSVG(number) for number in range(1, count + 1)]
    found = [_page(svg) for svg in drawn]
    if not any(page.systems for page in found):
        raise BadRow("bad-score", "a score that verovio draws", "nothing drawn")
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


def _page(svg: str) -> Page:
    svg = _SIGN.sub(lambda sign: f'<tspan font-size="405px">{"".join(PLAIN.get(c, c) for c in sign[1])}</tspan>', svg)
    drawn = resvg_py.svg_to_bytes(
        svg_string=svg,
        background="white",
        skip_system_fonts=True,
        font_files=list(_fonts_for(svg)),
        font_family=TEXT_FAMILY,
        serif_family=TEXT_FAMILY,
    )
    picture = Image.open(io.BytesIO(bytes(drawn))).convert("L")
    inked = np.asarray(picture) < 250
    if not inked.any():
        raise BadRow("bad-score", "a page with notes", "an empty one")
    down, across = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
    return Page(sink.getvalue(), box, _systems(svg))


def _systems(svg: str) -> tuple[int, ...]:
    """Counted in the order of the drawing: every group of class `measure` lies in the last `system` opened."""
    found: list[int] = []
    for kind in re.findall(r'<g [^>]*class="(system|measure)"', svg):
        if kind == "system":
            found.append(0)
        else:
            found[-1] += 1
    return tuple(found)


def _fonts_for(svg: str) -> tuple[str, ...]:
    """Files of the fonts that have every character of the words; the large one only where it is needed (0.4 s a page).

    Raises:
        BadRow: a character that none has.
    """
    words = "".join(ET.fromstring(f"<t>{found}</t>").text or "" for found in _WORDS.findall(svg))
    files = [str(package_folder(name.partition("/")[0]) / name.partition("/")[2]) for name in FONTS]
    foreign = {char for char in words if not char.isspace() and ord(char) not in _glyphs(files[0])}
    if missing := sorted(char for char in foreign if ord(char) not in _glyphs(files[-1])):
        told = ", ".join(f"{char} (U+{ord(char):04X})" for char in missing[:8])
        raise BadRow("no-glyph", "words in characters of STIX or Noto Sans CJK", told)
    return tuple(files if foreign else files[:-1])


@cache
def _glyphs(path: str) -> frozenset[int]:
    return frozenset(TTFont(path).getBestCmap() or ())

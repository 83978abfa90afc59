"""MusicXML -> pages: verovio sets it as SVG, resvg draws that. Runs in a process of its own (worker.py), since verovio
ends its process on some scores: it divides by a meter's zero, for one. The same bytes every time.

Words (lyrics, tempo, chord symbols) are set in STIX (matplotlib carries it; its widths are those of Times, which
verovio counts with), characters it lacks in Noto Sans CJK (notojp-matplotlib). One that neither has is an error. The
numbers of measures where systems begin are verovio's, and no part of the ABC.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from functools import cache

import numpy as np
import resvg_py
import verovio
from fontTools.ttLib import TTFont
from PIL import Image

from pipelines.prepare.corpus.sources import package_folder
from pipelines.prepare.formats.rows import WRONG, BadRow, told
from pipelines.prepare.scores.page import Page, Refused

FONTS = (
    *(f"matplotlib/mpl-data/fonts/ttf/STIXGeneral{style}.ttf" for style in ("", "Italic", "Bol", "BolIta")),
    "notojp_matplotlib/fonts/NotoSansCJKjp-Regular.otf",
)
TEXT_FAMILY = "STIXGeneral"
PLAIN = {"\ueca5": "♩", "\ueca7": "♪", "\uea64": "♭", "\uea65": "♮", "\uea66": "♯", "\ue260": "♭", "\ue262": "♯"}
"""Signs of the music font in running text -> the same in the text font."""
_SIGN = re.compile(r'<tspan font-family="Leipzig" font-size="\d+px">([^<]*)</tspan>')
_WORDS = re.compile(r"<tspan[^>]*>([^<]+)</tspan>")


def engrave(score: str, *, width: int, height: int, scale: int) -> list[Page] | Refused:
    """The pages of a score (draw.pages_of), or why there are none. One call at a time: verovio keeps state of its own
    beside its toolkits."""
    try:
        return _engraved(score, width, height, scale)
    except BadRow as error:
        return Refused(error.reason, error.expected, error.got)
    except WRONG as error:
        return Refused("bad-score", "a score that verovio sets and resvg draws", told(error))


def _engraved(score: str, width: int, height: int, scale: int) -> list[Page]:
    options = {
        **{"inputFrom": "xml", "pageWidth": width, "pageHeight": height, "adjustPageHeight": True, "scale": scale},
        **{"header": "none", "footer": "none", "breaks": "auto", "xmlIdSeed": 1, "smuflTextFont": "none"},
    }
    verovio.enableLog(verovio.LOG_OFF)  # what ABC cannot say is refused by score.py
    toolkit = verovio.toolkit(False)
    toolkit.setResourcePath(str(package_folder("verovio") / "data"))  # the path that is set at import is a thread's
    toolkit.setOptions(options)
    loaded = toolkit.loadData(score)
    count = toolkit.getPageCount() if loaded else 0
    found = [_page(toolkit.renderToSVG(number)) for number in range(1, count + 1)]
    if not any(page.systems for page in found):
        raise BadRow("bad-score", "a score that verovio draws", "nothing drawn")
    return found


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

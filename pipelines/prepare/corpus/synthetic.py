"""Synthetic pages: real text set by typst, which says where every block lies. A formula, chart, molecule or score is
drawn from the source that the HTML has (figures.py). Pages come out as rows of the format `layout`.

    pages_of([Part("h1", "Title"), Part("p", "Text."), ...], Style(language="ja", columns=2)) -> [Page(png, rows)]

Fonts, all in packages: Latin scripts and Arabic in DejaVu Sans (matplotlib; Bitstream Vera's licence), Japanese in
IPAexGothic (matplotlib-fontja; IPA Font License), Chinese in Noto Sans CJK (notojp-matplotlib; OFL-1.1), whose shapes
for Chinese are chosen by the language. `handwriting` is Caveat (fontpkg-caveat; OFL-1.1): a font drawn by hand, every
letter the same each time, so not what people's handwriting is. A character that the font has no glyph for is an error
before anything is set; nothing falls back to another font. Arabic runs from right to left, columns too.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import typst
from fontTools.ttLib import TTFont
from PIL import Image

from pipelines.prepare.corpus import figures
from pipelines.prepare.corpus.sources import package_folder
from pipelines.prepare.formats.tables import Cell, cells_html

Language = Literal["en", "ar", "ja", "zh"]
PPI = 144
PT = PPI / 72
"""Pixels a point."""
SIZES = {"h1": 20, "h2": 16, "h3": 14, "h4": 13, "h5": 12, "h6": 11.5}
FONTS: dict[Language, tuple[str, str]] = {
    "en": ("DejaVu Sans", "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf"),
    "ar": ("DejaVu Sans", "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf"),
    "ja": ("IPAexGothic", "matplotlib_fontja/fonts/ipaexg.ttf"),
    "zh": ("Noto Sans CJK JP", "notojp_matplotlib/fonts/NotoSansCJKjp-Regular.otf"),
}
"""Family and file below an installed package."""
REGIONS: dict[Language, str] = {"zh": "cn", "ja": "jp"}
"""Chooses among the shapes of one character that a font has."""
HANDWRITING = ("Caveat", "fontpkg_caveat/files/Caveat[wght].ttf")
REACH = {"handwriting": (0.08, 0.0, 0.23), "ar": (0.0, 0.12, 0.0)}
"""Ems by which ink reaches beyond what the font states, to the left, the top and the right: handwriting leans, a hamza
stands above DejaVu's ascender. Text's boxes grow by it."""
GUTTER_PT = 18
DRAWN = {"formula": 28, "chart": 110, "music sheet": 0, "chemical formula": 0}
"""Roles of pictures -> height in points; 0: as many as the picture has pixels, by PT."""


@dataclass(frozen=True)
class Part:
    """`content`: text; LaTeX of a formula, SMILES of a molecule. `rows`: cells of a table, or of a chart: headings,
    then name and number. A score is made by score_part."""

    role: Literal[
        "p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "table", "formula", "chart", "chemical formula", "music sheet"
    ]
    content: str = ""
    rows: Sequence[Sequence[Cell]] = ()
    picture: bytes = b""
    """Of a score, the PNG that was drawn with its ABC."""


@dataclass(frozen=True)
class Style:
    language: Language = "en"
    width_pt: float = 400
    height_pt: float = 560
    columns: int = 1
    size_pt: float = 10
    margin_pt: float = 28
    handwriting: bool = False
    """English alone: no package carries such a font for the other languages."""

    @property
    def column_pt(self) -> float:
        return (self.width_pt - 2 * self.margin_pt - (self.columns - 1) * GUTTER_PT) / self.columns


@dataclass(frozen=True)
class Page:
    png: bytes
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """`type`, `bbox` in pixels of the picture, `text` or `html`: blocks of the format `layout`, in reading order."""


def pages_of(parts: Sequence[Part], style: Style) -> list[Page]:
    """Pages of a document; a part is never cut.

    Raises:
        ValueError: a character without glyph, a font that is not there, a source that cannot be drawn, or a part
            larger than a page's column.
    """
    check_glyphs([text for part in parts for text in _texts(part)], style)
    with tempfile.TemporaryDirectory() as folder:
        heights: dict[int, float] = {}
        for number, part in enumerate(parts):
            if part.role in DRAWN:
                picture = _picture(part, style)
                (Path(folder) / f"{number}.png").write_bytes(picture)
                heights[number] = DRAWN[part.role] or _fitting(part, picture, style)
        source = Path(folder) / "page.typ"
        source.write_text(_source(parts, style, heights))
        fonts: Any = {"font_paths": [str(font_file(style).parent)], "ignore_system_fonts": True}
        compiler = typst.Compiler(str(source), **fonts)  # its fonts are read once for both
        placed = json.loads(compiler.query("<placed>", field="value"))
        drawn = compiler.compile(format="png", ppi=PPI)
    pictures: list[bytes] = drawn if isinstance(drawn, list) else [drawn]  # type: ignore[assignment]
    pages = [Page(picture) for picture in pictures]
    for place in placed:
        pages[place["page"] - 1].blocks.append(_block(parts[place["number"]], place, style))
    return pages


def _block(part: Part, place: dict[str, Any], style: Style) -> dict[str, Any]:
    left, top, right, bottom = (place[name] for name in ("left", "top", "right", "bottom"))
    if bottom > style.height_pt or right > style.width_pt:
        raise ValueError(
            f"a part is larger than its page: {part.role} {part.content[:40]!r}, {bottom - top:.0f} pt high"
        )
    reach = REACH.get("handwriting" if style.handwriting else style.language)
    if reach is not None and part.role not in DRAWN:
        em = SIZES.get(part.role, style.size_pt)
        left, top = max(0, left - reach[0] * em), max(0, top - reach[1] * em)
        right = min(style.width_pt, right + reach[2] * em)
    found: dict[str, Any] = {"type": part.role, "bbox": [value * PT for value in (left, top, right, bottom)]}
    return {**found, "html": cells_html(part.rows)} if part.rows else {**found, "text": part.content}


def score_part(musicxml: str, style: Style) -> Part:
    """A score as wide as a column; its text is the ABC, a line for each of its systems. Raises ValueError."""
    abc, picture = figures.score(musicxml, style.column_pt)
    return Part("music sheet", abc, picture=picture)


def row(identity: str, images: Sequence[str], pages: Sequence[Page], style: Style) -> dict[str, Any]:
    """A row of the format `layout`; `images` are the paths of the pages' pictures."""
    size = {"width": round(style.width_pt * PT), "height": round(style.height_pt * PT)}
    listed = [{"image": image, **size, "blocks": page.blocks} for image, page in zip(images, pages, strict=True)]
    return {"id": identity, "pages": listed}


# ---------------------------------------------------------------- fonts


def font_of(style: Style) -> tuple[str, str]:
    """(family, file below an installed package). Raises ValueError: handwriting in a language that has none."""
    if style.handwriting and style.language != "en":
        raise ValueError(f"no handwriting font for {style.language}; there is one for en")
    return HANDWRITING if style.handwriting else FONTS[style.language]


def font_file(style: Style) -> Path:
    """
    Raises:
        DataError: the package is not installed. ValueError: it lacks the file.
    """
    package, _, inside = font_of(style)[1].partition("/")
    path = package_folder(package) / inside
    if not path.exists():
        raise ValueError(f"no font for {style.language}: {path} is not there")
    return path


@cache
def _glyphs(path: Path) -> frozenset[int]:
    return frozenset(TTFont(str(path)).getBestCmap() or ())


def check_glyphs(texts: Sequence[str], style: Style) -> None:
    """Raises ValueError with the characters that the style's font cannot draw."""
    known = _glyphs(font_file(style))
    missing = sorted({char for text in texts for char in text if not char.isspace() and ord(char) not in known})
    if missing:
        shown = ", ".join(f"{char} (U+{ord(char):04X})" for char in missing[:8])
        raise ValueError(f"{font_of(style)[0]} has no glyph for {len(missing)} characters: {shown}")


def _texts(part: Part) -> list[str]:
    """What is set in the style's font; formulas, molecules and scores are drawn in their own."""
    own = [] if part.role in DRAWN else [part.content]
    return [*own, *(cell.content for cells in part.rows for cell in cells)]


# ---------------------------------------------------------------- what typst sets


def _source(parts: Sequence[Part], style: Style, heights: dict[int, float]) -> str:
    """Edges of text are those of the font, so that a box holds all of its ink."""
    rtl = style.language == "ar"
    region = f'region: "{REGIONS[style.language]}", ' if style.language in REGIONS else ""
    head = f"""#set page(width: {style.width_pt}pt, height: {style.height_pt}pt, margin: {style.margin_pt}pt)
#set page(columns: {style.columns})
#set columns(gutter: {GUTTER_PT}pt)
#set text(font: "{font_of(style)[0]}", size: {style.size_pt}pt, lang: "{style.language}", {region}fallback: false,
  top-edge: "ascender", bottom-edge: "descender", hyphenate: false)
#set par(leading: 0.25em, spacing: 0.9em)
#let placed(number, body) = block(breakable: false, width: 100%, layout(space => {{
  let size = measure(body, width: space.width)
  context {{
    let at = here().position()
    let left = at.x + {"space.width - size.width" if rtl else "0pt"}
    [#metadata((number: number, page: at.page, left: left.pt(), top: at.y.pt(), right: (left + size.width).pt(),
      bottom: (at.y + size.height).pt()))<placed>]
  }}
  body
}}))
"""
    bodies = (_body(number, part, heights.get(number, 0)) for number, part in enumerate(parts))
    return head + "\n".join(f"#placed({number}, {body})" for number, body in enumerate(bodies))


def _body(number: int, part: Part, height_pt: float) -> str:
    if part.role in SIZES:
        return f"text(size: {SIZES[part.role]}pt, {_string(part.content)})"
    if part.role == "li":
        return f"list([#{_string(part.content)}])"
    if part.role == "table":
        columns = sum(cell.columns for cell in part.rows[0])
        cells = [
            f"table.cell(rowspan: {cell.rows}, colspan: {cell.columns}, [#{_string(cell.content)}])"
            for row in part.rows
            for cell in row
        ]
        return f"table(columns: {columns}, {', '.join(cells)})"
    if part.role in DRAWN:
        return f'image("{number}.png", height: {height_pt:g}pt)'
    return f"text({_string(part.content)})"


def _string(text: str) -> str:
    """A string of typst: nothing in it is markup."""
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _picture(part: Part, style: Style) -> bytes:
    if part.role == "formula":
        return figures.formula(part.content)
    if part.role == "chemical formula":
        return figures.molecule(part.content)
    if part.role == "music sheet":
        if not part.picture:
            raise ValueError("a score without picture: score_part makes both from MusicXML")
        return part.picture
    if style.language == "ar":
        raise ValueError("no charts in Arabic: matplotlib does not join its letters")
    return figures.chart(part.rows, None if style.language == "en" else font_file(style))


def _fitting(part: Part, picture: bytes, style: Style) -> float:
    """Height in points of a picture that is shown pixel by pixel. Raises ValueError: wider than a column."""
    width, height = Image.open(io.BytesIO(picture)).size
    if width / PT > style.column_pt:
        raise ValueError(f"a part is larger than its page: {part.role} {part.content[:40]!r}, {width / PT:.0f} pt wide")
    return height / PT

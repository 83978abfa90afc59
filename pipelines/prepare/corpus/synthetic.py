"""Synthetic pages: real text set by typst, which says where every block lies. A formula or a chart is drawn
from the source that the HTML has. Pages come out as rows of the format `layout`.

    pages_of([Part("h1", "Title"), Part("p", "Text."), ...], Style(language="ja", columns=2)) -> [Page(png, rows)]

Fonts: Latin scripts and Arabic in DejaVu Sans (matplotlib carries it), Japanese in IPAexGothic (matplotlib-fontja
carries it), Chinese in Noto Sans CJK (Debian: fonts-noto-cjk). A character that the font has no glyph for is an error
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
from fontTools.ttLib import TTCollection, TTFont

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
    "zh": ("Noto Sans CJK SC", "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc"),
}
"""Family and file: below an installed package, or of the system."""


@dataclass(frozen=True)
class Part:
    """`content`: text; LaTeX of a formula. `rows`: cells of a table, or of a chart: headings, then name and number."""

    role: Literal["p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "table", "formula", "chart"]
    content: str = ""
    rows: Sequence[Sequence[Cell]] = ()


@dataclass(frozen=True)
class Style:
    language: Language = "en"
    width_pt: float = 400
    height_pt: float = 560
    columns: int = 1
    size_pt: float = 10


@dataclass(frozen=True)
class Page:
    png: bytes
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """`type`, `bbox` in pixels of the picture, `text` or `html`: blocks of the format `layout`, in reading order."""


def pages_of(parts: Sequence[Part], style: Style) -> list[Page]:
    """Pages of a document; a part is never cut.

    Raises:
        ValueError: a character without glyph, a font that is not there, or a part higher than a page.
    """
    check_glyphs([text for part in parts for text in _texts(part)], style.language)
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            if part.role in ("formula", "chart"):
                (Path(folder) / f"{number}.png").write_bytes(_picture(part))
        source = Path(folder) / "page.typ"
        source.write_text(_source(parts, style))
        fonts: Any = {"font_paths": [str(font_file(style.language).parent)], "ignore_system_fonts": True}
        placed = json.loads(typst.query(str(source), "<placed>", field="value", **fonts))
        drawn = typst.compile(str(source), format="png", ppi=PPI, **fonts)
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
    found: dict[str, Any] = {"type": part.role, "bbox": [value * PT for value in (left, top, right, bottom)]}
    return {**found, "html": cells_html(part.rows)} if part.rows else {**found, "text": part.content}


def row(identity: str, images: Sequence[str], pages: Sequence[Page], style: Style) -> dict[str, Any]:
    """A row of the format `layout`; `images` are the paths of the pages' pictures."""
    size = {"width": round(style.width_pt * PT), "height": round(style.height_pt * PT)}
    listed = [{"image": image, **size, "blocks": page.blocks} for image, page in zip(images, pages, strict=True)]
    return {"id": identity, "pages": listed}


# ---------------------------------------------------------------- fonts


def font_file(language: Language) -> Path:
    """Raises ValueError when the font is not installed."""
    name = FONTS[language][1]
    path = Path(name) if name.startswith("/") else package_folder(name.partition("/")[0]) / name.partition("/")[2]
    if not path.exists():
        raise ValueError(f"no font for {language}: {name} is not there (README of pipelines/prepare: synthetic pages)")
    return path


@cache
def _glyphs(path: Path) -> frozenset[int]:
    font = TTCollection(str(path)).fonts[0] if path.suffix == ".ttc" else TTFont(str(path))
    return frozenset(font.getBestCmap() or ())


def check_glyphs(texts: Sequence[str], language: Language) -> None:
    """Raises ValueError with the characters that the language's font cannot draw."""
    known = _glyphs(font_file(language))
    missing = sorted({char for text in texts for char in text if not char.isspace() and ord(char) not in known})
    if missing:
        shown = ", ".join(f"{char} (U+{ord(char):04X})" for char in missing[:8])
        raise ValueError(f"{FONTS[language][0]} has no glyph for {len(missing)} characters: {shown}")


def _texts(part: Part) -> list[str]:
    """What is set in the language's font; a formula is drawn in its own."""
    own = [] if part.role == "formula" else [part.content]
    return [*own, *(cell.content for cells in part.rows for cell in cells if part.role == "table")]


# ---------------------------------------------------------------- what typst sets


def _source(parts: Sequence[Part], style: Style) -> str:
    """Edges of text are those of the font, so that a box holds all of its ink."""
    rtl = style.language == "ar"
    head = f"""#set page(width: {style.width_pt}pt, height: {style.height_pt}pt, margin: 28pt, columns: {style.columns})
#set columns(gutter: 18pt)
#set text(font: "{FONTS[style.language][0]}", size: {style.size_pt}pt, lang: "{style.language}", fallback: false,
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
    return head + "\n".join(f"#placed({number}, {_body(number, part)})" for number, part in enumerate(parts))


def _body(number: int, part: Part) -> str:
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
    if part.role in ("formula", "chart"):
        return f'image("{number}.png", height: {28 if part.role == "formula" else 110}pt)'
    return f"text({_string(part.content)})"


def _string(text: str) -> str:
    """A string of typst: nothing in it is markup."""
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _picture(part: Part) -> bytes:
    """A formula from its LaTeX (matplotlib's subset), or bars from a table: a heading row, then names and numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sink = io.BytesIO()
    if part.role == "formula":
        figure = Figure(figsize=(0.1, 0.1))
        FigureCanvasAgg(figure)
        figure.text(0, 0, f"${part.content}$", fontsize=14)
        figure.savefig(sink, dpi=200, bbox_inches="tight", pad_inches=0.03)
        return sink.getvalue()
    figure = Figure(figsize=(3.2, 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heading, *rows = part.rows
    axes.bar([cells[0].content for cells in rows], [float(cells[1].content) for cells in rows])
    axes.set_xlabel(heading[0].content)
    axes.set_ylabel(heading[1].content)
    figure.savefig(sink, dpi=160)
    return sink.getvalue()

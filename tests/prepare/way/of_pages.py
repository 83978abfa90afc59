"""Rows of documents: layouts, OCR, PDF, scores; and synthetic pages with formulas, charts, molecules, handwriting and
other scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.prepare.corpus.synthetic import Part, Style, pages_of, row, score_part
from tests.prepare.builders import a_picture, write_lines
from tests.prepare.music import FIRST, note, score
from tests.prepare.test_page_formats import (
    CELLS,
    HOCR,
    PAGE,
    TWO_COLUMNS,
    TWO_COLUMNS_SAY,
    TYPED,
    TYPED_TOLD,
    a_pdf,
    doclaynet,
)
from tests.prepare.test_synthetic import BARS, WORDS
from tests.prepare.way import of_text
from tests.prepare.way.row import IMAGE, Row, block, objects, want

ASKED = "QwenVL HTML"


def page(identity: str, of: str, *blocks: tuple) -> dict[str, Any]:
    """A page in a chat: the picture, and its HTML."""
    return want(identity, [("user", [IMAGE, ASKED]), ("assistant", [objects(*blocks, form="html")])], of)


# ---------------------------------------------------------------- layouts

BLOCKS = [
    *TYPED,
    {"type": "picture", "bbox": [10, 170, 290, 220], "text": "A red field."},
    {"type": "text", "bbox": [10, 230, 100, 280], "text": "The end."},
]


def layout(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page.png").write_bytes(a_picture(300, 400))
    facts = {"id": "p", "image": "page.png", "width": 300, "height": 400}
    return write_lines(folder / "rows.jsonl", [{**facts, "blocks": BLOCKS}])


def coco_layout(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return doclaynet(folder, PAGE, CELLS)


def faulty_layout(folder: Path) -> Path:
    """A block without width."""
    folder.mkdir(parents=True)
    path = doclaynet(folder, [("Text", [10, 10, 0, 20], {"text": "x"})], None)
    found = json.loads(path.read_text())
    found["images"][0]["id"] = 8
    for annotation in found["annotations"]:
        annotation["image_id"] = 8
    path.write_text(json.dumps(found))
    return path


HALF = 512 / 1025
"""The picture is half as large as what the annotations are in."""


def halved(role: str, *xyxy: float, content: str = "") -> tuple:
    return block(role, *(round(value * HALF, 3) for value in xyxy), content=content)


def hocr(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page one.png").write_bytes(a_picture(800, 600))
    (folder / "book.hocr").write_text(content)
    return folder / "book.hocr"


WHOLE = HOCR.replace("<div class='ocr_page' id='page_2' title='bbox 0 0 400 300'></div>", "")
assert WHOLE != HOCR


def pdf(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return a_pdf(folder / "a.pdf", TWO_COLUMNS)


def no_words(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return a_pdf(folder / "b.pdf", "#rect(width: 50pt, height: 50pt, fill: red)")


def file_of(folder: Path, name: str, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    return folder / name


TUNE = score([FIRST + note("G4", 8) + note("A4", 8), note("B4", 16)])
ABC = "X:1\nT:\nM:4/4\nL:1/8\nK:G\nG4 A4 | B8 |"


class Anywhere(tuple):
    """A box that only has to lie on the page: the font says where the ink is, and tests of boxes and ink hold it."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple) or len(other) != 4:
            return False
        return 0 <= other[0] < other[2] <= self[0] and 0 <= other[1] < other[3] <= self[1]

    __hash__ = None  # type: ignore[assignment]


def placed(role: str, size: tuple[int, int], content: str) -> tuple:
    return role, "box", Anywhere(size), {"role": role, "content": content}


def inked(identity: str, of: str, *parts: tuple[str, str]) -> dict[str, Any]:
    """A page that was set: words exact, boxes anywhere on it."""
    width, height = map(int, of.rpartition(" ")[2].split("x"))
    return page(identity, of, *(placed(role, (width, height), content) for role, content in parts))


FAULTS = of_text.faulty("layout")
FILES = [
    Row(
        "layout",
        "document",
        "chat",
        layout,
        [
            page(
                "p",
                "page.png 300x400",
                *(block(role, *xyxy, content=content) for role, xyxy, content in TYPED_TOLD),
                block("image caption", 10, 170, 290, 220, content="A red field."),
                block("p", 10, 230, 100, 280, content="The end."),
            )
        ],
        of_text.lines(*(content for content, _ in FAULTS)),
        {reason: sum(one == reason for _, one in FAULTS) for _, reason in FAULTS},
        quick=True,
    ),
    Row(
        "coco_layout",
        "document",
        "chat",
        coco_layout,
        [
            page(
                "7",
                "ab12.png 512x512",
                halved("h1", 100, 50, 920, 110, content="A quite title"),
                halved("p", 100, 200, 480, 260, content="left also"),
                halved("li", 100, 280, 480, 300, content="entry"),
                halved("image caption", 100, 400, 480, 600),
                halved("p", 520, 200, 920, 300, content="right column below"),
                halved("formula", 520, 400, 900, 450),
            )
        ],
        faulty_layout,
        {"empty-box": 1},
        media=lambda path: path.parents[1] / "PNG",
    ),
    Row(
        "hocr",
        "document",
        "chat",
        partial(hocr, content=WHOLE),
        [
            page(
                "good/book.hocr#1",
                "page one.png 800x600",
                block("image caption", 500, 20, 780, 200),
                block("p", 20, 20, 480, 120, content="Tea & cof- fee"),
                block("p", 20, 400, 780, 580, content="plain line"),
            )
        ],
        partial(hocr, content=HOCR.replace("bbox 10 200 390 290", "bbox 10 200 10 290")),
        {"empty-box": 1, "wrong-form": 1},
    ),
    Row(
        "pdf",
        "document",
        "chat",
        pdf,
        [inked("good/a.pdf#page=1", "a.pdf#page=1 800x1000", *TWO_COLUMNS_SAY)],
        no_words,
        {"no-text-layer": 1},
    ),
    Row(
        "musicxml",
        "document",
        "chat",
        partial(file_of, name="tune.musicxml", content=TUNE),
        [inked("good/tune.musicxml#score=1", "tune.musicxml#score=1 1050x140", ("music sheet", ABC))],
        partial(file_of, name="torn.musicxml", content=TUNE[:-40]),
        {"bad-xml": 1},
    ),
]

# ---------------------------------------------------------------- synthetic pages


def synthetic(parts: Callable[[], tuple[Part, ...]], style: Style) -> Callable[[Path], Path]:
    return partial(_synthetic, parts=parts, style=style)


def _synthetic(folder: Path, parts: Callable[[], tuple[Part, ...]], style: Style) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    [made] = pages_of(parts(), style)
    (folder / "page.png").write_bytes(made.png)
    return write_lines(folder / "rows.jsonl", [row("p", ["page.png"], [made], style)])


def no_picture(folder: Path) -> Path:
    """A page whose picture has been lost."""
    return write_lines(folder / "rows.jsonl", [{"id": "gone", "image": "gone.png", "blocks": BLOCKS}])


def of_synthetic(name: str, parts: Callable[[], tuple[Part, ...]], *said: tuple[str, str], **style: Any) -> Row:
    wanted = [inked("p", "page.png 800x1120", *said)]
    return Row(
        f"layout-{name}",
        "document",
        "chat",
        synthetic(parts, Style(**style)),
        wanted,
        no_picture,
        {"missing-media": 1},
    )


def drawings() -> tuple[Part, ...]:
    drawn = (Part("formula", LATEX), Part("chart", rows=BARS), Part("chemical formula", SMILES))
    return (Part("p", DRAWN), *drawn, score_part(TUNE, Style()))


DRAWN = "What is drawn below says the same as its text."
LATEX, SMILES = r"\frac{a}{b} = \sqrt{x^2}", "CC(=O)Oc1ccccc1C(=O)O"
CHART = ("<table><tr><th>fruit</th><th>kilos</th></tr><tr><td>fig</td><td>3</td></tr><tr><td>plum</td>"
         "<td>5.5</td></tr></table>")  # fmt: skip
HAND = "Dear all, this is my hand."
SYNTHETIC = [
    of_synthetic(
        "drawings",
        drawings,
        ("p", DRAWN),
        ("formula", LATEX),
        ("chart", CHART),
        ("chemical formula", SMILES),
        ("music sheet", ABC),
    ),
    of_synthetic("handwriting", lambda: (Part("p", HAND),), ("p", HAND), handwriting=True),
    *(
        of_synthetic(
            language,
            partial(lambda title, said: (Part("h1", title), Part("p", said)), *words),
            ("h1", words[0]),
            ("p", words[1]),
            language=language,
        )
        for language, words in WORDS.items()
    ),
]
ROWS = [*FILES, *SYNTHETIC]

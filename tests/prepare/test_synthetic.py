"""Synthetic pages: boxes hold the ink, text is the source's, no glyph is missing, and the whole way to tokens."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.prepare.corpus.synthetic import FONTS, Language, Page, Part, Style, font_file, pages_of, row
from pipelines.prepare.formats.tables import Cell
from tests.prepare.builders import write_lines
from tests.prepare.test_page_formats import learnt, told
from tests.prepare.through import only, read

TABLE = (
    (Cell("Fruit & <nut>", columns=2), Cell("Price")),
    (Cell("apple", rows=2), Cell("red"), Cell("3")),
    (Cell("green"), Cell("4")),
)
BARS = (
    (Cell("fruit", heading=True), Cell("kilos", heading=True)),
    (Cell("fig"), Cell("3")),
    (Cell("plum"), Cell("5.5")),
)
ENGLISH = (
    Part("h1", 'A "quoted" #title with *marks* & <tags>'),
    Part("p", "Real words of a paragraph that goes over a line of the page, and then over one more of them. " * 2),
    Part("h2", "Section $1$"),
    Part("li", "one entry"),
    Part("li", "another _entry_ of the list"),
    Part("table", rows=TABLE),
    Part("formula", r"\frac{a}{b} = \sqrt{x^2}"),
    Part("chart", rows=BARS),
)
WORDS: dict[Language, tuple[str, str]] = {
    "ja": ("文書の読み取り", "これは日本語の文章です。表や図を含むページを作ります。文字の位置は正確にわかります。"),
    "ar": ("قراءة المستندات", "هذه صفحة مكتوبة من اليمين إلى اليسار، ومكان كل فقرة فيها معروف بدقة."),
    "zh": ("文档识别", "这是一个中文页面，包含标题和段落。每个文本块的位置都是已知的。"),
}


def assert_boxes_hold_the_ink(page: Page) -> None:
    """Within two pixels; each box has ink near all of its sides."""
    pixels = np.asarray(Image.open(io.BytesIO(page.png)).convert("L")).copy()
    for block in page.blocks:
        left, top, right, bottom = map(round, block["bbox"])
        inside = pixels[top:bottom, left:right] < 140
        assert inside.any(), block
        across = np.flatnonzero(inside.any(axis=0))
        if block["type"] not in ("chart", "formula"):  # pictures have a margin
            assert across[0] <= 24 and across[-1] >= right - left - 24, block  # an em: a full-width stop is half blank
    for block in page.blocks:
        left, top, right, bottom = map(round, block["bbox"])
        pixels[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = 255
    assert pixels.min() > 140


def test_a_page_with_every_kind_of_block_goes_all_the_way_to_tokens(tmp_path: Path):
    style = Style()
    pages = pages_of(ENGLISH, style)
    assert len(pages) == 1
    assert_boxes_hold_the_ink(pages[0])
    (tmp_path / "p.png").write_bytes(pages[0].png)
    path = write_lines(tmp_path / "p.jsonl", [row("p", ["p.png"], pages, style)])
    sample, files = only(read("layout", path), "document")
    assert [(role, content) for role, _, content in told(sample)] == [
        *((part.role, part.content) for part in ENGLISH[:5]),
        ("table", '<table><tr><td colspan="2">Fruit &amp; &lt;nut&gt;</td><td>Price</td></tr>'
                  '<tr><td rowspan="2">apple</td>'
                  "<td>red</td><td>3</td></tr><tr><td>green</td><td>4</td></tr></table>"),
        ("formula", r"\frac{a}{b} = \sqrt{x^2}"),
        ("chart", "<table><tr><th>fruit</th><th>kilos</th></tr><tr><td>fig</td><td>3</td></tr><tr><td>plum</td>"
                  "<td>5.5</td></tr></table>"),
    ]  # fmt: skip
    for found in learnt(sample, files, tmp_path):
        assert [tag.text for tag in found[:5]] == [part.content for part in ENGLISH[:5]]


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("columns", [1, 2])
def test_pages_of_other_scripts_have_every_glyph_and_true_boxes(language: Language, columns: int):
    try:
        font_file(language)
    except ValueError:
        pytest.skip(f"{FONTS[language][1]} is not installed")
    title, words = WORDS[language]
    parts = [Part("h1", title), *(Part("p", words * count) for count in (2, 3, 4)), Part("li", words)] * 3
    pages = pages_of(parts, Style(language=language, columns=columns))
    assert [block["text"] for page in pages for block in page.blocks] == [part.content for part in parts]
    for page in pages:
        assert_boxes_hold_the_ink(page)
    lefts = [block["bbox"][0] for block in pages[0].blocks]
    if columns == 2:  # from right to left the first column is the right one
        assert (lefts[0] > lefts[-1]) == (language == "ar")


@pytest.mark.parametrize(("language", "text"), [("en", "日本"), ("ja", "عربي"), ("ar", "漢字"), ("en", "\U0001f9ff")])
def test_a_character_without_glyph_is_an_error_and_no_box_of_nothing(language: Language, text: str):
    with pytest.raises(ValueError, match=r"has no glyph for \d+ characters: .*U\+"):
        pages_of([Part("p", f"good {text}")], Style(language=language))


def test_a_part_that_no_page_holds_is_an_error():
    with pytest.raises(ValueError, match="larger than its page"):
        pages_of([Part("p", "word " * 3000)], Style())


def test_the_same_parts_give_the_same_bytes():
    assert pages_of(ENGLISH, Style()) == pages_of(ENGLISH, Style())

"""Synthetic pages: boxes hold the ink, text is the source's, no glyph is missing, and the whole way to tokens."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rdkit import Chem

from pipelines.prepare.corpus.synthetic import Language, Page, Part, Style, pages_of, row, score_part
from pipelines.prepare.formats.rows import BadRow
from pipelines.prepare.formats.tables import Cell
from tests.prepare.builders import write_lines
from tests.prepare.music import FIRST, heard, note, score
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


@pytest.mark.parametrize(
    "part",
    [
        Part("p", "word " * 3000),
        Part("chemical formula", "C" * 60),
        score_part(score([FIRST + note("G4", 2) * 8] * 4), Style(width_pt=700)),
    ],
)
def test_a_part_that_no_page_holds_is_an_error(part: Part):
    with pytest.raises(ValueError, match="larger than its page"):
        pages_of([part], Style(width_pt=200, columns=1))


TUNE = score(
    [
        FIRST + note("G4", 6) + note("A4", 2) + note("B4", 4) + note("C5", 4),
        note("F5", 8, "<accidental>natural</accidental>") + note("r", 8),
    ]
)
CAFFEINE = "CN1C=NC2=C1C(=O)N(C)C(=O)N2C"


def test_a_score_and_a_molecule_are_drawn_from_what_the_page_says(tmp_path: Path):
    style = Style(width_pt=300, height_pt=350)
    parts = [Part("h1", "Caffeine"), Part("chemical formula", CAFFEINE), score_part(TUNE, style), Part("p", "End.")]
    pages = pages_of(parts, style)
    assert_boxes_hold_the_ink(pages[0])
    (tmp_path / "p.png").write_bytes(pages[0].png)
    sample, files = only(
        read("layout", write_lines(tmp_path / "p.jsonl", [row("p", ["p.png"], pages, style)])), "document"
    )
    abc = "X:1\nT:\nM:4/4\nL:1/8\nK:G\nG3 A B2 c2 | =f4 z4 |"
    assert [(role, content) for role, _, content in told(sample)] == [
        ("h1", "Caffeine"), ("chemical formula", CAFFEINE), ("music sheet", abc), ("p", "End."),
    ]  # fmt: skip
    for found in learnt(sample, files, tmp_path):
        assert [tag.kind for tag in found] == ["", "chemical formula smile", "music sheet abc notation", ""]
        assert Chem.CanonSmiles(found[1].text) == Chem.CanonSmiles(CAFFEINE)
        assert [bar for bar, *_ in heard(found[2].text, "abc")] == [bar for bar, *_ in heard(TUNE, "xml")]


def test_pictures_of_other_sources_differ():
    style = Style(width_pt=300, height_pt=300)
    other = score_part(TUNE.replace("<step>C</step>", "<step>D</step>"), style)
    assert other.content != score_part(TUNE, style).content and other.picture != score_part(TUNE, style).picture
    ethanol, ether = (pages_of([Part("chemical formula", smiles)], style)[0].png for smiles in ("CCO", "COC"))
    assert ethanol != ether


@pytest.mark.parametrize(
    ("parts", "style", "told"),
    [
        ([Part("chemical formula", "C1CC")], Style(), "no SMILES that RDKit reads: 'C1CC'"),
        ([Part("chemical formula", "")], Style(), "no SMILES"),
        ([Part("music sheet", "X:1\nK:C\nCDE|")], Style(), "score_part makes both"),
        ([Part("formula", "水")], Style(), "other characters than LaTeX"),
        ([Part("chart", rows=BARS)], Style(language="ar"), "no charts in Arabic"),
        ([Part("chart", rows=[(Cell("果"), Cell("a")), (Cell("b"), Cell("1"))])], Style(), "no glyph for 1 char"),
        ([Part("p", "words")], Style(language="ja", handwriting=True), "no handwriting font for ja"),
        ([Part("p", "слова 日")], Style(handwriting=True), "Caveat has no glyph for 1 characters: 日"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(parts: list[Part], style: Style, told: str):
    with pytest.raises(ValueError, match=told):
        pages_of(parts, style)


def test_a_score_of_two_pages_is_no_part_of_a_page():
    with pytest.raises(BadRow, match="a score of one page"):
        score_part(score([FIRST + note("G4", 16), *[note("A4", 16)] * 200]), Style(width_pt=120))


def test_handwriting_has_true_boxes_though_its_letters_lean():
    style = Style(width_pt=260, height_pt=330, size_pt=14, handwriting=True)
    parts = [Part("h2", "Dear reader, (Jfgy)"), Part("p", "jumping over VXT lazy dogs by hand. " * 4), Part("li", "WH")]
    pages = pages_of([*parts, Part("table", rows=TABLE)], style)
    assert [block["text"] for block in pages[0].blocks[:3]] == [part.content for part in parts]
    assert_boxes_hold_the_ink(pages[0])
    assert pages[0].png != pages_of([*parts, Part("table", rows=TABLE)], Style(width_pt=260, height_pt=330))[0].png


def test_a_character_has_the_shape_of_its_language(monkeypatch: pytest.MonkeyPatch):
    """The strokes of 直 and 骨 differ between Chinese and Japanese; one font has both shapes."""
    from pipelines.prepare.corpus import synthetic

    chinese = pages_of([Part("p", "直骨")], Style(language="zh"))[0]
    monkeypatch.setitem(synthetic.FONTS, "ja", synthetic.FONTS["zh"])
    japanese = pages_of([Part("p", "直骨")], Style(language="ja"))[0]
    assert chinese.blocks == japanese.blocks and chinese.png != japanese.png


def test_a_chart_has_the_words_of_its_language():
    rows = [(Cell("水果"), Cell("公斤")), (Cell("苹果"), Cell("3")), (Cell("梨"), Cell("5"))]
    style = Style(language="zh")
    english = [(Cell("a"), Cell("b")), (Cell("c"), Cell("3")), (Cell("d"), Cell("5"))]
    chinese = pages_of([Part("chart", rows=rows)], style)[0]
    assert chinese.png != pages_of([Part("chart", rows=english)], style)[0].png
    assert_boxes_hold_the_ink(chinese)


def test_the_same_parts_give_the_same_bytes():
    assert pages_of(ENGLISH, Style()) == pages_of(ENGLISH, Style())

"""Pages with their layout: typed blocks, COCO-style boxes with text cells, hOCR, PDF, as the HTML a model learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
import pytest
import typst
from PIL.Image import Image

from pipelines.prepare.formats import format_of, tables
from pipelines.prepare.formats.blocks import reading_order
from pipelines.prepare.formats.rows import Bad, BadRow
from tests.prepare.builders import a_picture, write_lines
from tests.prepare.through import Tag, boxes_lie_where, made, only, read, tags, trained
from trainer.data.media import upright
from trainer.data.sample import Box, Object, Objects, Sample
from trainer.errors import DataError


def blocks_of(sample: Sample) -> list[Object]:
    return [
        thing
        for message in sample.messages
        for part in message.parts
        if isinstance(part, Objects)
        for thing in part.objects
    ]


def told(sample: Sample) -> list[tuple]:
    """(role, box, content)"""
    return [(item.role, item.at.xyxy, item.content) for item in blocks_of(sample) if isinstance(item.at, Box)]


def learnt(sample: Sample, files: list[bytes], folder: Path) -> list[list[Tag]]:
    """What the model learns to write of a page of one picture, both variants, boxes checked against the sample's."""
    found = []
    for result in trained(sample, files, folder):
        page = tags(result.targets.strip())
        placed = [tag for tag in page if tag.name not in ("ul", "img")]
        boxes_lie_where(placed, [item.at.xyxy for item in blocks_of(sample)], sample.media[0], result.grids[0])  # type: ignore[union-attr]
        found.append(placed)
    return found


# ---------------------------------------------------------------- tables and reading order


def test_tables_of_others_become_rows_of_cells_with_their_spans():
    value = (
        "<table border=1><thead><tr><th>Name<th colspan='2'>Both</tr></thead><tbody>"
        "<tr><td rowspan=2>a &lt; <b>b</b></td>"
        "<td>1</td><td>2<br>3</td></tr><tr><td colspan=2></td></tr></tbody></table>"
    )
    assert tables.table_html(value) == (
        '<table><tr><th>Name</th><th colspan="2">Both</th></tr>'
        '<tr><td rowspan="2">a &lt; b</td><td>1</td><td>2 3</td></tr>'
        '<tr><td colspan="2"></td></tr></table>'
    )
    assert tables.table_html(tables.table_html(value)) == tables.table_html(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "<table></table>",
        "words <table><tr><td>1</td></tr></table>",
        "<table><tr><td>1",
        "<table><tr><td><table><tr><td>1</td></tr></table></td></tr></table>",
        "<table><tr><td rowspan=3>1</td></tr></table>",
        "<table><tr><td>1</td><td rowspan=2>2</td></tr><tr><td colspan=2>3</td></tr></table>",
        "<table><tr><td colspan=99999999>1</td></tr></table>",
    ],
)
def test_a_table_whose_cells_do_not_go_together_is_refused(value: str):
    with pytest.raises(BadRow, match="broken-table"):
        tables.table_html(value)


COLUMNS = [
    (5, 0, 95, 10),  # title across
    (0, 20, 45, 40), (0, 42, 45, 80), (55, 20, 100, 50), (55, 52, 100, 80),  # two columns, no gap in common but one
    (10, 85, 90, 95),  # a figure across
    (0, 100, 45, 120), (55, 100, 100, 110), (55, 111, 100, 120),  # columns below it
]  # fmt: skip


def test_columns_are_read_one_after_the_other_between_what_crosses_them():
    assert reading_order(COLUMNS, gap=5) == list(range(9))
    shuffled = [7, 3, 0, 8, 5, 1, 6, 4, 2]
    assert [shuffled[at] for at in reading_order([COLUMNS[at] for at in shuffled], gap=5)] == list(range(9))
    assert reading_order(COLUMNS, gap=20) != list(range(9))  # a gap too narrow for columns: by rows
    assert reading_order([], gap=5) == []


# ---------------------------------------------------------------- typed blocks


GRID = "<table class='t'><tr><td colspan=2>A &amp; B</td></tr><tr><td>1</td><td>2</td></tr></table>"
CLEAN = '<table><tr><td colspan="2">A &amp; B</td></tr><tr><td>1</td><td>2</td></tr></table>'
TYPED = (
    {"type": "Title", "bbox": [10, 10, 290, 40], "text": "Tea & <coffee>"},
    {"type": "list-item", "bbox": [20, 50, 200, 65], "text": "one"},
    {"type": "list-item", "bbox": [20, 70, 220, 85], "text": "two"},
    {"type": "table", "bbox": [10, 100, 290, 160], "html": GRID},
)
TYPED_TOLD = (
    ("h1", (10, 10, 290, 40), "Tea & <coffee>"),
    ("li", (20, 50, 200, 65), "one"),
    ("li", (20, 70, 220, 85), "two"),
    ("table", (10, 100, 290, 160), CLEAN),
)
"""As `told` says it."""


def test_typed_blocks_become_lists_tables_and_pictures(tmp_path: Path):
    (tmp_path / "page.png").write_bytes(a_picture(300, 400))
    listed = [
        *TYPED,
        {"type": "music sheet", "bbox": [10, 170, 290, 220], "text": "X:1\nK:C\nCDE|"},
        {"type": "chemical formula", "bbox": [10, 230, 100, 280], "text": "CC(=O)O"},
        {"type": "chart", "bbox": [10, 290, 290, 390], "html": GRID},
    ]
    row = {"id": "p", "image": "page.png", "width": 150, "height": 200, "blocks": listed}
    half = {**row, "blocks": [{**block, "bbox": [value / 2 for value in block["bbox"]]} for block in listed]}
    sample, files = only(read("layout", write_lines(tmp_path / "rows.jsonl", [half])), "document")
    assert told(sample) == [
        *TYPED_TOLD,
        ("music sheet", (10, 170, 290, 220), "X:1\nK:C\nCDE|"),
        ("chemical formula", (10, 230, 100, 280), "CC(=O)O"),
        ("chart", (10, 290, 290, 390), CLEAN),
    ]
    for page in learnt(sample, files, tmp_path):
        assert [(tag.name, tag.kind) for tag in page[3:]] == [
            ("table", ""),
            ("div", "music sheet abc notation"),
            ("div", "chemical formula smile"),
            ("div", "chart"),
        ]
        assert page[0].text == "Tea & <coffee>" and page[3].text == "<tr><td colspan=2>A & B<tr><td>1<td>2"


# ---------------------------------------------------------------- COCO-style layouts

NAMES = ("Caption", "Footnote", "Formula", "List-item", "Page-footer", "Page-header", "Picture", "Section-header",
         "Table", "Text", "Title")  # fmt: skip


def doclaynet(folder: Path, annotations: list[tuple], cells: list[tuple] | None, *, frame: float = 1.0) -> Path:
    """The folders of DocLayNet: COCO, PNG, JSON. Boxes are in COCO's frame of 1025x1025, twice the picture. Cells
    are in the original page's points (`frame`) or in COCO's."""
    for name in ("COCO", "PNG", "JSON"):
        (folder / name).mkdir()
    (folder / "PNG" / "ab12.png").write_bytes(a_picture(512, 512))
    image = {"id": 7, "width": 1025, "height": 1025, "file_name": "ab12.png", "page_no": 1}
    listed = [
        {
            "id": at,
            "image_id": 7,
            "category_id": NAMES.index(name) + 1,
            "bbox": box,
            "iscrowd": 0,
            "precedence": 0,
            **more,
        }
        for at, (name, box, more) in enumerate(annotations)
    ]
    categories = [{"id": at, "name": name} for at, name in enumerate(NAMES, 1)]
    found = {"images": [image], "annotations": listed, "categories": categories}
    (folder / "COCO" / "train.json").write_text(json.dumps(found))
    if cells is not None:
        metadata = {
            "page_hash": "ab12",
            "coco_width": 1025,
            "coco_height": 1025,
            "original_width": 612,
            "original_height": 792,
        }
        scale = (1.0, 1.0) if frame == 1.0 else (612 / 1025, 792 / 1025)
        stored = [
            {"text": text, "bbox": [box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]]}
            for text, box in cells
        ]
        (folder / "JSON" / "ab12.json").write_text(json.dumps({"metadata": metadata, "cells": stored}))
    return folder / "COCO" / "train.json"


PAGE = [
    ("Text", [520, 200, 400, 100], {}),
    ("Title", [100, 50, 820, 60], {}),
    ("Text", [100, 200, 380, 60], {}),
    ("List-item", [100, 280, 380, 20], {}),
    ("Picture", [100, 400, 380, 200], {}),
    ("Formula", [520, 400, 380, 50], {}),
    ("Text", [100, 200, 380, 60], {"precedence": 1}),
]
CELLS = [
    ("quite", [260, 65, 100, 30]), ("A", [200, 60, 20, 30]), ("title", [380, 62, 100, 30]),
    ("right", [530, 210, 100, 20]), ("column", [640, 212, 100, 20]), ("below", [530, 240, 90, 20]),
    ("left", [110, 210, 100, 20]), ("• entry", [110, 281, 100, 18]), ("E=mc2", [600, 410, 100, 30]),
    ("outside", [10, 900, 100, 30]), ("also", [110, 232, 50, 20]),
]  # fmt: skip


def read_coco(path: Path) -> list:
    from pipelines.prepare.formats import coco_layout
    from trainer.recipe import Source

    source = Source.model_validate(
        {"format": "coco_layout", "path": str(path), "kind": "document", "rendering": "chat"}
    )
    return list(coco_layout.read(str(path), str(path.parents[1] / "PNG"), source))


@pytest.mark.parametrize("frame", [1.0, 0.5])
def test_a_page_of_doclaynet_takes_its_text_from_the_cells_in_either_frame(tmp_path: Path, frame: float):
    sample, files = only(read_coco(doclaynet(tmp_path, PAGE, CELLS, frame=frame)), "document")
    half = 512 / 1025
    want = [
        ("h1", (100, 50, 920, 110), "A quite title"),
        ("p", (100, 200, 480, 260), "left also"),
        ("li", (100, 280, 480, 300), "entry"),
        ("image caption", (100, 400, 480, 600), ""),
        ("p", (520, 200, 920, 300), "right column below"),
        ("formula", (520, 400, 900, 450), ""),
    ]
    assert [(role, content) for role, _, content in told(sample)] == [(role, content) for role, _, content in want]
    for (_, box, _), (_, full, _) in zip(told(sample), want, strict=True):
        assert box == pytest.approx([value * half for value in full])
    for page in learnt(sample, files, tmp_path):
        assert [tag.name for tag in page] == ["h1", "p", "li", "div", "p", "div"]


@pytest.mark.parametrize(
    ("annotations", "cells", "reason"),
    [
        (PAGE, None, "no-text"),
        (PAGE, CELLS[3:], "no-text"),
        ([("Text", [10, 10, 0, 20], {"text": "x"})], None, "empty-box"),
        ([("Text", [10, 10, 2000, 20], {"text": "x"})], None, "outside-picture"),
        ([("Table", [10, 10, 200, 20], {"html": "<table><tr><td rowspan=9>"})], None, "broken-table"),
        ([], None, "no-objects"),
    ],
)
def test_a_layout_without_its_text_is_a_bad_row(tmp_path: Path, annotations, cells, reason):
    [bad] = made(read_coco(doclaynet(tmp_path, annotations, cells)), "document")
    assert isinstance(bad, Bad) and bad.reason == reason and "images[0]" in bad.where


# ---------------------------------------------------------------- hOCR

HOCR = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head><title></title><meta http-equiv="Content-Type" content="text/html;charset=utf-8"/>
  <meta name='ocr-system' content='tesseract 5.3.0' /></head>
 <body>
  <div class='ocr_page' id='page_1' title='image "scans/page one.png"; bbox 0 0 400 300; ppageno 0; scan_res 70 70'>
   <div class='ocr_photo' id='block_1_1' title="bbox 250 10 390 100"></div>
   <div class='ocr_carea' id='block_1_2' title="bbox 10 10 240 60">
    <p class='ocr_par' id='par_1_1' lang='eng' title="bbox 10 10 240 60">
     <span class='ocr_header' id='line_1_1' title="bbox 10 10 240 30; baseline 0 0; x_size 20">
      <span class='ocrx_word' id='word_1_1' title='bbox 10 10 100 30; x_wconf 96'>Tea &amp;</span>
      <span class='ocrx_word' id='word_1_2' title='bbox 110 10 240 30; x_wconf 95'><strong>cof-</strong></span>
     </span>
     <span class='ocr_line' title="bbox 10 40 200 60"><span class='ocrx_word' title='bbox 10 40 90 60'>fee</span></span>
    </p>
   </div>
   <div class='ocr_carea' title="bbox 10 70 240 90"><p class='ocr_par' title="bbox 10 70 240 90">
     <span class='ocr_line' title="bbox 10 70 240 90"><span class='ocrx_word' title='bbox 10 70 20 90'> </span></span>
   </p></div>
   <div class='ocr_carea' title="bbox 10 200 390 290"><p class='ocr_par' title="bbox 10 200 390 290">
     <span class='ocr_line' title="bbox 10 200 390 290">plain line</span></p></div>
  </div>
  <div class='ocr_page' id='page_2' title='bbox 0 0 400 300'></div>
 </body></html>"""


def test_hocr_becomes_paragraphs_in_the_order_of_the_file(tmp_path: Path):
    (tmp_path / "page one.png").write_bytes(a_picture(800, 600))
    (tmp_path / "book.hocr").write_text(HOCR)
    rows = made(read("hocr", tmp_path / "book.hocr"), "document")
    assert isinstance(rows[1], Bad) and rows[1].reason == "wrong-form" and rows[1].where.endswith("book.hocr, page 2")
    assert not isinstance(rows[0], Bad)
    sample, files = rows[0]
    assert told(sample) == [
        ("image caption", (500, 20, 780, 200), ""),
        ("p", (20, 20, 480, 120), "Tea & cof- fee"),
        ("p", (20, 400, 780, 580), "plain line"),
    ]
    assert [tag.text for tag in learnt(sample, files, tmp_path)[0]] == ["", "Tea & cof- fee", "plain line"]


def test_lines_and_words_outside_of_paragraphs_are_blocks_of_their_own(tmp_path: Path):
    """What hOCR without ocr_par looks like, beside what has one; a picture in the middle of a paragraph as well."""
    bare = """<div class='ocr_page' title='image "page one.png"; bbox 0 0 400 300'>
     <span class='ocr_line' title="bbox 10 10 240 30">first line</span>
     <div class='ocr_carea' title="bbox 10 40 240 90">
      <span class='ocr_line' title="bbox 10 40 240 60">
       <span class='ocrx_word' title='bbox 10 40 90 60'>second</span></span>
      <span class='ocrx_word' title='bbox 10 70 90 90'>third</span></div>
     <p class='ocr_par' title="bbox 10 100 240 190"><span class='ocr_line' title="bbox 10 100 240 130">in a</span>
      <div class='ocr_image' title="bbox 300 100 390 190"></div>
      <span class='ocr_line' title="bbox 10 150 240 190">paragraph</span></p>
     <span class='ocr_line' title="bbox 10 200 390 290">last line</span></div>"""
    (tmp_path / "page one.png").write_bytes(a_picture(400, 300))
    (tmp_path / "book.hocr").write_text(f"<html><body>{bare}</body></html>")
    sample, _ = only(read("hocr", tmp_path / "book.hocr", "document"), "document")
    assert [(role, words) for role, _, words in told(sample)] == [
        ("p", "first line"),
        ("p", "second"),
        ("p", "third"),
        ("p", "in a paragraph"),
        ("image caption", ""),
        ("p", "last line"),
    ]
    assert told(sample)[2][1] == (10, 70, 90, 90)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<html><body><p>no pages</p></body></html>", "wrong-form"),
        ("", "wrong-form"),
        (HOCR.replace("bbox 10 200 390 290", "box"), "wrong-form"),
        (HOCR.replace("bbox 0 0 400 300; ppageno", "bbox 0 0 300 400; ppageno"), "outside-picture"),
        (HOCR.replace("scans/page one.png", "gone.png"), "missing-media"),
        (HOCR.replace("bbox 10 200 390 290", "bbox 10 200 10 290"), "empty-box"),
    ],
)
def test_hocr_that_places_nothing_is_a_bad_row(tmp_path: Path, content: str, reason: str):
    (tmp_path / "page one.png").write_bytes(a_picture(800, 600))
    (tmp_path / "book.hocr").write_text(content)
    bad = made(read("hocr", tmp_path / "book.hocr"), "document")[0]
    assert isinstance(bad, Bad) and bad.reason == reason


# ---------------------------------------------------------------- PDF

TWO_COLUMNS = """
#set page(width: 400pt, height: 500pt, margin: 30pt)
#set text(size: 10pt)
#text(size: 18pt)[A title across the page]
#columns(2, gutter: 16pt)[
#text(size: 13pt)[Left heading]

First paragraph on the left, which goes over more than one line of its column.

Second paragraph on the left, which also needs some of the lines there.
- first entry
- second entry that is long enough to go over a line
#colbreak()
Third paragraph at the top of the right column, over two lines at least.
#table(columns: 3, [Name], [Red], [Blue], table.cell(colspan: 2)[both], [1], table.cell(rowspan: 2)[tall], [2], [3],
  [4], [5])
Fourth paragraph below the table.
]
"""
TWO_COLUMNS_SAY = (
    ("h1", "A title across the page"),
    ("h2", "Left heading"),
    ("p", "First paragraph on the left, which goes over more than one line of its column."),
    ("p", "Second paragraph on the left, which also needs some of the lines there."),
    ("li", "first entry"),
    ("li", "second entry that is long enough to go over a line"),
    ("p", "Third paragraph at the top of the right column, over two lines at least."),
    ("table", '<table><tr><td>Name</td><td>Red</td><td>Blue</td></tr><tr><td colspan="2">both</td><td>1</td></tr>'
              '<tr><td rowspan="2">tall</td><td>2</td><td>3</td></tr><tr><td>4</td><td>5</td></tr></table>'),
    ("p", "Fourth paragraph below the table."),
)  # fmt: skip
"""(role, content), in the order of reading."""


def a_pdf(path: Path, *sources: str) -> Path:
    path.with_suffix(".typ").write_text("\n#pagebreak()\n".join(sources))
    path.write_bytes(typst.compile(str(path.with_suffix(".typ"))))
    return path


def darkest(page: Image) -> int:
    return int(np.asarray(page).min())


def assert_ink_lies_within(sample: Sample, files: list[bytes]) -> None:
    """Every box holds ink, and beyond the boxes (two pixels around them, the strokes of rules) there is none."""
    page = upright(files[0]).convert("L")
    for role, box, _ in told(sample):
        assert darkest(page.crop(box)) < 100, role
    for _, (left, top, right, bottom), _ in told(sample):
        page.paste(255, (round(left) - 2, round(top) - 2, round(right) + 2, round(bottom) + 2))
    assert darkest(page) > 200


def test_a_page_of_two_columns_is_read_in_order_with_headings_lists_and_tables(tmp_path: Path):
    sample, files = only(read("pdf", a_pdf(tmp_path / "a.pdf", TWO_COLUMNS)), "document")
    assert (sample.media[0].width, sample.media[0].height, sample.id) == (800, 1000, "a.pdf#page=1")
    assert [(role, content) for role, _, content in told(sample)] == list(TWO_COLUMNS_SAY)
    assert_ink_lies_within(sample, files)
    for found in learnt(sample, files, tmp_path):
        assert [tag.name for tag in found] == [role for role, _ in TWO_COLUMNS_SAY]


def test_sizes_are_of_the_whole_document_and_a_rotated_cropped_page_keeps_its_boxes(tmp_path: Path):
    body = "#set page(width: 300pt, height: 200pt, margin: 20pt)\n" + "Running text of the document. " * 8
    path = a_pdf(tmp_path / "b.pdf", body, "#text(size: 20pt)[Large]\n\nsmall")
    document = pdfium.PdfDocument(str(path))
    document[1].set_rotation(90)
    document[1].set_cropbox(10, 10, 290, 190)
    document.save(str(tmp_path / "c.pdf"))
    first, second = made(read("pdf", tmp_path / "c.pdf"), "document")
    assert not isinstance(first, Bad) and not isinstance(second, Bad)
    assert [item.role for item in blocks_of(first[0])] == ["p"]
    sample, files = second
    assert (sample.media[0].width, sample.media[0].height) == (360, 560)
    assert sorted(content for _, _, content in told(sample)) == ["Large", "small"]
    assert_ink_lies_within(sample, files)


@pytest.mark.parametrize(("turn", "want"), [(90, ["upright words here"]), (270, ["upright words here"])])
def test_text_that_a_turned_page_shows_upright_is_read_as_lines(tmp_path: Path, turn: int, want: list[str]):
    source = "#set page(width: 300pt, height: 300pt)\n" + f"#rotate({-turn}deg, reflow: true)[upright words here]"
    document = pdfium.PdfDocument(str(a_pdf(tmp_path / "t.pdf", source)))
    document[0].set_rotation(turn)
    document.save(str(tmp_path / "u.pdf"))
    sample, files = only(read("pdf", tmp_path / "u.pdf"), "document")
    [(role, (left, top, right, bottom), content)] = told(sample)
    assert (role, [content]) == ("p", want) and right - left > 4 * (bottom - top)
    assert_ink_lies_within(sample, files)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "bad-pdf"),
        (b"%PDF-1.7 nothing", "bad-pdf"),
        ("#rect(width: 50pt, height: 50pt, fill: red)", "no-text-layer"),
        ('#set text(font: "DejaVu Sans", lang: "ar")\nمرحبا بالعالم', "right-to-left"),
    ],
)
def test_a_document_without_words_in_order_is_a_bad_row(tmp_path: Path, content: bytes | str, reason: str):
    path = tmp_path / "d.pdf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        from matplotlib import get_data_path

        (tmp_path / "d.typ").write_text(content)
        path.write_bytes(typst.compile(str(tmp_path / "d.typ"), font_paths=[f"{get_data_path()}/fonts/ttf"]))
    [bad] = made(read("pdf", path), "document")
    assert isinstance(bad, Bad) and bad.reason == reason and "d.pdf" in bad.where


def test_a_blank_page_is_counted_and_no_fault_unlike_one_without_a_text_layer(tmp_path: Path):
    drawn = "#line(length: 40pt, stroke: 0.3pt)"
    found = made(read("pdf", a_pdf(tmp_path / "d.pdf", "words", "", drawn)), "document")
    assert not isinstance(found[0], Bad)
    assert [(bad.reason, bad.fault) for bad in found[1:] if isinstance(bad, Bad)] == [
        ("blank-page", False),
        ("no-text-layer", True),
    ]


def test_pages_and_times_are_recognised_and_a_layout_in_cocos_form_has_to_be_named(tmp_path: Path):
    (tmp_path / "book.hocr").write_text(HOCR)
    a_pdf(tmp_path / "a.pdf", "words")
    (tmp_path / "times.txt").write_text("AO8RW 0.0 6.9##a person sits.\n")
    (tmp_path / "prose.txt").write_text("Plain words.\n")
    event = {"duration": 1, "timestamps": [[0, 1]], "sentences": ["a"]}
    (tmp_path / "events.json").write_text(json.dumps({"v_1": event}))
    want = {
        "book.hocr": "hocr",
        "a.pdf": "pdf",
        "times.txt": "charades_sta",
        "prose.txt": "text",
        "events.json": "activitynet",
    }
    assert {name: format_of("auto", str(tmp_path / name)) for name in want} == want
    with pytest.raises(DataError, match="ambiguous") as told:
        format_of("auto", str(doclaynet(tmp_path, PAGE, CELLS)))
    assert "coco (" in str(told.value) and "coco_layout (" in str(told.value)

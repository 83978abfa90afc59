"""Rows and files as nobody should write them: each costs itself, says what is wrong, and ends nothing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare import pdf_pages
from pipelines.prepare.confined import confined
from pipelines.prepare.formats.rows import Bad, Draft, MediaRef
from pipelines.prepare.grounding.phrases import NONE
from pipelines.prepare.ingest import Place, write_source
from tests.prepare.builders import a_caption, a_picture, a_recipe, a_source, write_lines
from tests.prepare.through import made, read
from trainer import tries
from trainer.data.shards import Source
from trainer.errors import DataError, MediaError

CUP = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [6, 8, 20, 10]}


def coco(path: Path, **changes: Any) -> Path:
    """One picture with a cup; the picture lies beside."""
    content = {
        "images": [{"id": 1, "file_name": "red.png", "width": 60, "height": 40}],
        "annotations": [CUP],
        "categories": [{"id": 3, "name": "cup"}],
    }
    (path / "red.png").write_bytes(a_picture())
    (path / "coco.json").write_text(json.dumps({**content, **changes}))
    return path / "coco.json"


def drafts(rows: list[Draft | Bad]) -> list[str]:
    return [row.id for row in rows if isinstance(row, Draft)]


# ---------------------------------------------------------------- numbers that are none

LONG = {"size": [40, 60], "counts": "o" * 40 + "0"}
NUMBERS = [
    ({"annotations": [{**CUP, "bbox": [10**400, 1, 2, 2]}]}, "OverflowError"),
    ({"annotations": [{**CUP, "segmentation": LONG}]}, ""),
    ({"annotations": [{**CUP, "segmentation": {"size": [40, 60], "counts": ["a", 100]}}]}, ""),
    ({"images": [{"id": 1, "file_name": "red.png", "width": "10", "height": 40}]}, "TypeError"),
]


@pytest.mark.parametrize(("changes", "got"), NUMBERS)
def test_a_number_that_cannot_be_reckoned_with_costs_its_row(changes: dict, got: str, tmp_path: Path):
    [bad] = made(read("coco", coco(tmp_path, **changes)), "grounding")
    assert isinstance(bad, Bad) and bad.reason in ("wrong-form", "bad-mask")
    assert got in bad.got and len(bad.got) < 300 and bad.where.endswith("coco.json, images[0]")


def test_a_page_whose_cells_are_damaged_costs_that_page(tmp_path: Path):
    facts = {"coco_width": 60, "coco_height": 40, "original_width": 60, "original_height": 40}
    good = {"metadata": facts, "cells": [{"bbox": [7, 9, 5, 5], "text": "tea"}]}
    cells = [json.dumps(good), '{"metadata": ', json.dumps({**good, "metadata": {**facts, "coco_width": 0}})]
    images = [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in range(3)]
    for number, content in enumerate(cells):
        (tmp_path / f"{number}.json").write_text(content)
    path = coco(
        tmp_path,
        images=images,
        annotations=[{**CUP, "id": n, "image_id": n} for n in range(3)],
        categories=[{"id": 3, "name": "Text"}],
    )
    rows = read("coco_layout", path, "document")
    assert drafts(rows) == ["0"]
    told = [row.got for row in rows if isinstance(row, Bad)]
    assert len(told) == 2 and "not JSON" in told[0] and "1.json" in told[0] and "ZeroDivisionError" in told[1]


NODE = '<node class="android.widget.Button" text="" bounds="[0,0][60,40]">'
DEEP = f"<hierarchy>{NODE * 1500}{'</node>' * 1500}</hierarchy>"
CHINESE = '<?xml version="1.0" encoding="gbk"?><hierarchy/>'
UNKNOWN = '<?xml version="1.0" encoding="klingon"?><hierarchy/>'


@pytest.mark.parametrize(
    ("content", "reason", "got"),
    [(DEEP, "wrong-form", "RecursionError"), (CHINESE, "bad-xml", "multi-byte"), (UNKNOWN, "bad-xml", "encoding")],
)
def test_a_tree_that_no_parser_here_reads_is_one_bad_row(content: str, reason: str, got: str, tmp_path: Path):
    (tmp_path / "screen.png").write_bytes(a_picture())
    (tmp_path / "screen.xml").write_text(content)
    [bad] = read("uiautomator", tmp_path / "screen.xml")
    assert isinstance(bad, Bad) and bad.reason == reason and got in bad.got, bad


# ---------------------------------------------------------------- lists in one document

LISTS = [
    ({"annotations": [CUP, None]}, "annotations[1]", "wrong-form"),
    ({"annotations": [CUP, "cup"]}, "annotations[1]", "wrong-form"),
    ({"annotations": [CUP, {**CUP, "image_id": 7}]}, "annotations[1]", "unknown-image"),
    ({"annotations": [CUP, {**CUP, "image_id": [1]}]}, "annotations[1]", "unknown-image"),
    ({"categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "\ud800"}]}, "categories[1]", "not-unicode"),
    ({"categories": [{"id": 3, "name": "cup"}, {"name": "cat"}]}, "categories[1]", "wrong-form"),
    ({"images": [{"id": 1, "file_name": "red.png"}, None]}, "images[1]", "wrong-form"),
]


@pytest.mark.parametrize(("changes", "where", "reason"), LISTS)
def test_an_entry_that_is_none_is_counted_with_its_index_and_the_rest_is_read(
    changes: dict, where: str, reason: str, tmp_path: Path
):
    rows = read("coco", coco(tmp_path, **changes))
    assert drafts(rows) == ["1"]
    [bad] = [row for row in rows if isinstance(row, Bad)]
    assert bad.reason == reason and bad.where == f"{tmp_path}/coco.json, {where}"


def test_a_damaged_annotation_costs_its_picture_which_would_be_incomplete_without_it(tmp_path: Path):
    for change in ({"caption": "\ud800"}, {"iscrowd": 1, "category_id": [3]}):
        [bad] = read("coco", coco(tmp_path, annotations=[CUP, {**CUP, **change}]))
        assert isinstance(bad, Bad) and bad.where.endswith("images[0]")


def test_lists_of_another_kind_are_one_error(tmp_path: Path):
    for name in ("images", "annotations", "categories"):
        with pytest.raises(DataError, match=f"{name}: a list"):
            read("coco", coco(tmp_path, **{name: {"1": {}}}))


def test_a_layout_counts_what_belongs_to_no_page(tmp_path: Path):
    page = {**CUP, "text": "tea"}
    broken = {"annotations": [page, None, {**page, "image_id": 9}], "categories": [{"id": 3, "name": "text"}, None]}
    rows = read("coco_layout", coco(tmp_path, **broken), "document")
    assert drafts(rows) == ["1"]
    assert sorted(row.reason for row in rows if isinstance(row, Bad)) == ["unknown-image", "wrong-form", "wrong-form"]


def test_refs_are_read_beside_damaged_instances(tmp_path: Path):
    coco(tmp_path, annotations=[None, CUP], images=[None, {"id": 1, "file_name": "red.png"}]).rename(
        tmp_path / "instances.json"
    )
    said = [{"sent_id": 0, "sent": "the cup"}]
    refs = [{"ref_id": n, "ann_id": n, "image_id": 1, "split": "train", "sentences": said} for n in (1, 2)]
    rows = read("refcoco", write_lines(tmp_path / "refs.json", refs))
    assert drafts(rows) == ["1-0"] and isinstance(rows[1], Bad) and rows[1].reason == "no-objects"


def test_pictures_without_objects_are_counted_beside_the_faults(tmp_path: Path):
    images = [{"id": n, "file_name": "red.png", "width": 60, "height": 40} for n in range(3)]
    images[2]["neg_category_ids"] = [3]  # looked for, and not there
    path = coco(tmp_path, images=images)
    source = a_source("coco", path)
    found = write_source(a_recipe(source).prepare, source, place(tmp_path / "out"), [str(path)], None, [])
    assert found["kept"] == 2 and found["bad"] == {"no-objects": 1}, "not a fault at max_bad_fraction 0"
    none = Source.open(str(tmp_path / "out")).sample(0, 1)
    assert none.meta["absent"] == ["cup"] and "cup" in none.messages[0].parts[1].text  # type: ignore[union-attr]
    assert none.messages[1].parts[0].text in NONE  # type: ignore[union-attr]
    images[0]["file_name"] = "gone.png"
    images[1]["file_name"] = "gone.png"
    path = coco(tmp_path, images=images)
    with pytest.raises(DataError, match=r"got: 1 of 3 .*1 missing-media"):
        write_source(a_recipe(source).prepare, source, place(tmp_path / "out2"), [str(path)], None, [])


def place(target: Path) -> Place:
    return Place("mine", "train", str(target), "prepare.sources.mine", str(target.parent))


# ---------------------------------------------------------------- media that cannot be reached

NAMED = [
    "foo://host/a.png",
    "ftp://host/a.png",
    "zip://a.png::file:///data/pictures.zip",
    "filecache::https://host/a.png",
    "zip://a.png::s3://bucket/a.zip#bytes=0-9",
    "s3://bucket/a::file:///data/a.tar#bytes=0-9",
    "http://127.0.0.1:9/a.png",
    "https://[host/a.png",
    "s3://",
    "a.png\0.jpg",
    f"{'a' * 300}.png",
    "rows.jsonl#cell=0/0/image",
    "rows.jsonl#bytes=0-4",
    "rows.jsonl/a.png",
    "",
]


@pytest.mark.parametrize("uri", NAMED)
def test_whatever_a_row_names_costs_that_row(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.0)
    (tmp_path / "red.png").write_bytes(a_picture())
    path = write_lines(tmp_path / "rows.jsonl", [a_caption(0), a_caption(1, image=[uri]), a_caption(2)])
    rows = made(read("llava", path), "caption")
    [bad] = [row for row in rows if isinstance(row, Bad)]
    reasons = ("unreachable-media", "missing-media", "damaged-media", "wrong-form")
    assert len(rows) == 3 and rows[1] is bad and bad.reason in reasons and len(bad.got) < 700
    if "::" in uri or uri.startswith(("foo", "ftp", "http:")):
        assert bad.reason == "unreachable-media"


def test_a_url_may_hold_another(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", [a_caption(image="https://host/get?url=ftp://b::c/a.png")])
    [row] = read("llava", path)
    assert isinstance(row, Draft) and row.media[0].uri == "https://host/get?url=ftp://b::c/a.png"


def test_a_page_of_a_layout_at_no_address_costs_that_page(tmp_path: Path):
    images = [{"id": 1, "file_name": "foo://host/a.png", "width": 60, "height": 40}]
    [bad] = read("coco_layout", coco(tmp_path, images=images, categories=[{"id": 3, "name": "text"}]), "document")
    assert isinstance(bad, Bad) and bad.reason == "unreachable-media" and "foo://" in bad.got


def a_pdf(pages: list[str | None]) -> bytes:
    """Pages of one line each; None: the tree of pages names an object that is null."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", "", "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for words in pages:
        number = len(objects) + 1
        kids.append(f"{number} 0 R")
        if words is None:
            objects.append("null")
            continue
        drawn = f"BT /F 20 Tf 20 50 Td ({words}) Tj ET"
        page = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Resources<</Font<</F 3 0 R>>>>"
        objects += [f"{page}/Contents {number + 1} 0 R>>", f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream"]
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(kids)}]>>"
    body, at = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        at.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in at)
    size = len(objects) + 1
    trailer = f"trailer<</Size {size}/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF\n"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_a_page_that_is_none_costs_that_page_of_a_pdf(tmp_path: Path):
    (tmp_path / "a.pdf").write_bytes(a_pdf(["One", None, "Three"]))
    rows = made(read("pdf", tmp_path / "a.pdf", "document"), "document")
    assert [isinstance(row, Bad) for row in rows] == [False, True, False]
    bad = rows[1]
    assert isinstance(bad, Bad) and bad.reason == "bad-pdf" and bad.where.endswith("a.pdf, page 2")
    with pytest.raises(MediaError, match="cannot be read"):
        pdf_pages.page_png(f"{tmp_path}/a.pdf#page=2")


# ---------------------------------------------------------------- objects that say more


def answered(folder: Path, **more: Any) -> Draft | Bad:
    located = json.dumps([{"bbox_2d": [6, 8, 26, 18], "label": "cup", **more}])
    turns = [{"from": "human", "value": "<image>Locate"}, {"from": "gpt", "value": located}]
    (folder / "red.png").write_bytes(a_picture())
    [row] = read("llava", write_lines(folder / "rows.jsonl", [a_caption(conversations=turns)]))
    return row


def test_a_field_of_an_object_is_kept_or_the_row_is_refused(tmp_path: Path):
    kept = answered(tmp_path, role="button", text_content="OK")
    assert isinstance(kept, Draft)
    [located] = kept.messages[-1]["parts"][0]["objects"]
    assert (located["label"], located["role"], located["content"]) == ("cup", "button", "OK")
    lost = answered(tmp_path, color="red")
    assert isinstance(lost, Bad) and lost.reason == "unsupported" and "color" in lost.got


def test_a_confined_source_takes_media_from_its_folder_alone(tmp_path: Path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside, tmp_path / "inner"):
        folder.mkdir()
        (folder / "red.png").write_bytes(a_picture())
    data = f"data:image/png;base64,{base64.b64encode(a_picture()).decode()}"
    allowed = ["red.png", "./red.png", f"{inside}/red.png", f"file://{inside}/red.png", data]
    refused = [
        *(f"{outside}/red.png", "../out/red.png", f"{inside}/../out/red.png", "sub/../../out/red.png"),
        *(f"file://{outside}/red.png", f"{tmp_path}/inner/red.png", "https://host/red.png", "s3://bucket/red.png"),
        f"{outside}/red.png#bytes=0-9",
    ]
    rows = [a_caption(n, image=[uri]) for n, uri in enumerate([*allowed, *refused])]
    path = write_lines(inside / "rows.jsonl", rows)
    source = a_source("llava", path, confined=True)
    prepare = a_recipe(source, "prepare.max_bad_fraction=0.9").prepare
    found = write_source(prepare, source, place(tmp_path / "shards"), [str(path)], None, [])
    assert found["kept"] == len(allowed) and found["bad"] == {"outside-media-folder": len(refused)}


def test_what_is_inside_of_a_folder_is_told_by_its_address():
    def is_kept(uri: str, root: str, file: str = "rows.jsonl") -> bool:
        return isinstance(confined(Draft("x", "1", [], [MediaRef(uri, "image")]), root, file), Draft)

    assert is_kept("s3://bucket/a/b.png", "s3://bucket/a") and is_kept("s3://b/a/b.tar#bytes=0-9", "s3://b/a/")
    assert not is_kept("s3://bucket/ab.png", "s3://bucket/a") and not is_kept("/data/a.png", "s3://bucket/a")
    assert not is_kept("https://host/a/%2e%2e/b.png", "https://host/a")
    assert is_kept("/x/t.parquet#cell=0/0/image", "/in", "/x/t.parquet"), "the annotation file itself"
    assert not is_kept("/y/t.parquet#cell=0/0/image", "/in", "/x/t.parquet")
    assert is_kept("/x/book.pdf#page=2", "/in", "/x/book.pdf") and not is_kept(
        "/y/book.pdf#page=2", "/in", "/x/book.pdf"
    )
    assert is_kept("../data/a.png", "../data") and is_kept("data/a.png", ".") and not is_kept("../a.png", ".")

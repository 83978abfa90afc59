"""Rows and files as nobody should write them: each costs itself, says what is wrong, and ends nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.formats.rows import Bad, Draft
from tests.prepare.builders import a_picture
from tests.prepare.through import made, read

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

"""Rows of grounding: boxes and masks (COCO), referring expressions, points."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.prepare.grounding.phrases import DETECT, NONE, POINT, REFER, pick
from tests.prepare.grounding.test_readers import DISC, PACKED
from tests.prepare.test_text_formats import INSTANCES, REF
from tests.prepare.way.of_text import row
from tests.prepare.way.row import IMAGE, Row, box, mask, objects, point, want, with_media
from trainer.data.masks import run_lengths

RING = [30.0, 5.0, 50.0, 5.0, 40.0, 30.0]
CATEGORIES = [{"id": 1, "name": "cup"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "fish"}]
RUNS = {"size": [40, 60], "counts": PACKED["counts"].decode()}  # type: ignore[attr-defined]
"""A disc, compressed as pycocotools writes it."""
COCO = {
    "images": [
        {"id": 1, "file_name": "red.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "blue.jpg", "width": 50, "height": 100},
        {"id": 3, "file_name": "red.png", "width": 60, "height": 40, "neg_category_ids": [3]},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [12, 7, 17, 17], "segmentation": RUNS},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [30, 5, 20, 25], "segmentation": [RING]},
        {"id": 3, "image_id": 2, "category_id": 3, "bbox": [10, 20, 30, 40], "iscrowd": 0},
    ],
    "categories": CATEGORIES,
}
"""The second one's numbers are of a copy of half the size."""


def question(image: int, *labels: str) -> list[Any]:
    return [IMAGE, pick(DETECT, "coco", str(image)).format(", ".join(labels))]


def as_file(folder: Path, content: Any, name: str = "instances.json") -> Path:
    (with_media(folder) / name).write_text(json.dumps(content))
    return folder / name


def faulty_coco() -> dict[str, Any]:
    wrong: list[dict[str, Any]] = [
        {"bbox": [1, 1, 0, 5]},
        {"bbox": [1, 1, 90, 5]},
        {"category_id": 9},
        {"segmentation": [[1, 1, 2, 2]]},
        {"segmentation": {"size": [40, 60], "counts": [1, 2]}},
        {"bbox": [1, 1, 5, 5], "file": "gone.png"},
        {"bbox": [1, 1, 5, 5], "file": "cut.png"},
    ]
    found: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number, changes in enumerate(wrong, 100):
        name = changes.pop("file", "red.png")
        found["images"].append({"id": number, "file_name": name, "width": 60, "height": 40})
        plain = {"id": number, "image_id": number, "category_id": 1, "bbox": [12, 7, 17, 17]}
        found["annotations"].append({**plain, **changes})
    found["annotations"].append({"id": 99, "image_id": 999, "category_id": 1, "bbox": [1, 1, 2, 2]})
    return found


COCO_FAULTS = {"empty-box": 1, "outside-picture": 2, "wrong-form": 1, "bad-mask": 1, "missing-media": 1,
               "damaged-media": 1, "unknown-image": 1}  # fmt: skip


def refs(folder: Path, listed: list) -> Path:
    with_media(folder)
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    (folder / "refs.json").write_text(json.dumps(listed))
    return folder / "refs.json"


def faulty_refs() -> list[dict[str, Any]]:
    lost, silent = copy.deepcopy(REF), copy.deepcopy(REF)
    lost |= {"ann_id": 9, "ref_id": 4}
    silent |= {"sentences": [{"sent_id": 7, "sent": " "}], "ref_id": 5}
    return [lost, silent]


def referred(number: int, words: str) -> dict[str, Any]:
    asked = pick(REFER, "refcoco", f"3-{number}").format(words)
    said = [("user", [IMAGE, asked]), ("assistant", [objects(box(words, 6, 8, 26, 18), form="json")])]
    return want(f"3-{number}", said, "red.png 60x40", key=("box", [6, 8, 26, 18]))


DOTS = {"id": "d", "image": "blue.jpg", "label": "dog", "points": [{"x": 10.5, "y": 50}, {"x": 100, "y": 0}]}
DOT = {"id": "e", "image": "red.png", "label": "dog", "points": [{"x": 10.5, "y": 15}], "coordinates": "pixels"}


def pointed(identity: str, *places: tuple[float, float], of: str, **more: Any) -> dict[str, Any]:
    asked = [IMAGE, pick(POINT, "points", identity).format("dog")]
    return want(
        identity, [("user", asked), ("assistant", [objects(*(point("dog", *xy) for xy in places))])], of, **more
    )


ROWS = [
    Row(
        "coco",
        "grounding",
        "chat",
        partial(as_file, content=COCO),
        [
            want(
                "1",
                [
                    ("user", question(1, "cat", "cup")),
                    (
                        "assistant",
                        [
                            objects(
                                mask("cup", 12, 7, 29, 24, rle=tuple(run_lengths(DISC))),
                                mask("cat", 30, 5, 50, 30, polygons=(tuple(RING),)),
                                form="json",
                            )
                        ],
                    ),
                ],
                "red.png 60x40",
            ),
            want(
                "2",
                [("user", question(2, "fish")), ("assistant", [objects(box("fish", 20, 40, 80, 120), form="json")])],
                "blue.jpg 100x200",
                key=("box", [20, 40, 80, 120]),
            ),
            want("3", [("user", question(3, "fish")), ("assistant", [pick(NONE, "coco", "3")])], "red.png 60x40"),
        ],
        partial(as_file, content=faulty_coco()),
        COCO_FAULTS,
        quick=True,
    ),
    Row(
        "refcoco",
        "grounding",
        "chat",
        partial(refs, listed=[REF]),
        [referred(0, "left cup"), referred(1, "blue one")],
        partial(refs, listed=faulty_refs()),
        {"no-objects": 2, "empty-text": 1},
    ),
    row(
        "points",
        (DOTS, DOT),
        [
            pointed("d", (10.5, 100), (100, 0), of="blue.jpg 100x200"),
            pointed("e", (10.5, 15), of="red.png 60x40", key=("point", [10.5, 15])),
        ],
        kind="grounding",
    ),
]

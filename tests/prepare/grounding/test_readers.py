"""What readers tell about grounding beside the objects, and preference rows whose answers are conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest

from pipelines.prepare.formats.rows import Bad
from pipelines.prepare.grounding.annotated import Annotated, annotated
from pipelines.prepare.grounding.masks import mask_of
from tests.prepare.builders import write_lines
from tests.prepare.grounding.builders import disc, noise, objects_in, png, words_in
from tests.prepare.through import made, read
from trainer.data.sample import Mask, Sample

DISC = disc(60, 40, 20, 15, 8)
PACKED = coco.encode(np.asfortranarray(DISC.astype(np.uint8)))
CATEGORIES = [{"id": 1, "name": "cup"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "fish"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png(noise(60, 40)))
    return tmp_path


def coco_row(folder: Path, segmentation: Any, *annotations: dict, **image: Any) -> Sample | Bad:
    cup = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [12, 7, 17, 17], "segmentation": segmentation}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40, **image}],
        "annotations": [cup, *annotations],
        "categories": CATEGORIES,
    }
    (folder / "coco.json").write_text(json.dumps(content))
    [found] = made(read("coco", folder / "coco.json"), "grounding")
    return found if isinstance(found, Bad) else found[0]


def ring_of(inside: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(inside)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return [float(v) for v in (left, top, right, top, right, bottom, left, bottom)]


def test_compressed_run_lengths_plain_ones_and_polygons_are_the_same_mask(folder: Path):
    plain = [int(run) for run in _runs(DISC)]
    for segmentation in ({"size": [40, 60], "counts": PACKED["counts"].decode()}, {"size": [40, 60], "counts": plain}):
        found = coco_row(folder, segmentation)
        assert isinstance(found, Sample)
        [thing] = objects_in(found)
        assert isinstance(thing.at, Mask) and (mask_of(thing.at, 60, 40) == DISC).all()
    found = coco_row(folder, [ring_of(DISC)])
    assert isinstance(found, Sample)
    assert mask_of(objects_in(found)[0].at, 60, 40).sum() == 17 * 17  # type: ignore[arg-type]


def test_a_polygon_lies_in_its_picture_as_boxes_do(folder: Path):
    """2 % of a side is rounding, and stays as it is; what lies further out, at whatever scale, is a bad row."""
    ring = [12.0, 7.0, 60.9, 7.0, 29.0, -0.5]
    found = coco_row(folder, [ring])
    assert isinstance(found, Sample) and objects_in(found)[0].at.polygons == (tuple(ring),)  # type: ignore[union-attr]
    for far in ([12, 7, 1e9, 7, 29, 24], [12, 7, 29, 7, 29, 42], [12, 7, 29, 7, -2, 24]):
        for segmentation in ([far], [ring, far]):
            bad = coco_row(folder, segmentation)
            assert isinstance(bad, Bad) and bad.reason == "outside-picture" and "between 0 and" in bad.expected
    doubled = coco_row(folder, [[24, 14, 121, 14, 58, 48]], width=120, height=80)
    assert isinstance(doubled, Sample)
    assert objects_in(doubled)[0].at.polygons == ((12.0, 7.0, 60.5, 7.0, 29.0, 24.0),)  # type: ignore[union-attr]


def _runs(inside: np.ndarray) -> list[int]:
    """Counted one by one, column by column: another way than the code's."""
    runs, before = [0], False
    for value in inside.T.reshape(-1).tolist():
        if value != before:
            runs.append(0)
            before = value
        runs[-1] += 1
    return runs


BAD = [
    ({"size": [40, 60], "counts": PACKED["counts"].decode()[:-3]}, "bad-mask"),
    ({"size": [60, 41], "counts": PACKED["counts"].decode()}, "bad-mask"),
    ({"counts": PACKED["counts"].decode()}, "wrong-form"),
    ({"size": [40, 60]}, "wrong-form"),
    ({"size": [40, 60], "counts": [100, -40, 2340]}, "bad-mask"),  # they add up
    ({"size": [40, 60], "counts": ["a", 100]}, "bad-mask"),
    ({"size": [40, 60], "counts": []}, "bad-mask"),
    ([[1, 1, 2, 2]], "bad-mask"),
    ([[12, 7, 29, 7, 29, 24], [1, 1, 2, 2, 3]], "bad-mask"),
    ([[12, 7, 29, 7, 29, float("nan")]], "bad-mask"),
    ([[12, 7, 29, 7, 29, "24"]], "bad-mask"),
    ([12, 7, 29, 7, 29, 24], "bad-mask"),
]


@pytest.mark.parametrize("segmentation, reason", BAD)
def test_a_mask_that_cannot_be_read_is_refused_and_never_dropped(folder: Path, segmentation: Any, reason: str):
    found = coco_row(folder, segmentation)
    assert isinstance(found, Bad) and found.reason == reason


def test_crowds_and_lvis_lists_say_what_is_incomplete_and_what_absent(folder: Path):
    crowd = {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    found = coco_row(folder, [], crowd, neg_category_ids=[3], not_exhaustive_category_ids=[1])
    assert isinstance(found, Sample)
    assert found.meta == {"incomplete": ["cat", "cup"], "absent": ["fish"]}
    picture = annotated(found)
    assert isinstance(picture, Annotated)
    assert picture.whole("picture") == [] and picture.missing("fish", "picture")
    assert not picture.missing("cat", "vocabulary"), "there is a crowd of them"
    plain = coco_row(folder, [])
    assert isinstance(plain, Sample) and plain.meta == {}, "negative control"


def test_expressions_are_marked_and_wordings_differ_over_rows(folder: Path):
    refs = [
        {"ref_id": n, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [{"sent_id": n, "sent": f"cup {n}"}]}
        for n in range(20)
    ]
    coco_row(folder, [])
    (folder / "instances.json").write_bytes((folder / "coco.json").read_bytes())
    (folder / "refs.json").write_text(json.dumps(refs))
    found = [one[0] for one in made(read("refcoco", folder / "refs.json"), "grounding") if not isinstance(one, Bad)]
    assert len(found) == 20 and all(sample.meta == {"labels": "expressions"} for sample in found)
    shapes = {words_in(sample, 0).replace(objects_in(sample)[0].label, "{0}") for sample in found}
    assert len(shapes) >= 4


# ---------------------------------------------------------------- pairs

USER = {"role": "user", "content": "What?"}
BETTER, WORSE = ({"role": "assistant", "content": words} for words in ("red", "blue"))


def pair(folder: Path, row: dict, format: str = "preference") -> Sample | Bad:
    [found] = made(read(format, write_lines(folder / "rows.jsonl", [row])), "preference")
    return found if isinstance(found, Bad) else found[0]


def test_answers_that_repeat_the_prompt_are_read_without_it(folder: Path):
    for prompt in ("What?", [USER]):
        found = pair(folder, {"prompt": prompt, "chosen": [USER, BETTER], "rejected": [USER, WORSE]})
        assert isinstance(found, Sample)
        assert [message.role for message in found.messages] == ["user"] and len(found.chosen) == len(
            found.rejected
        ) == 1
        assert (found.chosen[0].parts[0].text, found.rejected[0].parts[0].text) == ("red", "blue")  # type: ignore[union-attr]


OTHER = {"role": "user", "content": "Another question?"}
LISTS = [
    {"prompt": "What?", "chosen": [OTHER, BETTER], "rejected": [OTHER, WORSE]},
    {"prompt": "What?", "chosen": [BETTER, OTHER, WORSE], "rejected": [WORSE]},
    {"prompt": "What?", "chosen": [USER, BETTER, OTHER, BETTER], "rejected": [USER, WORSE]},
]


@pytest.mark.parametrize("row", LISTS)
def test_earlier_messages_of_an_answer_are_never_ignored(folder: Path, row: dict):
    found = pair(folder, row)
    assert isinstance(found, Bad) and found.reason == "wrong-form" and "one message" in found.expected


def test_ms_swift_rejected_messages_differ_in_the_last_one_alone(folder: Path):
    row = {"messages": [USER, BETTER], "rejected_messages": [USER, WORSE]}
    assert isinstance(pair(folder, row, "ms_swift"), Sample)
    assert isinstance(pair(folder, {**row, "rejected_messages": [WORSE]}, "ms_swift"), Sample)
    for other in ([OTHER, WORSE], [USER, BETTER, OTHER, WORSE]):
        found = pair(folder, {**row, "rejected_messages": other}, "ms_swift")
        assert isinstance(found, Bad) and found.reason == "unequal-prompts"

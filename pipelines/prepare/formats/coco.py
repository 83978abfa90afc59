"""COCO detection: one object of images, annotations and categories. One sample an image: the question names what is in
it, the answer is every object with its box, and its mask where there is one (polygons, plain or compressed run
lengths).

Crowd regions are left out; their category then counts as incomplete in that picture, as do those of LVIS'
not_exhaustive_category_ids; those of its neg_category_ids are known to be absent (grounding/annotated.py).

An image without annotations is asked for what is known to be absent; where nothing is, it is left out and counted as
no-objects, not as a fault: COCO's own instances_train2017 has such images. An annotation of no image is a bad row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from pipelines.prepare.formats.coco_file import CocoFile, coco_file
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    check_sound,
    field_of,
    guarded,
    message,
    resolve,
    text,
)
from pipelines.prepare.grounding.phrases import DETECT, NONE, pick
from trainer.recipe import Source

KIND, RENDERING = "grounding", "chat"


def looks(peek: Peek) -> str | None:
    names = ("images", "annotations", "categories")
    return "images, annotations and categories" if peek.holds == "object" and peek.all(*names) else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    with coco_file(path) as found:
        yield from found.faults
        yield from found.strangers()
        for where, image in found.images():
            yield guarded(where, partial(_draft, found=found, media_root=media_root), image)


def _draft(image: dict, where: str, found: CocoFile, media_root: str) -> Draft:
    names, mine = found.names, found.annotations(image["id"])
    for annotation in mine:
        check_sound(annotation)
    objects = [object_of(annotation, names) for annotation in mine if not annotation.get("iscrowd")]
    crowds = {annotation.get("category_id") for annotation in mine if annotation.get("iscrowd")}
    notes = _known(image, crowds, names)
    media = [MediaRef(resolve(media_root, field_of(image, "file_name")), "image")]
    labels = sorted({item["label"] for item in objects} if objects else notes.get("absent", ()))
    if not labels:
        got = f"none for image_id {image['id']}"
        raise BadRow("no-objects", "at least one annotation of the image", got, fault=False)
    asked = pick(DETECT, "coco", str(image["id"])).format(", ".join(labels))
    question = message("user", {"part": "image", "media": 0}, text(asked))
    located: dict = {"part": "objects", "media": 0, "objects": objects, "form": "json"}
    answer = message("assistant", located if objects else text(pick(NONE, "coco", str(image["id"]))))
    key = {"task": "box", "value": objects[0]["at"]["xyxy"]} if len(objects) == 1 else None
    meta = {"stated_size": [image["width"], image["height"]]} if "width" in image and "height" in image else {}
    return Draft(where, str(image["id"]), [question, answer], media, key=key, meta=meta, notes=notes)


def _known(image: dict, crowds: set, names: dict) -> dict:
    """What is known about labels besides the objects: {incomplete, absent}, each where there are any."""
    partly = {*crowds, *(image.get("not_exhaustive_category_ids") or ())}
    listed = {"incomplete": partly, "absent": set(image.get("neg_category_ids") or ())}
    found = {what: sorted(names[category] for category in ids if category in names) for what, ids in listed.items()}
    return {what: labels for what, labels in found.items() if labels}


def object_of(annotation: dict, names: dict) -> dict:
    """An annotation as an object with its category as label. Raises BadRow."""
    category = annotation.get("category_id")
    if category not in names:
        raise BadRow("wrong-form", f"a category of {sorted(names)[:5]}...", category)
    left, top, width, height = map(float, field_of(annotation, "bbox"))
    if width <= 0 or height <= 0:
        raise BadRow("empty-box", "a box with width and height above 0", annotation["bbox"])
    box = [left, top, left + width, top + height]
    at: dict = {"shape": "box", "xyxy": box}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        at = {"shape": "mask", "xyxy": box, "rle": _run_lengths(segmentation)}
    elif isinstance(segmentation, list) and segmentation:
        at = {"shape": "mask", "xyxy": box, "polygons": _polygons(segmentation)}
    return {"label": names[category], "at": at}


def _polygons(rings: list) -> list[list[float]]:
    """Rings of x, y, x, y... as they are. Raises BadRow."""
    for ring in rings:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            raise BadRow("bad-mask", "polygons of three points and more, x and y of each", ring)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in ring):
            raise BadRow("bad-mask", "polygons of finite numbers", ring)
    return rings


def _run_lengths(segmentation: dict) -> list[int]:
    """Run lengths as they are, or decompressed. Raises BadRow."""
    counts, size = field_of(segmentation, "counts"), segmentation.get("size")
    if isinstance(counts, list):
        if not counts or not all(isinstance(run, int) and run >= 0 for run in counts):
            raise BadRow("bad-mask", "run lengths of 0 and more pixels", counts)
        return counts
    from pipelines.prepare.grounding.masks import decompressed  # not before it is needed: it imports much

    if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, str):
        raise BadRow("wrong-form", "segmentation: {size: [height, width], counts}", segmentation)
    try:
        return list(decompressed(counts, size))
    except ValueError as error:
        raise BadRow("bad-mask", "compressed run lengths of the stated size", error) from None

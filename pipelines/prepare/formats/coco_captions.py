"""COCO captions: one object of images and annotations, each annotation a caption of an image ({image_id, id, caption}).
One sample an image with all its captions, as captions.py writes several.

An image without captions is left out and counted as no-captions, not as a fault; a caption of no image is a bad row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pipelines.prepare.formats import captions
from pipelines.prepare.formats.coco_file import CocoFile, coco_file
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import BadRow, Draft, Row, check_sound, field_of, guarded
from trainer.recipe import Source

KIND, RENDERING = "caption", "document"


def looks(peek: Peek) -> str | None:
    if peek.holds != "object" or not peek.all("images", "annotations"):
        return None
    first = next(iter(peek.first("annotations")), None)
    return "images and annotations with captions" if isinstance(first, dict) and "caption" in first else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    with coco_file(path) as found:
        yield from found.strangers()
        for where, image in found.images():
            yield guarded(where, partial(_draft, found=found, media_root=media_root, source=source), image)


def _draft(image: dict, where: str, found: CocoFile, media_root: str, source: Source) -> Draft:
    mine = found.annotations(image["id"])
    for annotation in mine:
        check_sound(annotation)
    if not mine:
        raise BadRow("no-captions", "at least one caption of the image", f"none for {image['id']}", fault=False)
    said = [field_of(annotation, "caption") for annotation in mine]
    entry = {"id": str(image["id"]), "image": field_of(image, "file_name"), "caption": said}
    return captions.draft(entry, where, media_root, source)

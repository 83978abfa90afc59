"""Referring expressions as the REFER toolkit keeps RefCOCO, RefCOCO+ and RefCOCOg: a list of refs {"ref_id", "ann_id",
"image_id", "split", "sentences": [{"sent_id", "sent"}]} as JSON, beside an `instances.json` (COCO) with the pictures
and boxes. One sample an expression: the answer is the box, with the mask where there is one.

REFER's refs are pickled. A pickle runs whatever it contains, so none is opened here; the error says how to convert one.
A file holds one split: val, testA and testB are what models are compared on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from pipelines.prepare.formats.coco import object_of
from pipelines.prepare.formats.coco_file import CocoFile, coco_file
from pipelines.prepare.formats.peek import PICKLES, Peek
from pipelines.prepare.formats.rows import (
    Bad,
    BadRow,
    Draft,
    MediaRef,
    Row,
    check_sound,
    field_of,
    guarded,
    json_entries,
    message,
    resolve,
    text,
)
from pipelines.prepare.grounding.phrases import REFER, pick
from trainer import storage
from trainer.errors import DataError
from trainer.recipe import Source

KIND, RENDERING = "grounding", "chat"
INSTANCES = "instances.json"
CONVERT = (
    "convert it where you trust it, one file a split: python -c \"import json, pickle; refs = pickle.load(open('{0}', "
    "'rb')); [json.dump([r for r in refs if r['split'] == s], open(f'refs.{{s}}.json', 'w')) for s in "
    "{{r['split'] for r in refs}}]\""
)


def looks(peek: Peek) -> str | None:
    if peek.holds == "pickle":
        return "a pickled file, as REFER's refs are"
    return "ref_id, ann_id and sentences" if peek.all("ref_id", "ann_id", "sentences") else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    if path.lower().endswith(PICKLES):
        do = CONVERT.format(path.rpartition("/")[2])
        raise DataError("pickled refs are not opened", where=path, expected="refs as JSON", got="a pickle", do=do)
    with _instances(path) as instances:
        yield from _expressions(path, media_root, instances)


def _expressions(path: str, media_root: str, instances: CocoFile) -> Iterator[Row]:
    splits: set[str] = set()
    for where, ref in json_entries(path):
        if isinstance(ref, Bad):
            yield ref
            continue
        if isinstance(ref, dict):
            splits.add(str(ref.get("split", "-")))
        if len(splits) > 1:
            do = "jq '[.[] | select(.split == \"train\")]' FILE > refs.train.json, and so on; test splits as held_out"
            raise DataError("refs of several splits in one file", where=where, got=", ".join(sorted(splits)), do=do)

        def one(entry: dict, where: str) -> Draft:
            return _draft(entry, where, media_root, instances)

        sentences = ref.get("sentences") if isinstance(ref, dict) else None
        if not isinstance(sentences, list) or not sentences:
            yield Bad(where, "a ref with sentences", str(ref)[:120], "wrong-form")
            continue
        for sentence in sentences:
            yield guarded(where, one, {**ref, "sentence": sentence})


def _instances(path: str) -> AbstractContextManager[CocoFile]:
    """Pictures, boxes and categories beside the refs."""
    folder = path.rpartition("/")[0]
    where = f"{folder}/{INSTANCES}" if folder else INSTANCES
    if not storage.exists(where):
        raise DataError(
            "refs without the boxes that they refer to", where=where, expected="COCO's instances beside refs"
        )
    return coco_file(where)


def _draft(entry: dict, where: str, root: str, instances: CocoFile) -> Draft:
    annotation, sentence = instances.annotation(field_of(entry, "ann_id")), entry["sentence"]
    if annotation is None:
        raise BadRow("no-objects", f"the ann_id in {INSTANCES}", entry["ann_id"])
    check_sound(annotation)
    image = instances.image(annotation["image_id"])
    if image is None or annotation["image_id"] != entry.get("image_id", annotation["image_id"]):
        raise BadRow("no-objects", f"the picture of annotation {entry['ann_id']} in {INSTANCES}", entry.get("image_id"))
    said = str(field_of(sentence, "sent", "raw")).strip()
    if not said:
        raise BadRow("empty-text", "an expression", repr(said))
    found = {**object_of(annotation, instances.names), "label": said}
    identity = f"{field_of(entry, 'ref_id')}-{field_of(sentence, 'sent_id')}"
    question = message("user", {"part": "image", "media": 0}, text(pick(REFER, "refcoco", identity).format(said)))
    answer = message("assistant", {"part": "objects", "media": 0, "objects": [found], "form": "json"})
    meta = {"stated_size": [image["width"], image["height"]]} if "width" in image and "height" in image else {}
    return Draft(
        where,
        identity,
        [question, answer],
        [MediaRef(resolve(root, field_of(image, "file_name")), "image")],
        key={"task": "box", "value": found["at"]["xyxy"]},
        meta=meta,
        notes={"labels": "expressions"},
    )

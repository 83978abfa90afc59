"""Which objects go into which pictures, and one such picture as a Sample.

    tasks(recipe's section, counts) -> JSON a picture      from (seed, name, number) alone; nothing is read
    make_one(task) -> (JSON, [file])                       a row function: reads the shards, pastes, describes

Everything random of a picture comes from its own generator, so the same task gives the same bytes anywhere.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from pipelines.prepare.engine import reader_of
from pipelines.prepare.grounding.annotated import Annotated, annotated, vocabulary
from pipelines.prepare.grounding.paste import Cutout, Pasted, Unused, cut_out, paste_all, scaled
from pipelines.prepare.grounding.phrases import DETECT, pick
from trainer.data import kept, media
from trainer.data.order import id_hash
from trainer.data.sample import Media, Sample, to_json
from trainer.data.shards import Source
from trainer.errors import MediaError
from trainer.grounding import CopyPaste

JPEG = {"quality": 95, "subsampling": 0}


@dataclass(frozen=True)
class From:
    """A source as a task names it."""

    uri: str
    digest: str
    """Of what it offers: another choice of samples is another digest."""


@dataclass
class Rows:
    """Kept rows of a source, counted over its shards."""

    shard: np.ndarray
    """int32[N]"""
    row: np.ndarray
    """int32[N]"""

    @classmethod
    def of(cls, source: Source) -> Rows:
        rows = [kept.rows(source, shard) for shard in range(source.num_shards)]
        shards = [np.full(len(found), number, np.int32) for number, found in enumerate(rows)]
        empty = [np.zeros(0, np.int32)]
        return cls(np.concatenate(shards or empty), np.concatenate(rows or empty).astype(np.int32))

    def at(self, number: int) -> tuple[int, int]:
        return int(self.shard[number]), int(self.row[number])

    def __len__(self) -> int:
        return len(self.row)


def tasks(config: CopyPaste, name: str, kind: str, seed: int, objects: From, onto: From) -> Iterator[str]:
    """One JSON task a picture to make, in order."""
    donors, pictures = (Rows.of(Source.open(one.uri)) for one in (objects, onto))
    if not len(donors) or not len(pictures):
        return
    facts = {"name": name, "kind": kind, "objects": vars(objects), "onto": vars(onto), "config": config.model_dump()}
    for number in range(config.samples):
        rng = generator(seed, name, number, "draw")
        least, most = config.objects
        count = int(rng.integers(least, most, endpoint=True))
        drawn = [donors.at(int(rng.integers(len(donors)))) for _ in range(count)]
        picture = pictures.at(int(rng.integers(len(pictures))))
        yield json.dumps({**facts, "number": number, "seed": seed, "picture": picture, "from": drawn})


def generator(seed: int, name: str, number: int, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, int(id_hash(name, what)), number])


def make_one(task: str) -> tuple[str, list[bytes]]:
    """JSON {"sample", "counts"} with the file, or {"skipped", "counts"} without."""
    asked = json.loads(task)
    config, counts = CopyPaste.model_validate(asked["config"]), Counter[str]()
    rng = generator(asked["seed"], asked["name"], asked["number"], "place")
    try:
        under, pixels = _picture(asked["onto"], *asked["picture"])
        if under.sample.split != "train":
            raise Unused("held-out")
        cutouts = list(_cutouts(asked, config, under, rng, counts))
        if not cutouts:
            raise Unused("nothing-to-paste")
        found = paste_all(pixels, under.objects, [(one.cutout, one.left, one.top) for one in cutouts], config)
        counts.update(found.events)
        sample, data = _sample(asked, config, under, found, cutouts)
    except Unused as error:
        return json.dumps({"skipped": str(error), "counts": counts}), []
    return json.dumps({"sample": to_json(sample), "counts": counts}), [data]


# ---------------------------------------------------------------- what is pasted


@dataclass(frozen=True)
class Place:
    """A cut-out where it goes, and where it came from."""

    cutout: Cutout
    left: int
    top: int
    origin: dict[str, Any]


def _cutouts(
    asked: dict, config: CopyPaste, under: Annotated, rng: np.random.Generator, counts: Counter[str]
) -> Iterator[Place]:
    width, height = under.picture.width, under.picture.height
    for shard, row in asked["from"]:
        # drawn before anything can fail: one object's fate does not move the others
        factor, which, flip, x, y = (*rng.uniform(*config.scale, 1), *rng.random(4))
        mirrored = bool(flip < config.flip)
        try:
            donor, pixels = _picture(asked["objects"], shard, row)
            number = int(which * len(donor.objects))
            cutout = _one(asked, config, donor, pixels, number, under)
            cutout = scaled(cutout, (width, height), float(factor), config, mirrored=mirrored)
        except Unused as error:
            counts[f"unused: {error}"] += 1
            continue
        tall, wide = cutout.inside.shape
        left, top = int(x * (width - wide + 1)), int(y * (height - tall + 1))
        origin = {"from": f"{donor.sample.source}/{donor.sample.id}", "object": number, "label": cutout.label}
        yield Place(cutout, left, top, {**origin, "mirrored": mirrored, "masked": cutout.masked})


def _one(asked: dict, config: CopyPaste, donor: Annotated, pixels: np.ndarray, number: int, under: Annotated) -> Cutout:
    if donor.sample.split != "train":
        raise Unused("held-out")
    if donor.expressions:
        raise Unused("expression")  # "the left one" is not so in another picture
    if not donor.objects:
        raise Unused("no-objects")
    thing = donor.objects[number]
    if not _known(thing.label, asked["onto"], under, config):
        raise Unused("unknown-there")
    others = [other for index, other in enumerate(donor.objects) if index != number]
    return cut_out(pixels, thing, others, config)


def _known(label: str, onto: dict, under: Annotated, config: CopyPaste) -> bool:
    """Whether every object of the label is annotated in the picture, or none is there."""
    if under.expressions:
        return False
    if label in under.whole(config.complete):
        return True
    if label in under.incomplete or any(thing.label == label for thing in under.objects):
        return False
    if label in under.absent:
        return True
    return config.complete == "vocabulary" and label in _words(onto["uri"], onto["digest"])


@lru_cache(maxsize=4)
def _words(uri: str, key: str) -> frozenset[str]:
    return frozenset(vocabulary(uri, key))


def _picture(source: dict[str, str], shard: int, row: int) -> tuple[Annotated, np.ndarray]:
    """A sample's annotations and uint8[H, W, 3]."""
    reader = reader_of(source["uri"], source["digest"])
    sample = reader.source.sample(shard, row)
    found = annotated(sample)
    if isinstance(found, str):
        raise Unused(found)
    try:
        image = media.upright(reader.media(shard, row)[0], where=f"{sample.source}/{sample.id}")
    except MediaError:  # prepare.verify_media: header let it through
        raise Unused("undecodable") from None
    return found, np.asarray(image)


# ---------------------------------------------------------------- the sample


def _sample(
    asked: dict, config: CopyPaste, under: Annotated, found: Pasted, places: list[Place]
) -> tuple[Sample, bytes]:
    """The picture with one question for everything that is annotated in it."""
    unsure = under.incomplete | found.hidden_labels
    things = [thing for thing in found.objects if thing.label not in unsure]
    if not things:
        raise Unused("nothing-annotated")
    data = _encoded(found.pixels, config.encode)
    facts = media.image_header(data)
    file = Media(
        digest=media.digest_of(data),
        kind="image",
        suffix=facts.suffix,
        size_bytes=len(data),
        width=facts.width,
        height=facts.height,
        origin=f"made:copy_paste/{asked['number']}",
    )
    name, identity = asked["name"], f"pasted-{asked['number']:07d}"
    labels = sorted({thing.label for thing in things})
    question = pick(DETECT, "detect", name, identity).format(", ".join(labels))
    onto = f"{under.sample.source}/{under.sample.id}"
    pasted = [{**one.origin, "at": [one.left, one.top]} for one in places]
    hidden = {name: found.events[name] for name in ("removed", "cut") if found.events[name]}
    meta: dict[str, Any] = {"copy_paste": {"onto": onto, "pasted": pasted, **hidden}}
    present = {thing.label for thing in found.objects} | found.hidden_labels
    for key, values in (("incomplete", unsure), ("absent", under.absent - present)):
        meta |= {key: sorted(values)} if values else {}
    listed = [thing.model_dump(exclude_none=True) for thing in things]
    asks = {"role": "user", "parts": [{"part": "image", "media": 0}, {"part": "text", "text": question}]}
    answer = {"part": "objects", "media": 0, "objects": listed, "form": "any"}
    sample = {
        "id": identity,
        "source": name,
        "kind": asked["kind"],
        "messages": [asks, {"role": "assistant", "parts": [answer]}],
        "media": [file.model_dump()],
        "meta": meta,
    }
    return Sample.model_validate(sample), data


def _encoded(pixels: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if form == "png":
        picture.save(buffer, "PNG", compress_level=6)
    else:
        picture.save(buffer, "JPEG", **JPEG)
    return buffer.getvalue()

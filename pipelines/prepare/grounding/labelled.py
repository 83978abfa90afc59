"""Objects that models have found, as samples: thresholds, non-maximum suppression, masks checked against boxes.

The record is written by trainer/after/label.py, which asks the models once, with low thresholds; everything here is
arithmetic on it, so another threshold makes other samples and asks nothing. A picture that the record does not have is
counted (`not-labelled`), never guessed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.prepare.engine import reader_of
from pipelines.prepare.grounding.annotated import samples_of
from pipelines.prepare.grounding.copy_paste import From
from pipelines.prepare.grounding.masks import region_of
from pipelines.prepare.grounding.phrases import DETECT, pick
from trainer.after.label_record import Found, Record
from trainer.after.scores import iou
from trainer.data.sample import Mask, Sample, from_json, to_json
from trainer.data.shards import Source
from trainer.grounding import Labels

__all__ = ["Record", "chosen", "make_one", "tasks"]


def tasks(config: Labels, record: Record, name: str, kind: str, objects: From) -> Iterator[str]:
    """One JSON task a sample of one picture, in order; a picture that several samples show is labelled once."""
    facts = {"name": name, "kind": kind, "objects": vars(objects), "config": config.model_dump()}
    seen: set[str] = set()
    for shard, row, sample in samples_of(Source.open(objects.uri, keep_indexes=1)):
        digest = sample.media[0].digest if len(sample.media) == 1 and sample.media[0].kind == "image" else ""
        entry = record.get(digest) if digest not in seen else None
        why = "no-single-picture" if not digest else "picture-again" if digest in seen else "not-labelled"
        seen.add(digest)
        told = {"found": entry.as_json()} if entry is not None else {"why": why}
        yield json.dumps({**facts, "shard": shard, "row": row, "sample": to_json(sample), **told})


def make_one(task: str) -> tuple[str, list[bytes]]:
    """JSON {"sample", "counts"} with the picture, or {"skipped", "counts"} without."""
    asked = json.loads(task)
    if "why" in asked:
        return json.dumps({"skipped": asked["why"], "counts": {}}), []
    sample, found = from_json(asked["sample"]), Found.from_json(asked["found"])
    config = Labels.model_validate(asked["config"])
    counts: Counter[str] = Counter()
    things = chosen(found, config, sample.media[0].width, sample.media[0].height, counts)
    if not things or len(things) > config.max_objects:
        return json.dumps({"skipped": "too-many" if things else "nothing-found", "counts": counts}), []
    made = _sample(asked, config, sample, found, things)
    files = reader_of(asked["objects"]["uri"], asked["objects"]["digest"]).media(asked["shard"], asked["row"])
    return json.dumps({"sample": to_json(made), "counts": counts}), files


@dataclass(frozen=True)
class Thing:
    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Mask | None


def chosen(found: Found, config: Labels, width: int, height: int, counts: Counter[str]) -> list[Thing]:
    """The objects that pass the thresholds, best first; `counts` says what became of the others."""
    things: list[Thing] = []
    order = sorted(range(len(found.scores)), key=lambda at: (-found.scores[at], at))
    for at in order:
        box = _within(found.boxes[at], width, height)
        label, score = found.labels[at].strip(), found.scores[at]
        if score < config.min_score:
            counts["dropped low-score"] += 1
        elif not label:
            counts["dropped without-label"] += 1
        elif min(box[2] - box[0], box[3] - box[1]) < config.min_side:
            counts["dropped too-small"] += 1
        elif any(iou(box, one.box) > (config.nms_iou if label == one.label else config.nms_iou_any) for one in things):
            counts["dropped overlapping"] += 1
        else:
            mask = _mask(found, at, box, config, width, height, counts)
            things.append(Thing(label, score, mask.xyxy if mask is not None else box, mask))
    return things


def _mask(
    found: Found, at: int, box: tuple[float, ...], config: Labels, width: int, height: int, counts: Counter[str]
) -> Mask | None:
    rle = found.masks[at]
    if not rle:
        return None
    stated = Mask(xyxy=tuple(box), rle=tuple(rle))  # type: ignore[arg-type]
    region = region_of(stated, width, height)
    if region is None or found.mask_scores[at] < config.min_mask_score:
        counts["mask dropped low-score" if region is not None else "mask dropped empty"] += 1
        return None
    own = tuple(map(float, region.window))
    if iou(own, box) < config.min_box_iou:  # type: ignore[arg-type]
        counts["mask dropped not-of-its-box"] += 1
        return None
    return Mask(xyxy=own, rle=tuple(rle))  # type: ignore[arg-type]


def _within(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return (
        min(max(left, 0.0), float(width)),
        min(max(top, 0.0), float(height)),
        min(max(right, 0.0), float(width)),
        min(max(bottom, 0.0), float(height)),
    )


def _sample(asked: dict[str, Any], config: Labels, sample: Sample, found: Found, things: list[Thing]) -> Sample:
    labels = sorted({thing.label for thing in things})
    identity = f"{sample.source}/{sample.id}#labelled"
    question = pick(DETECT, "detect", asked["name"], identity).format(", ".join(labels))
    listed = [
        {
            "label": thing.label,
            "at": thing.mask.model_dump(exclude_none=True) if thing.mask else {"shape": "box", "xyxy": thing.box},
        }
        for thing in things
    ]
    asks = {"role": "user", "parts": [{"part": "image", "media": 0}, {"part": "text", "text": question}]}
    answer = {"part": "objects", "media": 0, "objects": listed, "form": "any"}
    seen = [(label.strip(), score) for label, score in zip(found.labels, found.scores, strict=True)]
    unsure = sorted({label for label, score in seen if config.doubt_score <= score < config.min_score})
    there = {label for label, score in seen if score >= config.doubt_score}
    absent = sorted(set(found.asked) - there)
    about = {**found.provenance, "scores": [round(thing.score, 4) for thing in things]}
    return Sample.model_validate(
        {
            "id": identity,
            "source": asked["name"],
            "kind": asked["kind"],
            "split": sample.split,
            "messages": [asks, {"role": "assistant", "parts": [answer]}],
            "media": [medium.model_dump() for medium in sample.media],
            "meta": {
                "labelled": about,
                **({"absent": absent} if absent else {}),
                **({"incomplete": unsure} if unsure else {}),
            },
        }
    )

"""What a recipe can say about grounding data that is made from other sources: `prepare.sources.NAME.grounding`, of a
source whose `format` is grounding and whose `path` is source://OTHER.

    asked:  {format: grounding, path: "source://coco", kind: grounding, rendering: chat, grounding: {questions: {...}}}
    pasted: {format: grounding, path: "source://coco", kind: grounding, rendering: chat, grounding: {copy_paste: {...}}}
    found:  {format: grounding, path: "source://photos", ..., grounding: {labels: {record: URI}}}

What is made are ordinary samples in shards; where each came from stands in its meta. Copies are pasted from training
samples onto training samples alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.fields import Strict, execution, result

FORMAT = "grounding"
SCHEME = "source://"
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(gt=0)]
Task = Literal["detect", "refer", "point", "count", "none"]
Form = Literal["any", "json", "xml", "plain"]
Complete = Literal["vocabulary", "picture", "nothing"]
TASKS: dict[Task, float] = {"detect": 2, "refer": 2, "point": 1, "count": 1, "none": 1}
OF_WHAT_IS_WRITTEN = ("refer", "point", "none")
"""Tasks that need no promise: none asks about labels that a picture lists as absent."""


def _usual_tasks(complete: Complete | None) -> dict[Task, float]:
    return {name: weight for name, weight in TASKS.items() if complete != "nothing" or name in OF_WHAT_IS_WRITTEN}


class Questions(Strict):
    """Questions about annotated pictures, in several wordings."""

    complete: Complete = result()
    """What the annotations promise. vocabulary: every object of every label of the source, in every picture (COCO);
    picture: of the labels that a picture has, and absent are those that its `absent` lists (LVIS); nothing: no more
    than what is written, so only referring expressions, their points and listed absences are asked."""
    tasks: dict[Task, Weight] = result(default_factory=lambda stated: _usual_tasks(stated.get("complete")))
    """How often each is asked. detect: every object of the labels named; refer: the one object that is meant; none: of
    a label that is not there."""
    per_picture: int = result(2, ge=1, le=5)
    """Different tasks asked of one sample, at most."""
    max_labels: int = result(8, ge=1)
    """Labels named in one question, at most."""
    distractors: int = result(2, ge=0)
    """Of these, labels that are not there, at most."""
    max_objects: int = result(40, ge=1)
    """Objects in one answer; a question with more is not asked."""
    forms: dict[Form, Weight] = result(default_factory=lambda: {"any": 1.0}, min_length=1)
    """How places are written. any: the family's own way, the variant's choice where it has several; json, xml (points
    only) and plain (just the numbers of one object) are told in the question."""

    @model_validator(mode="after")
    def _askable(self) -> Questions:
        if not self.tasks:
            raise ValueError("tasks: name at least one")
        if self.complete == "nothing" and (wrong := set(self.tasks) - set(OF_WHAT_IS_WRITTEN)):
            raise ValueError(f"tasks: {', '.join(sorted(wrong))} cannot be answered where complete is nothing")
        return self


class CopyPaste(Strict):
    """Objects cut out by their masks and pasted into other pictures (Ghiasi et al. 2021, arXiv 2012.07177: without
    blending; ours: the size that an object had in its own picture, jittered)."""

    samples: int = result(ge=1)
    """Pictures to make."""
    complete: Literal["vocabulary", "picture"] = result()
    """As for questions: an object goes only where its label is known to be annotated, or to be absent."""
    onto: str | None = result(None)
    """Source of the pictures that are pasted onto; default: the one that the objects are from."""
    objects: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = result((1, 3))
    """Objects pasted into one picture: least and most."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = result((0.5, 1.5))
    """Least and most by which the share of its picture that an object's side took is multiplied."""
    max_enlarge: float = result(1.5, gt=0)
    """Pixels are never enlarged more than this: it would show."""
    min_side: int = result(12, ge=1)
    """Pixels of the longer side as it is pasted; smaller ones are left out."""
    max_side: Share = result(0.7, gt=0)
    """Of the picture's sides; larger ones are made smaller."""
    flip: Share = result(0.0)
    """Chance that an object is mirrored; text in it would be, too."""
    max_hidden: Share = result(0.6)
    """Share of an object's area that may be covered; above it the object is removed from what is annotated, and its
    label is not asked about any more where a part of it still shows."""
    without_mask: Literal["skip", "rectangle"] = result("skip")
    """An object that has only a box: not pasted, or as the whole rectangle of the box where no other object reaches
    into it."""
    max_mask_off: float = result(2.0, ge=0)
    """Pixels by which a mask's own box may differ from the box stated beside it; others are not pasted."""
    encode: Literal["png", "jpeg"] = result("jpeg")
    """jpeg: quality 95, 4:4:4."""

    @model_validator(mode="after")
    def _ordered(self) -> CopyPaste:
        for name in ("objects", "scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the least, {low}, is above the most, {high}")
        return self


class Labels(Strict):
    """Objects that an open-vocabulary detector and a promptable segmenter have found (trainer/after/label.py writes the
    record). Thresholds are applied here: another one asks no model again."""

    record: str = execution()
    """Folder with the record; what it holds counts, not where it lies."""
    min_score: Share = result(0.35)
    """Of the detector; 0.35 is what Grounding DINO's own demo takes for boxes."""
    doubt_score: Share = result(0.25)
    """From here on a box that is not taken leaves in doubt whether all of its label were found: the label then counts
    as incomplete. Labels without any such box count as absent."""
    nms_iou: Share = result(0.7)
    """Of two boxes of one label that overlap by more, the one with the lower score goes."""
    nms_iou_any: Share = result(0.9)
    """The same for boxes of different labels."""
    min_mask_score: Share = result(0.5)
    """The segmenter's own estimate; below it the box stays and the mask goes."""
    min_box_iou: Share = result(0.5)
    """Of the mask's box with the detector's; below it the mask goes."""
    min_side: int = result(4, ge=1)
    """Pixels of the shorter side of a box."""
    max_objects: int = result(100, ge=1)
    """Pictures with more are left out."""

    @model_validator(mode="after")
    def _ordered(self) -> Labels:
        if self.doubt_score > self.min_score:
            raise ValueError(f"doubt_score {self.doubt_score} is above min_score {self.min_score}")
        return self


class Grounding(Strict):
    questions: Questions | None = result(None)
    copy_paste: CopyPaste | None = result(None)
    labels: Labels | None = result(None)

    @model_validator(mode="after")
    def _one(self) -> Grounding:
        if sum(part is not None for part in (self.questions, self.copy_paste, self.labels)) != 1:
            raise ValueError("state one of questions, copy_paste, labels")
        return self


def origin_of(path: str) -> str | None:
    """NAME of source://NAME."""
    return path.removeprefix(SCHEME) if path.startswith(SCHEME) else None


def problems_of(sources: Mapping[str, Any]) -> list[str]:
    """What is wrong between the sources of a recipe (recipe.Source by name)."""
    found: list[str] = []
    for name, source in sources.items():
        at = f"prepare.sources.{name}"
        if (source.grounding is not None) != (source.format == FORMAT):
            found.append(f"{at}.grounding: the format {FORMAT} has this section, and no other format")
        elif source.grounding is not None:
            found += [f"{at}.{field}: {told}" for field, told in _one(source, sources)]
    try:
        made_in_order(sources)
    except CycleError as error:
        names = error.args[1]
        found.append(f"prepare.sources.{names[0]}.path: made from itself: {' for '.join(names)}")
    return found


def is_made(source: Any) -> bool:
    """Whether a source is made from others (grounding; trainer/reasoning.py, captioning.py), after these are there and
    curated."""
    return any(part is not None for part in (source.grounding, source.reasoning, source.captioning))


def made_in_order(sources: Mapping[str, Any]) -> list[str]:
    """Names of the sources that are made from others, each after those that it is made from; by name where that leaves
    a choice: the order of a recipe's sections is not kept.

    Raises:
        graphlib.CycleError
    """
    made = {name: source for name, source in sorted(sources.items()) if is_made(source)}
    graph = {name: sorted(set(_origins(source).values()) & set(made)) for name, source in made.items()}
    return list(TopologicalSorter(graph).static_order())


def _origins(source: Any) -> dict[str, str]:
    """Field -> the source that it names."""
    pasted = source.grounding.copy_paste if source.grounding else None
    onto = pasted.onto if pasted else None
    found = {"path": source.path, "held_out": source.held_out, "grounding.copy_paste.onto": onto and SCHEME + onto}
    return {field: name for field, path in found.items() if path and (name := origin_of(path)) is not None}


def _one(source: Any, sources: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for field in ("path", "held_out"):
        if (path := getattr(source, field)) and origin_of(path) is None:
            found.append((field, f"{SCHEME}NAME of a source, got {path!r}"))
    for field, other in _origins(source).items():
        if other not in sources:
            found.append((field, f"no such source {other!r}; there are {sorted(sources)}"))
        elif sources[other].kind == "preference":
            found.append((field, f"{other!r} holds pairs, not annotated pictures"))
        elif field == "held_out" and sources[other].held_out is None:
            found.append((field, f"{other!r} has nothing held out"))
    if source.grounding.copy_paste and source.held_out:
        found.append(("held_out", "copies are pasted into training pictures only"))
    if source.rendering != "chat" or source.kind not in ("grounding", "instruction"):
        found.append(("kind", "questions about pictures have the kind grounding or instruction and the rendering chat"))
    found += [(field, "has no meaning for what is made from another source") for field in ("media", "curate")
              if getattr(source, field) is not None]  # fmt: skip
    return found

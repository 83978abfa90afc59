"""Questions about an annotated picture: detect, refer, point, count, and what is not there. Pure.

Only what the annotations can answer is asked (recipe: questions.complete); what cannot be asked is counted by reason.
Answers are objects in pixels of the original file, so each family writes its own coordinates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from pipelines.prepare.grounding.annotated import Annotated
from pipelines.prepare.grounding.masks import Region, mask_of
from pipelines.prepare.grounding.phrases import COUNT, DETECT, FORMS, NONE, POINT, REFER, pick
from trainer.data.sample import Box, Mask, Object, Point, Sample
from trainer.grounding import Questions, Task

TRIES = 20
"""Labels drawn for one that is absent; where nearly all are present, none is found and that is counted."""


@dataclass(frozen=True)
class Asked:
    """One question with its answer: parts of messages as JSON of a Sample, and the key."""

    question: str
    answer: dict[str, Any]
    key: dict[str, Any] | None = None
    about: tuple[str, ...] = ()


class Unasked(ValueError):
    """A task that this picture has no question for; the text is the name that it is counted by."""


@dataclass
class Asker:
    """Asks about one picture. `names` (source, sample) choose the wording, `rng` what is asked about."""

    found: Annotated
    config: Questions
    words: Sequence[str]
    rng: Random
    names: tuple[str, ...]
    unasked: Counter[str] = field(default_factory=Counter)

    def samples(self, source: str, kind: str) -> list[Sample]:
        """Up to `per_picture` samples of different tasks, drawn by their weights among those that can be asked."""
        made = []
        open_tasks = dict(sorted(self.config.tasks.items()))
        while open_tasks and len(made) < self.config.per_picture:
            [task] = self.rng.choices(list(open_tasks), weights=list(open_tasks.values()))
            del open_tasks[task]
            try:
                made.append(self._sample(task, TASKS[task](self), source, kind))
            except Unasked as error:
                self.unasked[f"{task}: {error}"] += 1
        return made

    def _sample(self, task: Task, asked: Asked, source: str, kind: str) -> Sample:
        sample = self.found.sample
        question = {"role": "user", "parts": [{"part": "image", "media": 0}, {"part": "text", "text": asked.question}]}
        answer = {"role": "assistant", "parts": [asked.answer]}
        made_from = {"made_from": f"{sample.source}/{sample.id}", "task": task, "about": list(asked.about)}
        carried = {name: sample.meta[name] for name in CARRIED if name in sample.meta}
        return Sample.model_validate(
            {
                "id": f"{sample.source}/{sample.id}#{task}",
                "source": source,
                "kind": kind,
                "split": sample.split,
                "messages": [question, answer],
                "media": [medium.model_dump() for medium in sample.media],
                "key": asked.key,
                "meta": {**carried, **made_from},
            }
        )

    # ---------------------------------------------------------------- tasks

    def detect(self) -> Asked:
        """Every object of some labels, among them a few labels that are not there."""
        labels = self.found.whole(self.config.complete)
        if not labels:
            raise Unasked("no label is annotated whole")
        chosen = self.rng.sample(labels, min(len(labels), self.rng.randint(1, self.config.max_labels)))
        things = [thing for thing in self.found.objects if thing.label in chosen]
        if len(things) > self.config.max_objects:
            raise Unasked("too many objects")
        room = min(self.config.distractors, self.config.max_labels - len(chosen))
        others = [self._absent() for _ in range(self.rng.randint(0, max(room, 0)))]
        named = sorted({*chosen, *(label for label in others if label is not None)})
        form = self._form("any", "json")
        question = pick(DETECT, "detect", *self.names).format(", ".join(named)) + self._told(form)
        return Asked(question, _objects(things, form), _box_key(things), tuple(named))

    def refer(self) -> Asked:
        """The one object that an expression means, or the only one of its label."""
        things = [thing for thing in self._single() if not isinstance(thing.at, Point)]
        if not things:
            raise Unasked("no label means one object")
        thing = self.rng.choice(things)
        form = self._form("any", "json", "plain")
        name = thing.label if self.found.expressions else f"the {thing.label}"
        question = pick(REFER, "refer", *self.names).format(name) + self._told(form)
        return Asked(question, _objects([thing], form), _box_key([thing]), (thing.label,))

    def point(self) -> Asked:
        """A point on each object of a label: annotated, or the one deepest in its mask."""
        whole = self.found.whole(self.config.complete)
        labels = whole or list(dict.fromkeys(thing.label for thing in self._single()))
        listed = [label for label in labels if all(isinstance(t.at, Point | Mask) for t in self.found.of(label))]
        if not listed:
            raise Unasked("neither points nor masks")
        label = self.rng.choice(listed)
        things = [self._on(thing) for thing in self.found.of(label)]
        if len(things) > self.config.max_objects:
            raise Unasked("too many objects")
        form = self._form("any", "json", "xml", *(["plain"] if len(things) == 1 else []))
        question = pick(POINT, "point", *self.names).format(self._each(label, len(things))) + self._told(form)
        key = {"task": "point", "value": list(things[0].at.xy)} if len(things) == 1 else None  # type: ignore[union-attr]
        return Asked(question, _objects(things, form), key, (label,))

    def count(self) -> Asked:
        labels = self.found.whole(self.config.complete)
        if not labels:
            raise Unasked("no label is annotated whole")
        label = self.rng.choice(labels)
        number = len(self.found.of(label))
        if number > self.config.max_objects:
            raise Unasked("too many objects")
        return Asked(pick(COUNT, "count", *self.names).format(label), _text(str(number)), _count_key(number), (label,))

    def none(self) -> Asked:
        """Locate, point to or count what is not there."""
        label = self._absent()
        if label is None:
            raise Unasked("no label is known to be absent")
        wordings = self.rng.choice((DETECT, POINT, COUNT))
        question = pick(wordings, "none", *self.names).format(label)
        if wordings is COUNT:
            return Asked(question, _text("0"), _count_key(0), (label,))
        return Asked(question, _text(pick(NONE, "answer", *self.names)), None, (label,))

    # ---------------------------------------------------------------- choices

    def _single(self) -> list[Object]:
        """Objects whose label means no other one in the picture."""
        if not self.found.expressions:
            return [self.found.of(label)[0] for label in self.found.whole(self.config.complete)
                    if len(self.found.of(label)) == 1]  # fmt: skip
        return [thing for thing in self.found.objects if len(self.found.of(thing.label)) == 1]

    def _absent(self) -> str | None:
        """A label that is known not to be there: drawn from those that were looked for, else from the vocabulary."""
        words = sorted(self.found.absent) if self.config.complete != "vocabulary" else self.words
        for _ in range(TRIES if words else 0):
            label = self.rng.choice(words)
            if self.found.missing(label, self.config.complete):
                return label
        return None

    def _on(self, thing: Object) -> Object:
        if isinstance(thing.at, Point):
            return thing
        assert isinstance(thing.at, Mask)
        picture = self.found.picture
        region = Region(0, 0, mask_of(thing.at, picture.width, picture.height)).tight()
        if region is None:
            raise Unasked("an empty mask")
        return thing.model_copy(update={"at": Point(xy=region.deepest())})

    def _each(self, label: str, number: int) -> str:
        if self.found.expressions:
            return label
        return f"the {label}" if number == 1 else f"every {label}"

    def _form(self, *possible: str) -> str:
        weights = {name: weight for name, weight in sorted(self.config.forms.items()) if name in possible}
        return self.rng.choices(list(weights), weights=list(weights.values()))[0] if weights else "any"

    def _told(self, form: str) -> str:
        return pick(FORMS[form], "form", *self.names)


TASKS: dict[str, Callable[[Asker], Asked]] = {
    "detect": Asker.detect,
    "refer": Asker.refer,
    "point": Asker.point,
    "count": Asker.count,
    "none": Asker.none,
}
CARRIED = ("copy_paste", "labelled")
"""What a sample made from another one still says: where its picture and its objects come from."""


def _objects(things: Sequence[Object], form: str) -> dict[str, Any]:
    listed = [thing.model_dump(exclude_none=True) for thing in things]
    return {"part": "objects", "media": 0, "objects": listed, "form": form}


def _text(words: str) -> dict[str, Any]:
    return {"part": "text", "text": words}


def _box_key(things: Sequence[Object]) -> dict[str, Any] | None:
    if len(things) != 1 or not isinstance(things[0].at, Box | Mask):
        return None
    return {"task": "box", "value": list(things[0].at.xyxy)}


def _count_key(number: int) -> dict[str, Any]:
    return {"task": "count", "value": number}

"""A sample as an annotated picture: its objects, and what is known to be there, to be absent, or not to be known.

`meta` of a sample may say: `labels: expressions` (each label means one object, by words that hold in this picture
alone), `absent: [...]` (labels that were looked for and are not there), `incomplete: [...]` (labels of which not every
object is annotated). Readers write it where their format has it (COCO's expressions and LVIS), and copy-paste does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from trainer.data import kept
from trainer.data.sample import Box, Mask, Media, Object, Objects, Point, Sample, from_json, parts_of
from trainer.data.shards import Source
from trainer.grounding import Complete

EXPRESSIONS = "expressions"


@dataclass(frozen=True)
class Annotated:
    sample: Sample
    objects: tuple[Object, ...]
    """With a place in the picture (no spans) and a label, each once."""
    absent: frozenset[str]
    incomplete: frozenset[str]

    @property
    def picture(self) -> Media:
        return self.sample.media[0]

    @property
    def expressions(self) -> bool:
        return self.sample.meta.get("labels") == EXPRESSIONS

    @property
    def labels(self) -> list[str]:
        """Different labels in order of appearance."""
        return list(dict.fromkeys(thing.label for thing in self.objects))

    def of(self, label: str) -> list[Object]:
        return [thing for thing in self.objects if thing.label == label]

    def whole(self, complete: Complete) -> list[str]:
        """Labels that are there and of which every object is annotated."""
        if complete == "nothing" or self.expressions:
            return []
        return [label for label in self.labels if label not in self.incomplete]

    def missing(self, label: str, complete: Complete) -> bool:
        """Whether a label of the source's vocabulary is known not to be in the picture."""
        if label in self.incomplete or any(thing.label == label for thing in self.objects):
            return False
        return label in self.absent or (complete == "vocabulary" and not self.expressions)


def annotated(sample: Sample) -> Annotated | str:
    """The picture of a sample, or by what name it is counted that has none: several-pictures, no-objects."""
    if len(sample.media) != 1 or sample.media[0].kind != "image":
        return "several-pictures" if sample.media else "no-picture"
    found: dict[str, Object] = {}
    for part in parts_of(sample):
        for thing in part.objects if isinstance(part, Objects) else ():
            if thing.label.strip() and isinstance(thing.at, Box | Mask | Point):
                found.setdefault(thing.model_dump_json(), thing)
    absent = frozenset(map(str, sample.meta.get("absent") or ()))
    if not found and not absent:
        return "no-objects"
    incomplete = frozenset(map(str, sample.meta.get("incomplete") or ()))
    return Annotated(sample, tuple(found.values()), absent, incomplete)


def samples_of(source: Source) -> Iterator[tuple[int, int, Sample]]:
    """(shard, row, sample) of what curation has kept; text only."""
    for shard in range(source.num_shards):
        texts = source.index(shard)["sample_json"]
        for row in kept.rows(source, shard).tolist():
            yield shard, row, from_json(texts[row].as_py())


@lru_cache(maxsize=8)
def vocabulary(uri: str, _digest: str) -> tuple[str, ...]:
    """Every label of a source's kept samples, sorted; expressions are none. One pass over its text, once a process."""
    source = Source.open(uri, keep_indexes=1)
    return words_of(found for _, _, sample in samples_of(source) if isinstance(found := annotated(sample), Annotated))


def words_of(pictures: Iterable[Annotated]) -> tuple[str, ...]:
    return tuple(sorted({label for one in pictures if not one.expressions for label in (*one.labels, *one.absent)}))

"""A reader's rows on their whole way: rows, Samples, a shard, counts, plan, encode, and the targets as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.prepare.describe import draft_to_json, inspect
from pipelines.prepare.formats.rows import Bad, Draft
from tests.data.builders import a_source, a_tokenizer, counts_of, some_rules
from trainer.data.encode import encode
from trainer.data.layout import REASONS, Fit, Layout, Rules, layout
from trainer.data.mixture import Order
from trainer.data.plan import make_plan
from trainer.data.sample import Sample, from_json
from trainer.recipe import Source

Made = tuple[Sample, list[bytes]]


def read(format: str, path: Path, rendering: str = "chat") -> list[Draft | Bad]:
    """All rows of a file; media lie beside it."""
    facts = {"format": format, "path": str(path), "kind": "agent", "rendering": rendering}
    source = Source.model_validate(facts)
    return list(import_module(f"pipelines.prepare.formats.{format}").read(str(path), str(path.parent), source))


def made(rows: list[Draft | Bad], kind: str, *, media_root: str = "") -> list[Made | Bad]:
    """Samples with their files, as the ingest makes them."""
    found: list[Made | Bad] = []
    for row in rows:
        if isinstance(row, Bad):
            found.append(row)
            continue
        text, files = inspect(draft_to_json(row, source="mine", kind=kind, split="train", media_root=media_root))
        answer = json.loads(text)
        found.append(Bad(**answer["bad"]) if "bad" in answer else (from_json(answer["sample"]), list(files)))
    return found


def only(rows: list[Draft | Bad], kind: str) -> Made:
    """The one sample that is expected."""
    [found] = made(rows, kind)
    assert not isinstance(found, Bad), found
    return found


@dataclass(frozen=True)
class Encoded:
    """One variant of a sample."""

    variant: int
    laid: Layout
    labels: list[int]
    """Ids that the model learns to say."""


def encoded(sample: Sample, files: Sequence[bytes], folder: Path, rules: Rules) -> list[Encoded] | str:
    """Both variants, as a plan of one pass each lays them out and the loader encodes them; or the reason of the drop.

    Each is what was stored, and as long as the plan says.
    """
    source = a_source(str(folder), [(sample, list(files))])
    counts = counts_of(source, rules, "mine", sample.kind)
    if (counts.drop >= 0).any():
        [reason] = {REASONS[number] for number in counts.drop.ravel()}
        return reason
    once = Order(length=rules.length, patch_budget=rules.patch_budget, lanes=1, packs_per_step=1, seed=1, steps=8)
    plan = make_plan([counts], once)
    places = {place.variant: place for index in range(plan.num_packs) for place in plan.pack(index).places}
    assert sorted(places) == [0, 1]
    found = []
    for variant, place in sorted(places.items()):
        stored = source.sample(place.shard, place.row)
        assert stored == sample
        laid = layout(stored, variant, Fit(*plan.fits[place.fit]), rules)
        arrays = encode(stored, laid, files, rules)
        planned = (place.tokens, place.patches, place.targets)
        assert (len(arrays.ids), len(arrays.patches), len(arrays.label_ids)) == planned
        found.append(Encoded(variant, laid, arrays.label_ids.tolist()))
    return found


@dataclass(frozen=True)
class Trained:
    variant: int
    targets: str
    """What the model learns to say, decoded from its tokens."""
    grids: list[tuple[int, int]]
    """Width and height that each picture is resized to."""
    frames: list[tuple[int, ...]]


def trained(sample: Sample, files: list[bytes], folder: Path, rendering: str = "chat", **rules: Any) -> list[Trained]:
    """Both variants of a sample that is not dropped."""
    ways = encoded(sample, files, folder / "shards", some_rules(rendering, length=8192, patch_budget=16384, **rules))
    assert not isinstance(ways, str), ways
    found = []
    for way in ways:
        grids = [(span.grid.width, span.grid.height) for span in way.laid.spans if span.grid is not None]
        text = a_tokenizer().decode(way.labels)
        frames = [span.frames for span in way.laid.spans if span.kind == "video"]
        found.append(Trained(way.variant, text.replace("<|im_end|>", "\n"), grids, frames))
    return found


# ---------------------------------------------------------------- pages


@dataclass
class Tag:
    """An element of a page's HTML that has a place."""

    name: str
    kind: str
    """Its class and format."""
    box: tuple[int, ...]
    text: str = ""


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Tag] = []
        self.open: list[str] = []
        self.inside: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if "data-bbox" in named:
            kind = " ".join(filter(None, (named.get("class"), named.get("format"))))
            self.found.append(Tag(tag, kind, tuple(map(int, named["data-bbox"].split()))))
            self.inside.append(len(self.found) - 1)
        else:
            self.inside.append(self.inside[-1] if self.inside else -1)
        if tag in ("td", "th", "tr", "table") and self.inside[-1] >= 0 and "data-bbox" not in named:
            spans = "".join(f" {name}={named[name]}" for name in ("rowspan", "colspan") if name in named)
            self.found[self.inside[-1]].text += f"<{tag}{spans}>"
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.inside.pop()
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] >= 0:
            self.found[self.inside[-1]].text += data if data.strip() else ""


def tags(page: str) -> list[Tag]:
    """The elements with a place in QwenVL HTML; fails where it is not well-formed."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert not parser.open, f"open: {parser.open}"
    return parser.found


def boxes_lie_where(found: list[Tag], want: list[tuple[float, ...]], media: Any, grid: tuple[int, int]) -> None:
    """Boxes as the model reads them, turned back into pixels of the file: within the page and a pixel, or half a step
    of the resized page where that is coarser."""
    scale = (media.width / grid[0], media.height / grid[1])
    for tag, box in zip(found, want, strict=True):
        assert 0 <= tag.box[0] < tag.box[2] <= grid[0] and 0 <= tag.box[1] < tag.box[3] <= grid[1], tag
        for place, (value, wanted) in enumerate(zip(tag.box, box, strict=True)):
            step = scale[place % 2]
            assert abs(value * step - wanted) <= max(1.0, step / 2) + 1e-6, (tag, box)

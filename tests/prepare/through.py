"""A reader's rows on their whole way: rows, Samples, a shard, counts, plan, encode, and the targets as text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.prepare.describe import draft_to_json, inspect
from pipelines.prepare.formats.rows import Bad, Draft
from tests.data.builders import a_source, a_tokenizer, counts_of, some_rules
from trainer.data.encode import encode
from trainer.data.layout import Fit, layout
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


def made(rows: list[Draft | Bad], kind: str) -> list[Made | Bad]:
    """Samples with their files, as the ingest makes them."""
    found: list[Made | Bad] = []
    for row in rows:
        if isinstance(row, Bad):
            found.append(row)
            continue
        text, files = inspect(draft_to_json(row, source="mine", kind=kind, split="train", media_root=""))
        answer = json.loads(text)
        found.append(Bad(**answer["bad"]) if "bad" in answer else (from_json(answer["sample"]), list(files)))
    return found


def only(rows: list[Draft | Bad], kind: str) -> Made:
    """The one sample that is expected."""
    [found] = made(rows, kind)
    assert not isinstance(found, Bad), found
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
    """Both variants of a sample, as a plan of one pass each lays them out and the loader encodes them."""
    chosen = some_rules(rendering, length=8192, patch_budget=16384, **rules)
    source = a_source(str(folder / "shards"), [(sample, files)])
    counts = counts_of(source, chosen, "mine", sample.kind)
    plan = make_plan([counts], Order(length=8192, patch_budget=16384, lanes=1, packs_per_step=1, seed=1, steps=8))
    places = {place.variant: place for index in range(plan.num_packs) for place in plan.pack(index).places}
    assert sorted(places) == [0, 1]
    found = []
    for variant, place in sorted(places.items()):
        stored = source.sample(place.shard, place.row)
        assert stored == sample
        laid = layout(stored, variant, Fit(*plan.fits[place.fit]), chosen)
        arrays = encode(stored, laid, files, chosen)
        assert (len(arrays.ids), len(arrays.patches), len(arrays.label_ids)) == (
            place.tokens,
            place.patches,
            place.targets,
        )
        grids = [(span.grid.width, span.grid.height) for span in laid.spans if span.grid is not None]
        text = a_tokenizer().decode(arrays.label_ids.tolist())
        frames = [span.frames for span in laid.spans if span.kind == "video"]
        found.append(Trained(variant, text.replace("<|im_end|>", "\n"), grids, frames))
    return found

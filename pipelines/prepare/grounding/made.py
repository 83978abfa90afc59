"""Sources of the format `grounding`: shards made from the samples of other sources (trainer/grounding.py has the
settings). Called by prepare_data after every other source is there and curated, each after what it is made from.

    make(recipe, out, name, engine) -> {split: {read, kept, bad, made}}

`bad` counts pictures and questions that were not made, by reason; `made` what happened on the way. A source that was
made from the same input by the same settings is left as it is; one that was interrupted goes on after its last whole
shard (resumable.py).
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from pipelines.prepare import resumable
from pipelines.prepare.engine import Engine, blocks, reader_of
from pipelines.prepare.grounding import copy_paste, labelled
from pipelines.prepare.grounding.annotated import annotated, samples_of, vocabulary
from pipelines.prepare.grounding.copy_paste import From
from pipelines.prepare.grounding.questions import Asker
from pipelines.prepare.resumable import ResumableShards
from trainer import storage
from trainer.data import kept
from trainer.data.order import id_hash
from trainer.data.sample import from_json, to_json
from trainer.data.shards import Source
from trainer.errors import DataError, RecipeError
from trainer.grounding import Questions, origin_of
from trainer.models.family import class_of
from trainer.recipe import Recipe
from trainer.resolve import digest

VERSION = 1
"""Raised when the same input gives other samples than before."""
BLOCK_TASKS = 64
Json = dict[str, Any]
RowFunction = Callable[[str], tuple[str, list[bytes]]]


def make(recipe: Recipe, out: str, name: str, engine: list[Engine]) -> dict[str, Json]:
    """All splits of one source; `engine` is made on first need (one item).

    Raises:
        RecipeError: a form that the family does not write. DataError: nothing could be made.
    """
    source = recipe.prepare.sources[name]
    assert source.grounding is not None
    _check_forms(recipe, name)
    paths = [("train", source.path), *([("held_out", source.held_out)] if source.held_out else [])]
    return {split: _split(recipe, out, name, split, str(origin_of(path)), engine) for split, path in paths}


def _check_forms(recipe: Recipe, name: str) -> None:
    """The words of a question name a form only where the family writes it."""
    grounding = recipe.prepare.sources[name].grounding
    asked = set(grounding.questions.forms) & {"json", "xml"} if grounding and grounding.questions else set()
    style = class_of(recipe.family).objects.name
    if asked and style != "json":
        told = f"{', '.join(sorted(asked))} of a family that writes places as {style}; it has any and plain"
        raise RecipeError([(f"prepare.sources.{name}.grounding.questions.forms", told)])


def _split(recipe: Recipe, out: str, name: str, split: str, origin: str, engine: list[Engine]) -> Json:
    started = time.monotonic()
    target = storage.join(out, "data", "sources", name, split)
    objects = _from(out, origin, split)
    function, tasks, facts = _work(recipe, out, name, objects)
    key = digest({"version": VERSION, "seed": recipe.seed, "name": name, "split": split, **facts})
    if (stored := resumable.stored(target, key)) is not None:
        print(f"grounding: {name}/{split} is already there ({stored['kept']} samples)", flush=True)
        return stored
    if not engine:
        engine.append(Engine(recipe.prepare.engine))
    made = ResumableShards(target, key=key, shard_bytes=recipe.prepare.shard_bytes)
    with made:
        funnel = _write(function, islice(tasks(), made.num_items, None), made, engine[0], f"{name}/{split}")
        if not funnel["kept"]:
            got = ", ".join(f"{count} {reason}" for reason, count in {**funnel["bad"], **funnel["made"]}.items())
            raise DataError("nothing could be made", where=f"prepare.sources.{name} ({split})",
                            expected="at least one sample", got=got or "a source without samples",
                            do="look at the counts: other settings, or another source")  # fmt: skip
        made.finish(funnel, source=name, split=split)
    told = ", ".join(f"{count} {what}" for what, count in {**funnel["bad"], **funnel["made"]}.items()) or "-"
    took = time.monotonic() - started
    print(f"grounding: {name}/{split} {funnel['kept']} samples ({told}; {took:.1f} s)", flush=True)
    return funnel


def _from(out: str, name: str, split: str) -> From:
    source = Source.open(storage.join(out, "data", "sources", name, split))
    return From(source.uri, kept.data_digest(source))


Tasks = Callable[[], Iterator[str]]


def _work(recipe: Recipe, out: str, name: str, objects: From) -> tuple[RowFunction, Tasks, Json]:
    """(row function, its tasks, what the result depends on)."""
    source, seed = recipe.prepare.sources[name], recipe.seed
    grounding = source.grounding
    assert grounding is not None
    facts: Json = {"kind": source.kind, "settings": grounding.model_dump(mode="json"), "from": objects.digest}
    if (pasted := grounding.copy_paste) is not None:
        onto = objects if pasted.onto is None else _from(out, pasted.onto, "train")
        facts |= {"onto": onto.digest}
        return copy_paste.make_one, lambda: copy_paste.tasks(pasted, name, source.kind, seed, objects, onto), facts
    if (labels := grounding.labels) is not None:
        facts["settings"]["labels"].pop("record")  # what it holds counts
        record = labelled.Record(labels.record)
        facts |= {"record": record.digest}
        return labelled.make_one, lambda: labelled.tasks(labels, record, name, source.kind, objects), facts
    asked = grounding.questions
    assert asked is not None
    return ask_one, lambda: _to_ask(asked, name, source.kind, seed, objects), facts


# ---------------------------------------------------------------- questions


def _to_ask(config: Questions, name: str, kind: str, seed: int, objects: From) -> Iterator[str]:
    facts = {"name": name, "kind": kind, "seed": seed, "objects": vars(objects), "config": config.model_dump()}
    for shard, row, sample in samples_of(Source.open(objects.uri, keep_indexes=1)):
        yield json.dumps({**facts, "shard": shard, "row": row, "sample": to_json(sample)})


def ask_one(task: str) -> tuple[str, list[bytes]]:
    """JSON {"samples", "counts"} with the picture, or {"skipped"} without."""
    asked = json.loads(task)
    found = annotated(from_json(asked["sample"]))
    if isinstance(found, str):
        return json.dumps({"skipped": found, "counts": {}}), []
    uri, key = asked["objects"]["uri"], asked["objects"]["digest"]
    names = (asked["name"], found.sample.source, found.sample.id)
    rng = random.Random(f"{asked['seed']}/{int(id_hash(asked['name'], found.sample.id))}")
    config = Questions.model_validate(asked["config"])
    words = vocabulary(uri, key) if config.complete == "vocabulary" else ()
    asker = Asker(found, config, words, rng, (str(asked["seed"]), *names))
    made = asker.samples(asked["name"], asked["kind"])
    counts = {f"unasked {task}": count for task, count in asker.unasked.items()}
    if not made:
        return json.dumps({"skipped": "nothing-to-ask", "counts": counts}), []
    counts |= Counter(f"asked {sample.meta['task']}" for sample in made)
    files = reader_of(uri, key).media(asked["shard"], asked["row"])
    return json.dumps({"samples": [to_json(sample) for sample in made], "counts": counts}), files


# ---------------------------------------------------------------- writing


def _write(function: RowFunction, tasks: Iterable[str], made: ResumableShards, engine: Engine, told: str) -> Json:
    """Runs tasks in blocks and writes their samples in order. `read` counts tasks, `kept` samples."""
    before = made.counts or {"read": 0, "kept": 0, "bad": {}, "made": {}}
    read, kept_ = before["read"], before["kept"]
    bad, events = Counter[str](before["bad"]), Counter[str](before["made"])

    def counts() -> Json:
        happened = {name: count for name, count in sorted(events.items()) if count}
        return {"read": read, "kept": kept_, "bad": dict(sorted(bad.items())), "examples": [], "made": happened}

    last = time.monotonic()
    for block in blocks(tasks, BLOCK_TASKS):
        for text, files in engine.map(function, block):
            found = json.loads(text)
            written = [] if "skipped" in found else found.get("samples") or [found["sample"]]
            made.add([(from_json(sample), files) for sample in written], counts=counts)
            read += 1
            kept_ += len(written)
            events.update(found["counts"])
            bad.update([found["skipped"]] if "skipped" in found else [])
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"grounding: {told} {read} done", flush=True)
    return counts()

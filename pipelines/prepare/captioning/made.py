"""Sources of the format `video_captions`: long videos of another source with captions made level by level
(trainer/captioning.py has the settings). Called by prepare_data after that source is there and curated.

    make(recipe, out, name) -> {split: {read, kept, bad, examples, made, judge}}

A sample asks for a description, whose answer is the caption of the whole video, and for the events with their times.
`bad` counts samples that are left out; `made` captions by level. Answers are recorded below
OUT/data/answers/captioning/NAME: given these the same shards come out, and a run that was killed asks only for what is
missing.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import islice
from typing import Any

from pipelines.prepare.captioning import levels
from pipelines.prepare.captioning.levels import Caption, Damaged, Part, Uncaptioned
from pipelines.prepare.curate.asking import Asking, check_failed, judge_facts
from pipelines.prepare.curate.record import Record
from pipelines.prepare.formats.events import LIST, Event
from pipelines.prepare.formats.rows import message, text
from pipelines.prepare.grounding.annotated import samples_of
from pipelines.prepare.ingest import splits_of
from pipelines.prepare.resumable import ResumableShards, stored
from pipelines.prepare.tally import Tally
from trainer import storage
from trainer.captioning import Captioning
from trainer.data import kept
from trainer.data.sample import Sample
from trainer.data.shards import ShardReader, Source
from trainer.errors import DataError
from trainer.fields import identity
from trainer.grounding import origin_of
from trainer.recipe import Recipe
from trainer.resolve import digest

VERSION = 1
"""Raised when the same answers give other samples than before."""
DESCRIBE = "Describe this video from its beginning to its end."
Json = dict[str, Any]


def make(recipe: Recipe, out: str, name: str) -> dict[str, Json]:
    """All splits of one source.

    Raises:
        Unfinished: the endpoint does not answer, or too many requests are without a valid answer. DataError: nothing
        is left.
    """
    splits = splits_of(recipe.prepare.sources[name])
    return {split: _split(recipe, out, name, split, str(origin_of(path))) for split, path in splits}


def _split(recipe: Recipe, out: str, name: str, split: str, origin: str) -> Json:
    started = time.monotonic()
    asked = recipe.prepare.sources[name].captioning
    assert asked is not None
    source = Source.open(storage.join(out, "data", "sources", origin, split), keep_indexes=1)
    settings = {**identity(asked), "judge": judge_facts(asked.judge)}
    about = {"name": name, "split": split, "seed": recipe.seed, "settings": settings, "from": kept.data_digest(source)}
    key = digest({"version": [VERSION, levels.VERSION], **about})
    target = storage.join(out, "data", "sources", name, split)
    if (found := stored(target, key)) is not None:
        print(f"captioning: {name}/{split} is already there ({found['kept']} videos)", flush=True)
        return found
    record = Record(storage.join(out, "data", "answers", "captioning", name))
    at = f"prepare.sources.{name}.captioning.judge"
    asking = Asking(asked.judge, record, levels.parse, seed=recipe.seed, field=at)
    made = ResumableShards(target, key=key, shard_bytes=recipe.prepare.shard_bytes)
    tally = Tally.from_json(made.counts)
    if made.num_items:
        print(f"captioning: {name}/{split} goes on after {tally.read} samples, in whole shards already", flush=True)
    with made:
        _write(source, made, tally, asking, asked, name)
        if not tally.kept:
            got = ", ".join(f"{count} {what}" for what, count in tally.bad.items()) or "none read"
            do = f"look at the counts; videos below {asked.min_duration_s:g} s are left out (captioning.min_duration_s)"
            where = f"prepare.sources.{name} ({split})"
            raise DataError("no video was captioned", where=where, expected="at least one", got=got, do=do)
        funnel = {**tally.as_json(), "judge": asking.counts.as_json()}
        made.finish(funnel, source=name, split=split)
    told = ", ".join(f"{count:,} {what}" for what, count in sorted({**tally.bad, **tally.made}.items()))
    print(f"captioning: {name}/{split} {tally.kept} videos ({told}; {time.monotonic() - started:.1f} s)", flush=True)
    return funnel


def _write(
    source: Source, made: ResumableShards, tally: Tally, asking: Asking[Caption], asked: Captioning, name: str
) -> None:
    reader = ShardReader(source)
    expected = sum(_num_frames(sample, asked) for _, _, sample in samples_of(source))
    try:
        for shard, row, sample in islice(samples_of(source), made.num_items, None):
            before = tally.as_json()
            files: list[bytes] = []
            found = _captioned(sample, partial(_file, reader, shard, row, files), asking, asked, tally)
            check_failed(
                [asking.counts],
                asked.judge,
                where=asking.field,
                what="captions",
                failed=tally.made["requests without a caption"],
                of=expected,
                missing=asking.counts.unanswered,
            )
            if found is None:
                made.add([], counts=lambda counts=before: counts)
            else:
                written = _sample(sample, found, asked, name, asking.model)
                made.add([(written, [_file(reader, shard, row, files)])], counts=lambda counts=before: counts)
                print(f"captioning: {name} {sample.id}, {len(found[0])} segments", flush=True)
            tally.read += 1
            tally.kept += found is not None
    finally:
        reader.close()


def _file(reader: ShardReader, shard: int, row: int, files: list[bytes]) -> bytes:
    """The sample's video, read once."""
    if not files:
        files += reader.media(shard, row)
    return files[0]


def _captioned(
    sample: Sample, read: partial[bytes], asking: Asking[Caption], asked: Captioning, tally: Tally
) -> list[list[Part]] | None:
    """The levels, or None: why is counted."""
    where = f"{sample.source}/{sample.id}"
    if [item.kind for item in sample.media] != ["video"]:
        tally.leave_out(where, "not-one-video")
        return None
    if sample.media[0].duration_s < asked.min_duration_s:
        tally.leave_out(where, "short")
        return None
    before = asking.counts.failed
    try:
        found = levels.caption(sample.media[0], read, asked, asking)
    except Uncaptioned as error:
        found = None
        tally.leave_out(where, "without-caption", error)
    except Damaged as error:
        found = None
        tally.leave_out(where, "damaged-media", error)
    if failed := asking.counts.failed - before:
        tally.made["requests without a caption"] += failed
    if found is not None:
        tally.made["captions of segments"] += len(found[0])
        tally.made["captions above"] += sum(map(len, found[1:]))
    return found


def _num_frames(sample: Sample, asked: Captioning) -> int:
    """Requests about frames of a sample; those above are a few more."""
    if [item.kind for item in sample.media] != ["video"] or sample.media[0].duration_s < asked.min_duration_s:
        return 0
    return len(levels.segments(sample.media[0].duration_s, asked.segment_s)) * asked.frames_per_segment


def _sample(sample: Sample, found: list[list[Part]], asked: Captioning, name: str, model: str) -> Sample:
    """The video with a description and its events, which are written with times as the variant picks."""
    listed = [Event(one.caption, one.start_s, one.end_s).as_object() for one in levels.events(found, asked.max_events)]
    told = {"part": "objects", "media": 0, "objects": listed, "form": "any"}
    turns = [
        message("user", {"part": "video", "media": 0}, text(DESCRIBE)),
        message("assistant", text(found[-1][0].caption)),
        message("user", text(LIST)),
        message("assistant", told),
    ]
    content = {
        "id": sample.id,
        "source": name,
        "kind": "video",
        "split": sample.split,
        "messages": turns,
        "media": [sample.media[0].model_dump()],
        "meta": {**sample.meta, "from": f"{sample.source}/{sample.id}", "captions": f"judge {model}"},
    }
    return Sample.model_validate(content)

"""Scores of the four criteria as columns beside the shards, from one of two scorers: statistics, or a judge. A scorer
is a function of samples and their files; thresholds are not its business."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.prepare.curate import judge, statistics
from pipelines.prepare.curate.asking import Counts, check_failed, judge_facts
from pipelines.prepare.curate.columns import Work
from pipelines.prepare.curate.record import Record
from pipelines.prepare.engine import reader_of
from trainer import storage
from trainer.curation import Judge, Score
from trainer.data.sample import from_json
from trainer.data.shards import ShardReader, Source
from trainer.resolve import digest

VERSION = [1, statistics.VERSION, judge.VERSION]
CRITERIA = judge.CRITERIA
SCHEMA = pa.schema([(name, pa.float64()) for name in CRITERIA])
Scored = list[dict[str, float]]


def columns(
    work: Work, source: Source, asked: Score, *, name: str, out: str, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({criterion: float64[N]}, facts for the funnel: what judging took, or samples with an image that cannot be
    decoded). NaN: the criterion does not apply, or no valid answer came.

    Raises:
        Unfinished: more samples than judge.max_failed are without a valid answer.
    """
    reader = ShardReader(source)  # opens a shard when the judge is shown its pictures
    if asked.judge is None:
        key, rows, counts = digest({"scorer": "statistics", "version": VERSION}), _statistics(work, source), None
    else:
        key = digest({"scorer": judge_facts(asked.judge), "version": VERSION, "seed": seed})
        record = Record(storage.join(out, "data", "answers", "judge", name))
        asking = judge.Scoring(asked.judge, record, seed=seed, field=f"prepare.sources.{name}.curate.score.judge")
        rows, counts = _judged(reader, asking, asked.judge, name), asking.counts
    with contextlib.closing(reader):
        tables = [_column(work, source, shard, key=key, rows=rows, counts=counts, told=name)
                  for shard in range(source.num_shards)]  # fmt: skip
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    found = {criterion: table[criterion].to_numpy() for criterion in CRITERIA}
    if counts is None:
        lost = _undecodable(source, found)
        return found, {"undecodable": lost} if lost else {}
    return found, {"judge": {**counts.as_json(), "failed": int(np.isnan(found["text_quality"]).sum())}}


def _column(
    work: Work, source: Source, shard: int, *, key: str, rows: Any, counts: Counts | None, told: str
) -> pa.Table:
    """A shard's scores. Calls that failed are made again when scores are needed again: with a hole nothing is
    stored, and the record gives what was answered."""
    before = counts.unanswered if counts else 0
    return work.column(
        source, shard, kind="score", key=key, rows=rows, schema=SCHEMA, told=told,
        whole=lambda: counts is None or counts.unanswered == before,
    )  # fmt: skip


def _undecodable(source: Source, found: dict[str, np.ndarray]) -> int:
    """Samples with images whose scores do not count them."""
    images = [source.index(shard)["num_images"].to_numpy() for shard in range(source.num_shards)]
    return int((np.isnan(found["information_balance"]) & (np.concatenate([np.zeros(0), *images]) > 0)).sum())


def _statistics(work: Work, source: Source) -> Any:
    def rows(texts: list[str], shard: int, block: list[int]) -> Scored:
        asked = [json.dumps({"uri": source.uri, "digest": source.digest, "shard": shard, "row": row}) for row in block]
        return work.map(_statistics_row, asked)

    return rows


def _statistics_row(asked: str) -> tuple[str, list[bytes]]:
    place = json.loads(asked)
    reader = reader_of(place["uri"], place["digest"])
    sample = reader.source.sample(place["shard"], place["row"])
    return json.dumps(statistics.scores(sample, reader.media(place["shard"], place["row"]))), []


def _judged(reader: ShardReader, asking: judge.Scoring, asked: Judge, name: str) -> Any:
    def rows(texts: list[str], shard: int, block: list[int]) -> Scored:
        samples = [from_json(text) for text in texts]
        found = asking.score(samples, lambda number: reader.media(shard, block[number]))
        where, counts = f"prepare.sources.{name}.curate.score.judge", asking.counts
        check_failed([counts], asked, where=where, what="samples", failed=counts.failed, of=reader.source.num_samples)
        return [scores or dict.fromkeys(CRITERIA, math.nan) for scores in found]

    return rows

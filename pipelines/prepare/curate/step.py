"""Curation of the sources that ask for it: columns once, then thresholds, then what each sample is dropped by.

    curate(recipe, out) -> {source: funnel part}

Beside each shard of a curated source lie the columns that were computed (clean-, score-, near_text-, near_image-KEY),
and `kept-KEY`, one word a row: the filter that dropped it, or nothing. curation.json, written last, names the column
that counts now (trainer/data/kept.py reads it). Shards never change; another threshold writes another `kept` column and
nothing else. The held-out part is never curated: evaluation stays what it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.prepare.curate import instructions, near, scores
from pipelines.prepare.curate.asking import judge_facts
from pipelines.prepare.curate.columns import Work
from pipelines.prepare.curate.filters import Verdict, clean_verdicts, score_verdicts, signals_asked
from pipelines.prepare.curate.signals import VERSION as SIGNALS_VERSION
from pipelines.prepare.curate.signals import lists, signals_row
from trainer import storage
from trainer.curation import Clean, Curate, in_order
from trainer.data import kept
from trainer.data.shards import Source
from trainer.fields import identity
from trainer.recipe import Recipe
from trainer.resolve import digest

VERSION = 1
SHOWN = 5
Json = dict[str, Any]


@dataclass
class Curation:
    """One run over all sources of a recipe. `work.computed` says what had to be computed, by kind of column."""

    recipe: Recipe
    out: str
    work: Work
    known: near.Known = field(init=False)

    def __post_init__(self) -> None:
        self.known = near.Known(self.out, self.work)


def curate(recipe: Recipe, out: str, work: Work | None = None) -> dict[str, Json]:
    """Curates every source that says how, one after those that it is compared with.

    Returns:
        {source: {read, kept, dropped, examples}}, with judge where one was asked and, where there are any, the
        number of samples with an image that cannot be decoded (`undecodable`)

    Raises:
        DataError: a list that is not there, a judge without valid answers, or nothing kept of a source.
    """
    run = Curation(recipe, out, work or Work(recipe.prepare.engine))
    found: dict[str, Json] = {}
    asked = {name: source.curate for name, source in recipe.prepare.sources.items()}
    for name in (name for name, curate in asked.items() if curate is None):
        kept.forget(storage.join(out, "data", "sources", name, "train"))
    for name in in_order(asked):
        if (how := asked[name]) is not None:
            found[name] = _source(run, name, how, storage.join(out, "data", "sources", name, "train"))
    return found


def _source(run: Curation, name: str, asked: Curate, folder: str) -> Json:
    began = time.monotonic()
    source = Source.open(folder, keep_indexes=1)
    key = _key(run, name, asked, source)
    stored = kept.facts(folder)
    if stored is not None and stored["key"] == key:
        print(f"curate: {name} is already there ({stored['funnel']['kept']} of {source.num_samples} kept)", flush=True)
        return stored["funnel"]
    state = _State(source)
    if asked.clean is not None:
        state.apply(clean_verdicts(asked.clean, clean_columns(run.work, source, asked.clean, name)))
    if asked.score is not None:
        columns, facts = scores.columns(run.work, source, asked.score, name=name, out=run.out, seed=run.recipe.seed)
        state.facts |= facts
        state.apply(score_verdicts(asked.score, columns))
    labelled = None
    if asked.instructions is not None:
        labelled = instructions.columns(
            run.work, source, asked.instructions, name=name, out=run.out, seed=run.recipe.seed
        )
        state.facts |= labelled.facts
        state.apply(instructions.verdicts(asked.instructions, labelled.columns))
    for part in ("decontaminate", "dedup"):
        if (same := getattr(asked, part)) is not None:
            state.apply(run.known.verdicts(part, name, same, state.alive))
            if same.image is not None and (lost := near.undecodable(run.work, source, name)):
                state.facts["undecodable"] = lost
    if labelled is not None:
        state.facts["domains"] = instructions.label_counts(labelled.columns, state.alive)
    funnel = state.write(key)
    told = ", ".join(f"{count} {reason}" for reason, count in funnel["dropped"].items()) or "none"
    took = time.monotonic() - began
    print(f"curate: {name} kept {funnel['kept']} of {funnel['read']}, dropped {told} ({took:.1f} s)", flush=True)
    return funnel


def _key(run: Curation, name: str, asked: Curate, source: Source) -> str:
    """Digest of everything that the decision depends on: thresholds, shards, lists, and the sources compared with."""
    files = {}
    if asked.clean is not None:
        known = lists(asked.clean.blocked_words, asked.clean.blocked_urls)
        files = {"words": sorted(known.blocked_words), "urls": sorted(known.blocked_urls), "lines": known.boilerplate}
    others: Json = {}
    for other in asked.decontaminate.against if asked.decontaminate else []:
        others[f"{other}/held_out"] = Source.open(storage.join(run.out, "data", "sources", other, "held_out")).digest
    for other in asked.dedup.against if asked.dedup else []:
        folder = storage.join(run.out, "data", "sources", other, "train")
        others[f"{other}/train"] = [Source.open(folder).digest, kept.digest_of(folder)]
    versions = [VERSION, SIGNALS_VERSION, scores.VERSION, near.VERSION]
    judge = asked.score.judge if asked.score else None
    content = identity(asked)
    if judge is not None:  # how it is asked, not what: another address or speed gives the same answers
        content["score"]["judge"] = judge_facts(judge)
    if asked.instructions is not None:
        content["instructions"] = instructions.key_of(asked.instructions)
    return digest({"versions": versions, "curate": content, "source": source.digest, "files": files, "others": others})


def clean_columns(work: Work, source: Source, clean: Clean, name: str) -> dict[str, np.ndarray]:
    """Those signals of every sample of a source that the thresholds are about, in order of shard and row; with the
    images' documents where asked. All of them are stored, 50 numbers a sample, but not held."""
    known = lists(clean.blocked_words, clean.blocked_urls)
    key = digest(
        {
            "version": SIGNALS_VERSION,
            "lists": [sorted(known.blocked_words), sorted(known.blocked_urls), known.boilerplate],
        }
    )

    def row(text: str) -> tuple[str, list[bytes]]:
        return signals_row(text, words=clean.blocked_words, urls=clean.blocked_urls)

    asked = [signal for signal in signals_asked(clean) if signal in SIGNALS_SCHEMA.names]
    tables = [
        work.column(
            source, shard, kind="clean", key=key, schema=SIGNALS_SCHEMA, told=name,
            rows=lambda texts, _shard, _rows: work.map(row, texts),
        ).select(asked)
        for shard in range(source.num_shards)
    ]  # fmt: skip
    table = pa.concat_tables(tables) if tables else SIGNALS_SCHEMA.empty_table().select(asked)
    found = {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}
    if clean.max_documents_of_image is not None:
        found["documents_of_image"] = near.documents_of_image(work, source)
    return found


def _signals_schema() -> pa.Schema:
    from pipelines.prepare.curate.signals import DUPLICATE_NGRAMS, TOP_NGRAMS

    plain = (
        "language_probability", "characters", "words", "mean_word_length", "symbol_ratio", "bullet_lines",
        "ellipsis_lines", "alphabetic_words", "stop_words", "sentences", "terminal_lines", "boilerplate_lines",
        "placeholder_text", "braces", "blocked_words", "duplicate_lines", "duplicate_line_characters",
        "duplicate_paragraphs", "duplicate_paragraph_characters", *(f"top_ngram_{n}" for n in TOP_NGRAMS),
        *(f"duplicate_ngram_{n}" for n in DUPLICATE_NGRAMS), "blocked_urls", "images", "image_min_side",
        "image_max_side", "image_aspect", "repeated_images",
    )  # fmt: skip
    return pa.schema([("language", pa.string()), *((name, pa.float64()) for name in plain)])


SIGNALS_SCHEMA = _signals_schema()


class _State:
    """Which samples are still there, and what dropped the others."""

    def __init__(self, source: Source):
        self.source = source
        self.reason = np.full(source.num_samples, "", dtype=object)
        self.dropped: dict[str, int] = {}
        self.examples: dict[str, list[Json]] = {}
        self.kept_examples: list[str] = []
        self.facts: Json = {}
        self.ends = np.cumsum([shard["num_samples"] for shard in source.manifest["shards"]])

    @property
    def alive(self) -> np.ndarray:
        return self.reason == ""

    def apply(self, verdicts: Any) -> None:
        for verdict in verdicts:
            self._one(verdict)

    def _one(self, verdict: Verdict) -> None:
        rows = np.flatnonzero(verdict.dropped & self.alive)
        self.dropped[verdict.name] = int(rows.size)
        self.reason[rows] = verdict.name
        self.examples[verdict.name] = [
            {"id": self._id(row), "value": _plain(verdict.values[row]), "threshold": verdict.threshold}
            for row in rows[:SHOWN].tolist()
        ]

    def _id(self, row: int) -> str:
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return self.source.sample_id(shard, row - int(self.ends[shard - 1] if shard else 0))

    def write(self, key: str) -> Json:
        """The kept columns, then curation.json."""
        alive = self.alive
        funnel = {
            "read": self.source.num_samples,
            "kept": int(alive.sum()),
            "dropped": self.dropped,
            "examples": {name: shown for name, shown in self.examples.items() if shown},
            "kept_examples": [self._id(row) for row in np.flatnonzero(alive)[:SHOWN].tolist()],
            **self.facts,
        }
        kept.write(self.source, self.reason, key=key, funnel=funnel)
        return funnel


def _plain(value: Any) -> Any:
    return round(float(value), 4) if isinstance(value, int | float | np.number) else str(value)

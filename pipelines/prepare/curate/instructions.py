"""Conversations by the two stages of the Qwen2.5-VL report (section 2.3.2): a domain of each, then rules and scores
with thresholds of each domain. Three kinds of columns beside the shards, each computed once:

    domain-KEY     domain, sub_domain        by words, or by a judge
    answers-KEY    repetition, incomplete, malformed, harmful_words    of the worst answer, or how many
    quality-KEY    six criteria 0..1, where a judge is stated

A threshold is compared with them and computes nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.prepare.curate import answer_rules, conversation_judge, domain_rules
from pipelines.prepare.curate.asking import Asking, check_failed, judge_facts
from pipelines.prepare.curate.columns import Work
from pipelines.prepare.curate.conversation_judge import CRITERIA, Label, Qualities
from pipelines.prepare.curate.conversations import answers_of
from pipelines.prepare.curate.filters import Verdict
from pipelines.prepare.curate.record import Record
from pipelines.prepare.curate.signals import lines_of, shipped
from trainer import storage
from trainer.curation import Instructions, Judge, Limits
from trainer.data.sample import Sample, from_json
from trainer.data.shards import ShardReader, Source
from trainer.domains import sub_domains
from trainer.errors import DataError
from trainer.fields import identity
from trainer.resolve import digest

VERSION = [1, answer_rules.VERSION, domain_rules.VERSION, conversation_judge.VERSION]
RULES = ("repetition", "incomplete", "malformed", "harmful_words")
UNLABELLED = "unlabelled"
"""Domain and sub-domain of a sample that the judge gave no valid answer about; `limits` hold for it."""
LABELS = pa.schema([("domain", pa.string()), ("sub_domain", pa.string())])
ANSWERS = pa.schema([(name, pa.float64()) for name in RULES])
QUALITY = pa.schema([(name, pa.float64()) for name in CRITERIA])
Json = dict[str, Any]


class Found(NamedTuple):
    """Of N samples, in order of shard and row."""

    columns: dict[str, np.ndarray]
    """domain and sub_domain: str[N]; rules and criteria: float64[N], NaN: does not apply, or no valid answer came."""
    facts: Json
    """For the funnel: what judging took."""


def columns(work: Work, source: Source, asked: Instructions, *, name: str, out: str, seed: int) -> Found:
    """
    Raises:
        DataError: the list of words cannot be read; the judge does not answer, or not validly for more than
        judge.max_failed of the samples.
    """
    words = asked.harmful_words
    rules_key = digest({"version": answer_rules.VERSION, "words": sorted(harmful_list(words))})
    rows = _mapped(work, lambda text: _rules_row(text, words))
    tables = [_table(work, source, "answers", rules_key, rows, ANSWERS, name)]
    facts: Json = {}
    judging = _Judging(asked.judge, source, name, out, seed) if asked.judge is not None else None
    if judging is not None and asked.classify == "judge":
        tables.append(judging.table(work, "domain", conversation_judge.label_prompt(), LABELS))
        facts["domain_judge"] = judging.facts.pop("domain")
    else:
        key = digest({"version": domain_rules.VERSION, "domains": sub_domains()})
        tables.append(_table(work, source, "domain", key, _mapped(work, _label_row), LABELS, name))
    if judging is not None:
        tables.append(judging.table(work, "quality", conversation_judge.QUALITY_PROMPT, QUALITY))
        facts["quality_judge"] = judging.facts.pop("quality")
    found = {column: table[column].to_numpy(zero_copy_only=False) for table in tables for column in table.column_names}
    return Found(found, facts)


@lru_cache(maxsize=8)
def harmful_list(uri: str | None) -> frozenset[str]:
    """Raises DataError: the recipe's list is not there or is no text."""
    if uri is None:
        return frozenset(shipped("harmful_words.txt"))
    try:
        return frozenset(lines_of(storage.read_bytes(uri).decode("utf-8-sig")))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        do = "check the path in instructions.harmful_words: a UTF-8 file with one entry a line"
        raise DataError("a list cannot be read", where=uri, got=f"{type(error).__name__}: {error}", do=do) from None


def rules_of(sample: Sample, listed: frozenset[str]) -> dict[str, float]:
    texts = answers_of(sample)
    return {
        "repetition": max(map(answer_rules.repetition, texts), default=0.0),
        "incomplete": float(sum(map(answer_rules.is_incomplete, texts))),
        "malformed": float(sum(map(answer_rules.malformed, texts))),
        "harmful_words": float(sum(answer_rules.harmful_words(text, listed) for text in texts)),
    }


def _rules_row(text: str, words: str | None) -> tuple[str, list[bytes]]:
    return json.dumps(rules_of(from_json(text), harmful_list(words))), []


def _label_row(text: str) -> tuple[str, list[bytes]]:
    domain, sub_domain = domain_rules.classify(from_json(text))
    return json.dumps({"domain": domain, "sub_domain": sub_domain}), []


def _mapped(work: Work, row: Callable[[str], tuple[str, list[bytes]]]) -> Callable[..., list[Json]]:
    return lambda texts, _shard, _rows: work.map(row, texts)


def _table(
    work: Work,
    source: Source,
    kind: str,
    key: str,
    rows: Callable[..., list[Json]],
    schema: pa.Schema,
    told: str,
    whole: Callable[[], bool] = lambda: True,
) -> pa.Table:
    tables = [
        work.column(source, shard, kind=kind, key=key, rows=rows, schema=schema, told=told, whole=whole)
        for shard in range(source.num_shards)
    ]
    return pa.concat_tables(tables) if tables else schema.empty_table()


class _Judging:
    """One judge on one source, asked two kinds of questions into one record."""

    def __init__(self, judge: Judge, source: Source, name: str, out: str, seed: int):
        self.judge, self.source, self.name, self.seed = judge, source, name, seed
        self.where = f"prepare.sources.{name}.curate.instructions.judge"
        self.record = Record(storage.join(out, "data", "answers", "judge", name))
        self.facts: dict[str, Json] = {}

    def table(self, work: Work, kind: str, prompt: str, schema: pa.Schema) -> pa.Table:
        parse = conversation_judge.parse_label if kind == "domain" else conversation_judge.parse_qualities
        asking: Asking = Asking(self.judge, self.record, parse, seed=self.seed, field=self.where)
        version = conversation_judge.VERSION
        key = digest({"judge": judge_facts(self.judge), "version": version, "prompt": prompt, "seed": self.seed})
        before = 0

        def whole() -> bool:  # a shard with a call that failed is not stored: it is made again
            nonlocal before
            complete, before = asking.counts.unanswered == before, asking.counts.unanswered
            return complete

        with contextlib.closing(ShardReader(self.source)) as reader:
            rows = partial(self._rows, kind, prompt, asking, reader)
            found = _table(work, self.source, kind, key, rows, schema, self.name, whole)
        self.facts[kind] = asking.counts.as_json()
        return found

    def _rows(
        self, kind: str, prompt: str, asking: Asking, reader: ShardReader, texts: list[str], shard: int, rows: list[int]
    ) -> list[Json]:
        samples = [from_json(text) for text in texts]
        requests = [
            conversation_judge.request(sample, partial(reader.media, shard, row), prompt, self.judge)
            for sample, row in zip(samples, rows, strict=True)
        ]
        answers = asking.answers(requests)
        counts, of = asking.counts, self.source.num_samples
        check_failed([counts], self.judge, where=self.where, what="samples", failed=counts.failed, of=of)
        return [_judged(kind, sample, valid) for sample, valid in zip(samples, answers, strict=True)]


def _judged(kind: str, sample: Sample, valid: Sequence[Any]) -> Json:
    if kind == "domain":
        labels: list[Label] = list(valid)
        label = conversation_judge.label_of(labels)
        return label.model_dump() if label else {"domain": UNLABELLED, "sub_domain": UNLABELLED}
    qualities: list[Qualities] = list(valid)
    return dict(conversation_judge.scores_of(sample, qualities) or dict.fromkeys(CRITERIA, math.nan))


# ---------------------------------------------------------------- thresholds


def verdicts(asked: Instructions, found: Mapping[str, np.ndarray]) -> Iterator[Verdict]:
    """Rules, then criteria. The threshold of a sample is that of its sub-domain, else of its domain, else of all."""
    limits = _limits_of(asked)
    for name in RULES:
        field = f"max_{name}"
        yield from _one(f"instructions.{field}", name, lambda one, f=field: getattr(one, f), limits, found, False)
    for criterion in CRITERIA:
        for side in ("min", "max"):
            yield from _one(
                f"instructions.{side}.{criterion}",
                criterion,
                lambda one, s=side, c=criterion: getattr(one, s).get(c),
                limits,
                found,
                side == "min",
            )


def _limits_of(asked: Instructions) -> dict[str, Limits]:
    """{sub-domain: its limits}; "" has those of every other sample."""
    found = {"": asked.limits}
    for one in sub_domains():
        limits = asked.limits
        for name in (one.domain, one.name):
            if (over := asked.of_domain.get(name)) is not None:
                stated = {field: getattr(over, field) for field in over.model_fields_set - {"min", "max"}}
                sides = {side: {**getattr(limits, side), **getattr(over, side)} for side in ("min", "max")}
                limits = limits.model_copy(update={**stated, **sides})
        found[one.name] = limits
    return found


def _one(
    name: str,
    column: str,
    limit_of: Callable[[Limits], float | None],
    limits: Mapping[str, Limits],
    found: Mapping[str, np.ndarray],
    at_least: bool,
) -> Iterator[Verdict]:
    stated = {key: limit for key, one in limits.items() if (limit := limit_of(one)) is not None}
    if not stated:
        return
    common = stated.get("", math.nan)
    threshold = np.array([stated.get(key, common) for key in found["sub_domain"].tolist()], np.float64)
    for key in set(limits) - set(stated):  # a sub-domain whose own section says null
        threshold[found["sub_domain"] == key] = math.nan
    values = found[column].astype(np.float64)
    with np.errstate(invalid="ignore"):
        dropped = values < threshold if at_least else values > threshold
    word = "at least" if at_least else "at most"
    others = sorted({(limit, key) for key, limit in stated.items() if key and limit != common})
    told = [f"{word} {common:g}"] if not math.isnan(common) else []
    told += [f"{limit:g} of {key}" for limit, key in others[:4]] + (["..."] if len(others) > 4 else [])
    yield Verdict(name, dropped, values, ", ".join(told))


def label_counts(found: Mapping[str, np.ndarray], alive: np.ndarray) -> dict[str, dict[str, Json]]:
    """{domain: {sub-domain: {read, kept}}}, in the order of names."""
    pairs = list(zip(found["domain"].tolist(), found["sub_domain"].tolist(), strict=True))
    read, kept = Counter(pairs), Counter(pair for pair, stays in zip(pairs, alive.tolist(), strict=True) if stays)
    counts: dict[str, dict[str, Json]] = {}
    for domain, sub_domain in sorted(read):
        pair = (domain, sub_domain)
        counts.setdefault(domain, {})[sub_domain] = {"read": read[pair], "kept": kept[pair]}
    return counts


def key_of(asked: Instructions) -> Json:
    """What the decision depends on: not where the judge is or how fast it is asked."""
    content = identity(asked)
    if asked.judge is not None:
        content["judge"] = judge_facts(asked.judge)
    words = sorted(harmful_list(asked.harmful_words))
    return {"asked": content, "version": VERSION, "words": words, "domains": sub_domains()}

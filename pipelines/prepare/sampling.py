"""Rejection sampling (sft) and preference pairs (dpo) from a model's own answers to tasks with a known answer.

    make_requests(recipe, "sft", out)     OUT/prepare-sft/requests.jsonl      tasks of this run's training shards
    ... trainer/after/generate.py or an endpoint writes OUT/prepare-sft/answers/
    select_answers(recipe, "sft", out)    OUT/data/sources/sampled-sft/train, OUT/prepare-sft/selection.json

    python -m pipelines.prepare requests|select --recipe tiny --stage sft --out DIR

sft keeps correct answers, dpo pairs a correct with an incorrect one. What the answers are compared with is the key that
a sample carries. Everything is chosen by hashes of names: the same answers give the same shards.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipelines.prepare import answer_checks, resumable
from pipelines.prepare.curate import answer_rules
from pipelines.prepare.curate.asking import judge_facts
from pipelines.prepare.formats.answers import answer_parts
from pipelines.prepare.formats.rows import BadRow
from pipelines.prepare.ingest import source_uri
from pipelines.prepare.resumable import ResumableShards
from pipelines.prepare.stage import sampled_name
from trainer import storage
from trainer.after import answers as table
from trainer.after.answers import Answer, Place, Request
from trainer.after.final import steps_of
from trainer.after.prompts import frame_of, paired
from trainer.after.scores import Frame, score
from trainer.curation import Checks
from trainer.data import kept
from trainer.data.layout import Drop, Rules, fit_sample, rules_of
from trainer.data.objects import TaggedObjects, read_tagged
from trainer.data.order import id_hash, mix
from trainer.data.sample import Message, Sample, from_json
from trainer.data.shards import ShardReader, Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, UsageError
from trainer.fields import identity
from trainer.models.config import family_of, tokenizer_uri
from trainer.recipe import Recipe, Sampling, Stage
from trainer.resolve import digest

VERSION = 5
SPATIAL = ("box", "point")
Answers = dict[str, list[Answer]]


def folder_of(stage: str, out: str) -> str:
    return storage.join(out, f"prepare-{stage}")


def _sampling(recipe: Recipe, stage: str) -> tuple[Stage, Sampling]:
    config = recipe.stages.named().get(stage)
    if config is None or config.sampling is None:
        raise UsageError(
            "the stage samples no answers", where=f"stages.{stage}.sampling", do="add the section, or skip"
        )
    return config, config.sampling


# ---------------------------------------------------------------- requests


def make_requests(recipe: Recipe, stage: str, out: str) -> list[Request]:
    """Write requests.jsonl: `sampling.requests` tasks, drawn by hash over all sources named in `sampling.tasks`.

    Raises:
        DataError: when no sample of the tasks carries a key.
    """
    _, sampling = _sampling(recipe, stage)
    uri = storage.join(folder_of(stage, out), "requests.jsonl")
    drawn: list[tuple[int, Request]] = []
    for name in sampling.tasks:
        source = Source.open(source_uri(out, name, "train"), keep_indexes=1)
        drawn += [(_rank(recipe.seed, stage, name, request), request) for request in _tasks(source, name)]
    if not drawn:
        raise DataError(
            "no task has a known answer",
            where=f"stages.{stage}.sampling.tasks: {', '.join(sampling.tasks)}",
            expected='samples with "key": {"task": ..., "value": ...}',
            got="none",
        )
    drawn.sort(key=lambda pair: (pair[0], pair[1].id))
    requests = [request for _, request in drawn[: sampling.requests]]
    table.write_requests(uri, requests)
    tasks = Counter(request.sample.key.task for request in requests if request.sample.key)
    counts = ", ".join(f"{count} {task}" for task, count in sorted(tasks.items()))
    print(f"requests: {stage} {len(requests)} of {len(drawn)} tasks ({counts})", flush=True)
    return requests


def _rank(seed: int, stage: str, name: str, request: Request) -> int:
    return int(mix(seed, id_hash("requests", stage), id_hash(name, request.sample.id)))


def _tasks(source: Source, name: str) -> Iterator[Request]:
    for shard in range(source.num_shards):
        texts = source.index(shard)["sample_json"]
        for row in kept.rows(source, shard).tolist():
            sample = from_json(texts[row].as_py())
            if sample.key is None:
                continue
            place = Place(source=f"data/sources/{name}/train", shard=shard, row=row)
            yield Request(id=f"{name}/{sample.id}", sample=sample, place=place)


# ---------------------------------------------------------------- select


@dataclass
class Selection:
    """What became of the answers; the counts of selection.json. `unreadable`: one whose places or tags cannot be read,
    so that it cannot be written again. `refused`: correct, and failed a check (`of_check` says which); `undecided`:
    LaTeX that took too long to compare, incorrect."""

    requests: int = 0
    answers: int = 0
    correct: int = 0
    incorrect: int = 0
    errors: int = 0
    unfinished: int = 0
    repeated: int = 0
    refused: int = 0
    unreadable: int = 0
    undecided: int = 0
    kept: int = 0
    of_check: Counter[str] = field(default_factory=Counter)
    of_task: dict[str, Counter[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        counts = {name: value for name, value in vars(self).items() if name not in ("of_task", "of_check")}
        return {
            **counts,
            "of_check": dict(sorted(self.of_check.items())),
            "of_task": {name: dict(sorted(count.items())) for name, count in sorted(self.of_task.items())},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Selection:
        of_task = {name: Counter(count) for name, count in content["of_task"].items()}
        return cls(**{**content, "of_check": Counter(content["of_check"]), "of_task": of_task})


@dataclass(frozen=True)
class Judged:
    answer: Answer
    correct: bool
    message: Message


def select_answers(recipe: Recipe, stage: str, out: str) -> dict[str, Any]:
    """Score every answer with its task's key and write the source sampled-STAGE; returns selection.json's content.

    Raises:
        DataError: answers are missing, or were made for other requests.
    """
    config, sampling = _sampling(recipe, stage)
    folder, target = folder_of(stage, out), source_uri(out, sampled_name(stage), "train")
    requests = table.read_requests(storage.join(folder, "requests.jsonl"))
    found = table.read_answers(storage.join(folder, "answers"), requests)
    key = _key(recipe, config, requests, found)
    report = storage.join(folder, "selection.json")
    if (stored := resumable.stored(target, key)) is not None:
        print(f"select: {stage} is already there", flush=True)
        return _reported(stored, target, report)
    rules = rules_of(config, "chat", family_of(recipe, out), Tokenizer.load(tokenizer_uri(recipe, out)))
    checking = _checking(recipe, stage, out, requests, found, rules)
    made = ResumableShards(target, key=key, shard_bytes=recipe.prepare.shard_bytes)
    counts = Selection(requests=len(requests)) if made.counts is None else Selection.from_json(made.counts)
    readers: dict[str, ShardReader] = {}
    make = _pairs if stage == "dpo" else _correct
    with made, contextlib.ExitStack() as open_readers:
        for request in requests[made.num_items :]:
            before = json.dumps(counts.as_json())
            judged = _judge(request, found[request.id], rules, counts, checking)
            samples = list(make(request, judged, sampled_name(stage), sampling.keep))
            place = request.place
            if place.source not in readers:
                readers[place.source] = ShardReader(storage.join(out, place.source))
                open_readers.callback(readers[place.source].close)
            files = readers[place.source].media(place.shard, place.row) if samples else []
            made.add([(sample, files) for sample in samples], counts=partial(json.loads, before))
            counts.kept += len(samples)
            if samples:
                _of_task(counts, request)["kept"] += len(samples)
        models = sorted({answer.model for answers in found.values() for answer in answers})
        content = {"format": 1, "stage": stage, "models": models, **counts.as_json()}
        content |= {"steps_judge": checking.facts} if checking.facts else {}
        made.finish(content, source=sampled_name(stage), split="train")
    print(
        f"select: {stage} {counts.kept} {'pairs' if stage == 'dpo' else 'answers'} kept of {counts.answers} "
        f"({counts.correct} correct, {counts.incorrect} incorrect, {counts.unfinished} unfinished, "
        f"{counts.refused} refused by checks, {counts.unreadable} unreadable, {counts.errors} errors)",
        flush=True,
    )
    return _reported(content, target, report)


def _reported(counts: dict[str, Any], target: str, report: str) -> dict[str, Any]:
    """Writes selection.json, unless it says so already."""
    content = {**counts, "source_digest": Source.open(target).digest}
    if not storage.exists(report) or storage.read_json(report) != content:
        storage.write_json(report, content)
    return content


def _key(recipe: Recipe, config: Stage, requests: list[Request], found: dict[str, list[Answer]]) -> str:
    return digest(
        {
            "version": VERSION,
            "requests": [request.model_dump(mode="json") for request in requests],
            "answers": {name: [vars(answer) for answer in answers] for name, answers in found.items()},
            "keep": config.sampling.keep if config.sampling else 0,
            "checks": _checks_facts(config.sampling),
            "pixels": identity(config.pixels),
            "shard_bytes": recipe.prepare.shard_bytes,
        }
    )


def _checks_facts(sampling: Sampling | None) -> dict[str, Any] | None:
    if sampling is None or sampling.checks is None:
        return None
    content = {**identity(sampling.checks), "version": [answer_checks.VERSION, answer_rules.VERSION]}
    if sampling.checks.judge is not None:  # how it is asked, not what
        content["judge"] = judge_facts(sampling.checks.judge)
    return content


def _of_task(counts: Selection, request: Request) -> Counter[str]:
    assert request.sample.key is not None
    return counts.of_task.setdefault(request.sample.key.task, Counter())


@dataclass(frozen=True)
class Checking:
    """The checks of a recipe, and what a judge said of the steps: {(request, answer): share}, for the answers that it
    was asked about."""

    checks: Checks | None = None
    with_image: dict[tuple[str, int], float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def problem(self, request: Request, answer: Answer) -> str | None:
        if self.checks is None:
            return None
        judged = self.checks.judge is not None  # one that it was not asked about has no picture, or no steps
        share = self.with_image.get((answer.request, answer.answer), math.nan) if judged else None
        return answer_checks.problem(self.checks, request.sample, answer.text, share)


def _checking(recipe: Recipe, stage: str, out: str, requests: list[Request], found: Answers, rules: Rules) -> Checking:
    """Asks the judge, where the recipe states one, about the steps of all correct answers that pass the other checks:
    many at a time, before any is selected."""
    _, sampling = _sampling(recipe, stage)
    checks = sampling.checks
    if checks is None or checks.judge is None:
        return Checking(checks)
    readers: dict[str, ShardReader] = {}

    def files(place: Place) -> list[bytes]:
        if place.source not in readers:
            readers[place.source] = ShardReader(storage.join(out, place.source))
        return readers[place.source].media(place.shard, place.row)

    others = checks.model_copy(update={"min_steps_with_image": None})
    asked = {}
    for request in requests:
        key, frame = request.sample.key, _frame(request, rules)
        if key is None or frame is None:  # no picture that steps could use
            continue
        for answer in found[request.id]:
            right = answer.finish == "stop" and score(key, answer.text, frame)["correct"] >= 1
            if right and steps_of(answer.text) and answer_checks.problem(others, request.sample, answer.text) is None:
                name = f"{answer.request}#{answer.answer}"
                place = request.place
                asked[answer.request, answer.answer] = answer_checks.Asked(
                    name, request.sample, answer.text, partial(files, place)
                )
    try:
        record, where = storage.join(folder_of(stage, out), "judge"), f"stages.{stage}.sampling.checks.judge"
        shares, facts = answer_checks.judged_steps(
            list(asked.values()), checks.judge, record=record, seed=recipe.seed, where=where
        )
    finally:
        for reader in readers.values():
            reader.close()
    return Checking(checks, dict(zip(asked, shares, strict=True)), facts)


def _judge(request: Request, found: list[Answer], rules: Rules, counts: Selection, checking: Checking) -> list[Judged]:
    """Answers without errors and repetitions that can be written again, in order, with what the key says of them. A
    correct text that did not come to its end, or failed a check, is neither: it teaches to go on, or what the check
    is there against."""
    assert request.sample.key is not None
    frame = _frame(request, rules)
    if frame is None and request.sample.key.task in SPATIAL:
        raise DataError("a place without a picture", where=f"request {request.id}", expected="an image that fits")
    seen: set[str] = set()
    judged = []
    for answer in found:
        counts.answers += 1
        of_task = _of_task(counts, request)
        of_task["answers"] += 1
        if answer.finish == "error":
            counts.errors += 1
            continue
        figures = score(request.sample.key, answer.text, frame)
        correct = figures["correct"] >= 1
        counts.undecided += int(figures.get("undecided", 0))
        if correct and answer.finish != "stop":
            counts.unfinished += 1
            continue
        counts.correct += correct
        counts.incorrect += not correct
        of_task["correct"] += correct
        if (text := " ".join(answer.text.lower().split())) in seen or not text:
            counts.repeated += 1
            continue
        seen.add(text)
        if correct and (failed := checking.problem(request, answer)) is not None:
            counts.refused += 1
            counts.of_check[failed] += 1
            of_task["refused"] += 1
            continue
        if (message := _message(request, answer, correct, frame, rules)) is None:
            counts.unreadable += 1
            of_task["unreadable"] += 1
            continue
        judged.append(Judged(answer, correct, message))
    return judged


def _frame(request: Request, rules: Rules) -> Frame | None:
    """How coordinates in an answer map to pixels of the sample's first picture; None for what has no picture."""
    sample = request.sample
    if not sample.media or sample.media[0].kind != "image":
        return None
    fitted = fit_sample(paired(sample), request.variant, rules)  # as the prompt was laid out when it was asked
    return None if isinstance(fitted, Drop) else frame_of(sample, fitted.layout, rules)


def _message(request: Request, answer: Answer, correct: bool, frame: Frame | None, rules: Rules) -> Message | None:
    """The answer as an assistant message. Written coordinates become geometry in pixels of the original, so that the
    sample is right at any resolution, and tags become objects, so that they are the family's tokens again.

    None when a correct place cannot be read (a wrong answer may then stay as text), or when a special token would be
    left among the words: it would teach to spell its name.
    """
    sample = request.sample
    assert sample.key is not None
    spatial, text = sample.key.task in SPATIAL, answer.text.strip()
    parts: list[dict[str, Any]] = [{"part": "text", "text": text}]
    if len(sample.media) == 1 and frame is not None:
        tagged = read_tagged(text)
        whole = [part["part"] for part in tagged] == ["objects"]
        if (spatial and whole) or isinstance(rules.family.objects, TaggedObjects):
            parts = tagged
        if spatial and not any(part["part"] == "objects" for part in parts):
            with contextlib.suppress(BadRow):  # objects with fields that no sample holds: no place is read
                parts = answer_parts(text)
    found = [thing["at"] for part in parts if part["part"] == "objects" for thing in part["objects"]]
    if spatial and correct and not found:
        return None
    for at in found:
        assert frame is not None
        if at["shape"] == "point":
            at["xy"] = list(frame.to_original(*at["xy"]))
        else:
            at["xyxy"] = [*frame.to_original(*at["xyxy"][:2]), *frame.to_original(*at["xyxy"][2:])]
    words = "".join(part["text"] for part in parts if part["part"] == "text")
    if any(token in words for token in rules.family.special_tokens):
        return None
    return Message.model_validate({"role": "assistant", "parts": parts})


def _correct(request: Request, judged: list[Judged], source: str, keep: int) -> Iterator[Sample]:
    """The first `keep` correct answers, each as an instruction sample."""
    kept = 0
    for item in judged:
        if not item.correct or kept == keep:
            continue
        kept += 1
        messages = (*table.prompt_of(request.sample), item.message)
        yield _sample(request, source, f"{item.answer.answer}", item.answer, messages=messages)


def _pairs(request: Request, judged: list[Judged], source: str, keep: int) -> Iterator[Sample]:
    """Up to `keep` pairs: the n-th correct answer with the n-th incorrect one, so that no answer is in two pairs."""
    right = [item for item in judged if item.correct]
    wrong = [item for item in judged if not item.correct]
    for better, worse in list(zip(right, wrong, strict=False))[:keep]:
        yield _sample(
            request,
            source,
            f"{better.answer.answer}-{worse.answer.answer}",
            better.answer,
            messages=table.prompt_of(request.sample),
            chosen=(better.message,),
            rejected=(worse.message,),
        )


def _sample(request: Request, source: str, suffix: str, answer: Answer, **parts: tuple[Message, ...]) -> Sample:
    """The request's sample with other answers. Fields are given again, so that the whole is validated."""
    content = request.sample.model_dump(exclude={"messages", "chosen", "rejected", "meta", "scores"})
    written = {name: [message.model_dump() for message in messages] for name, messages in parts.items()}
    content |= {
        "id": f"{request.id}#{suffix}",
        "source": source,
        "kind": "preference" if parts.get("chosen") else "instruction",
        "meta": {"request": request.id, "model": answer.model},
    }
    return Sample.model_validate(json.loads(json.dumps({**content, **written})))

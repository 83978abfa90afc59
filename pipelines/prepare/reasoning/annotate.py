"""People write or correct the reasoning of steps: what there is goes out as JSON Lines and a page, what they wrote
comes back into new shards, under the filters that the judge's words pass.

    export(source, folder, samples=25, first=0) -> facts      steps.jsonl, index.html
    take(source, "answers.jsonl", out, replace=False) -> funnel

A line: {"sample", "step" (from 0), "digest", "reasoning"}; further fields are for people and not read. `digest` is of
what the reasoning is about (query, calls with their places, screenshots), so words never land on another step. An empty
`reasoning` is no answer, null takes the words away, and words that stand there already change nothing; so the same
answers taken twice give the same samples. What curation has dropped goes neither out nor into the new shards.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.prepare.formats.rows import Bad, json_entries
from pipelines.prepare.grounding.annotated import samples_of
from pipelines.prepare.reasoning.annotate_page import write_page
from pipelines.prepare.reasoning.filters import problem, tidy
from pipelines.prepare.reasoning.steps import Step, steps_of, with_reasoning
from pipelines.prepare.resumable import ResumableShards, stored
from trainer import storage
from trainer.data import kept
from trainer.data.sample import Sample
from trainer.data.shards import MANIFEST, ShardReader, Source
from trainer.errors import DataError, UsageError
from trainer.reasoning import Filters
from trainer.resolve import digest

VERSION = 1
"""Raised when the same answers give other samples than before."""
STEPS, PAGE = "steps.jsonl", "index.html"
SHOWN = 10
"""Answers that cannot be taken, in the error."""
SHARD_BYTES = 256 * 2**20
Json = dict[str, Any]


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    sample: str
    step: Annotated[int, Field(ge=0, strict=True)]
    digest: str
    reasoning: str | None


def filters_of(source: Source) -> Filters:
    """Those that the shards were made with; the usual ones where they say none."""
    return Filters.model_validate((source.manifest.get("reasoning") or {}).get("filters") or {})


# ---------------------------------------------------------------- out


def export(source: Source, folder: str, *, samples: int, first: int = 0) -> Json:
    """`samples` trajectories from the `first` on (counted from 0) as FOLDER/steps.jsonl and FOLDER/index.html.

    Raises:
        UsageError: no trajectories there, or FOLDER has steps already, which somebody may have written on.
    """
    target = Path(folder)
    if (target / STEPS).exists():
        raise UsageError("there are steps already, which may have been written on", where=str(target / STEPS),
                         expected="a folder without them", do="choose another --out")  # fmt: skip
    chosen, num_found = [], 0
    for place in (place for place in samples_of(source) if steps_of(place[2])):
        chosen += [place] if first <= num_found < first + samples else []
        num_found += 1
    if not chosen:
        raise UsageError("no trajectories to write about", where=source.uri, expected=f"some from number {first} on",
                         got=f"{num_found} of {source.num_samples} samples have steps")  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    lines = [line for _, _, sample in chosen for line in lines_of(sample)]
    reader = ShardReader(source)
    try:
        pages = ((sample, list(reader.media(shard, row)), lines_of(sample)) for shard, row, sample in chosen)
        write_page(pages, str(target / PAGE), filters_of(source))
    finally:
        reader.close()
    (target / STEPS).write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), "utf-8")
    empty = sum(not line["reasoning"] for line in lines)
    return {"trajectories": len(chosen), "of": num_found, "steps": len(lines), "without reasoning": empty}


def lines_of(sample: Sample) -> list[Json]:
    by = writers_of(sample, steps_of(sample))
    return [
        {
            "sample": sample.id, "step": step.number, "digest": step.digest_in(sample), "reasoning": step.reasoning,
            "query": step.query, "call": step.calls, "by": by[step.number],
        }
        for step in steps_of(sample)
    ]  # fmt: skip


def writers_of(sample: Sample, steps: list[Step]) -> list[str]:
    """Who wrote the words of each step."""
    named = sample.meta.get("reasoning")
    if isinstance(named, list) and len(named) == len(steps):
        return [str(name) for name in named]
    return ["source" if step.reasoning else "" for step in steps]


# ---------------------------------------------------------------- back


@dataclass
class Taken:
    """What became of answers and steps, and the words that are written."""

    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    """Sample -> step -> words."""
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[Bad] = field(default_factory=list)

    def funnel(self, answers: int, trajectories: int) -> Json:
        refused = Counter(one.reason for one in self.bad)
        shown = [f"{one.where}: {one.reason}: expected {one.expected}, got {one.got}" for one in self.bad[:SHOWN]]
        made = {"trajectories": trajectories, **dict(sorted(self.counts.items()))}
        counts = {"read": answers, "kept": answers - len(self.bad), "bad": dict(sorted(refused.items()))}
        return {**counts, "examples": shown, "made": made}


def take(source: Source, answers: str, out: str, *, replace: bool = False, max_bad_fraction: float = 0.0) -> Json:
    """New shards with the words of the answers; returns the funnel, which counts answers.

    Raises:
        DataError: more answers than max_bad_fraction that cannot be taken, each with its line; nothing is written.
        UsageError: shards of another input are there and not to be replaced.
    """
    started = time.monotonic()
    filters = filters_of(source)
    taken = Taken()
    found, read = _answers(answers, taken)
    trajectories = 0
    for _, _, sample in samples_of(source):
        steps = steps_of(sample)
        trajectories += bool(steps)
        _decide(sample, steps, found, filters, taken)
    for (identity, number), (where, _) in found.items():
        _refuse(taken, where, "unknown-step", "a step of these shards", f"sample {identity!r}, step {number}")
    funnel = taken.funnel(read, trajectories)
    _check(taken, read, max_bad_fraction, answers)
    facts = {name: value for name, value in source.manifest.items() if name in ("source", "split", "reasoning")}
    key = digest(
        {"version": VERSION, "from": kept.data_digest(source), "filters": filters.model_dump(), "texts": _plain(taken)}
    )
    if stored(out, key) is not None:
        print(f"annotate: {out} is already there", flush=True)
        return funnel  # of these answers: other ones that gave the same words may have been refused
    if not replace and storage.exists(storage.join(out, MANIFEST)):
        do = "choose another --out, or say --replace"
        raise UsageError("shards of another input are there", where=out, expected="none, or of this input", do=do)
    _write(source, taken, ResumableShards(out, key=key, shard_bytes=SHARD_BYTES), funnel, facts)
    print(f"annotate: {out} is written ({time.monotonic() - started:.1f} s)", flush=True)
    return funnel


Found = dict[tuple[str, int], tuple[str, Answer]]
"""(sample, step) -> where its answer stands, and the answer."""


def _answers(path: str, taken: Taken) -> tuple[Found, int]:
    """Every answer by its step, and how many lines there are."""
    found: Found = {}
    read = 0
    for where, entry in json_entries(path):
        read += 1
        if isinstance(entry, Bad):
            taken.bad.append(entry)
            continue
        try:
            answer = Answer.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            _refuse(taken, where, "wrong-form", 'an object {"sample", "step", "digest", "reasoning"}', got)
            continue
        place = (answer.sample, answer.step)
        if place not in found:
            found[place] = (where, answer)
        elif found[place][1] == answer:
            taken.counts["answers for the second time"] += 1
        else:
            _refuse(taken, where, "second-answer", "one answer a step", f"another one in {found[place][0]}")
    return found, read


def _refuse(taken: Taken, where: str, reason: str, expected: str, got: str) -> None:
    taken.bad.append(Bad(where, expected, got[:300], reason))


def _decide(sample: Sample, steps: list[Step], found: Found, filters: Filters, taken: Taken) -> None:
    """Takes the sample's answers out of `found`, step after step: later ones are compared with what stands before."""
    standing: list[str] = []
    for step in steps:
        taken.counts["steps"] += 1
        where, answer = found.pop((sample.id, step.number), ("", None))
        text = _words(sample, step, where, answer, standing, filters, taken) if answer else None
        if answer is None or (text is None and answer.reasoning is not None and not tidy(answer.reasoning)):
            taken.counts["steps not answered"] += 1
        if text is not None:
            taken.texts.setdefault(sample.id, {})[step.number] = text
        if stands := step.reasoning if text is None else text:
            standing.append(stands)
        else:
            taken.counts["steps without reasoning"] += 1


def _words(
    sample: Sample, step: Step, where: str, answer: Answer, earlier: list[str], filters: Filters, taken: Taken
) -> str | None:
    """What is written into the step; None where it stays as it is."""
    if answer.digest != step.digest_in(sample):
        _refuse(taken, where, "other-step", f"an answer about step {step.number} as it is: {step.calls}",
                "a digest of something else; export the steps again")  # fmt: skip
        return None
    text = "" if answer.reasoning is None else tidy(answer.reasoning)
    if answer.reasoning is None and step.reasoning:
        taken.counts["steps whose words were taken away"] += 1
        return ""
    if not text:
        return None
    if text == tidy(step.reasoning):
        taken.counts["steps unchanged"] += 1
        return None
    if (refused := problem(text, step, earlier, filters)) is not None:
        reason, told = refused
        _refuse(taken, where, reason, f"words that pass the filter {reason}", f"{told}: {text[:160]!r}")
        return None
    taken.counts["steps written"] += 1
    return text


def _check(taken: Taken, read: int, most: float, path: str) -> None:
    if len(taken.bad) <= most * read and read:
        return
    listed = [f"{one.where}: {one.reason}: expected {one.expected}, got {one.got}" for one in taken.bad]
    more = [f"... and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    shown = "\n    ".join([*listed[:SHOWN], *more])
    raise DataError(
        "answers that cannot be taken" if read else "a file without answers",
        where=path,
        expected=f"at most {most:.2%} of the answers refused",
        got=f"{len(taken.bad)} of {read}\n    {shown}" if read else "no line",
        do="repair these lines, or let a share of them pass with --max-bad-fraction; nothing was written",
    )


def _plain(taken: Taken) -> list[Any]:
    return sorted([name, sorted(steps.items())] for name, steps in taken.texts.items())


def _write(source: Source, taken: Taken, made: ResumableShards, funnel: Json, facts: Json) -> None:
    reader = ShardReader(source)
    try:
        for number, (shard, row, sample) in enumerate(samples_of(source)):
            if number < made.num_items:
                continue
            made.add([(_written(sample, taken.texts.get(sample.id)), reader.media(shard, row))], counts=dict)
        made.finish(funnel, **facts)
    except BaseException:
        made.stop()
        raise
    finally:
        reader.close()


def _written(sample: Sample, texts: dict[int, str] | None) -> Sample:
    if not texts:
        return sample
    by = writers_of(sample, steps_of(sample))
    for number, text in texts.items():
        by[number] = "person" if text else ""
    return with_reasoning(sample, texts).model_copy(update={"meta": {**sample.meta, "reasoning": by}})

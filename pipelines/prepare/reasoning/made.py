"""Sources of the format `reasoning`: the trajectories of another source with a reasoning for every step, from a judge
(trainer/reasoning.py has the settings). Called by prepare_data after that source is there and curated.

    make(recipe, out, name) -> {split: {read, kept, bad, examples, made, judge}}

`read` and `kept` count trajectories, `bad` those that are left out; `made` counts steps and refused answers by what
became of them; `judge` is what asking took. Answers are recorded below OUT/data/answers/reasoning/NAME: given these,
the same shards come out, and a killed run asks only what is missing. meta.reasoning of a sample names for every step
who wrote its words: `judge MODEL`, `source`, or nothing where there are none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import Any

from pipelines.prepare.curate.asking import Asking, Request, check_failed, judge_facts
from pipelines.prepare.curate.record import Record
from pipelines.prepare.engine import blocks
from pipelines.prepare.grounding.annotated import samples_of
from pipelines.prepare.ingest import splits_of
from pipelines.prepare.reasoning import explain
from pipelines.prepare.reasoning.explain import Agreement, Reasoned
from pipelines.prepare.reasoning.filters import problem, tidy
from pipelines.prepare.reasoning.steps import Step, cut_before, steps_of, with_reasoning
from pipelines.prepare.resumable import ResumableShards, stored
from pipelines.prepare.tally import Tally
from trainer import storage
from trainer.data import kept
from trainer.data.sample import Sample
from trainer.data.shards import ShardReader, Source
from trainer.errors import DataError
from trainer.fields import identity
from trainer.grounding import origin_of
from trainer.reasoning import Filters, Reasoning
from trainer.recipe import Recipe
from trainer.resolve import digest

VERSION = 1
"""Raised when the same answers give other samples than before."""
BLOCK_SAMPLES = 8
"""Trajectories that are asked about together."""
Json = dict[str, Any]
Place = tuple[int, int, Sample]
"""Shard, row and sample."""


def make(recipe: Recipe, out: str, name: str) -> dict[str, Json]:
    """All splits of one source.

    Raises:
        Unfinished: the judge does not answer, or too many steps are without a valid answer. DataError: nothing is left.
    """
    splits = splits_of(recipe.prepare.sources[name])
    return {split: _split(recipe, out, name, split, str(origin_of(path))) for split, path in splits}


def _split(recipe: Recipe, out: str, name: str, split: str, origin: str) -> Json:
    started = time.monotonic()
    asked = recipe.prepare.sources[name].reasoning
    assert asked is not None
    source = Source.open(storage.join(out, "data", "sources", origin, split), keep_indexes=2)
    settings = {**identity(asked), "judge": judge_facts(asked.judge)}
    about = {"name": name, "split": split, "seed": recipe.seed, "settings": settings, "from": kept.data_digest(source)}
    key = digest({"version": [VERSION, explain.VERSION], **about})
    target = storage.join(out, "data", "sources", name, split)
    if (found := stored(target, key)) is not None:
        print(f"reasoning: {name}/{split} is already there ({found['kept']} trajectories)", flush=True)
        return found
    made = ResumableShards(target, key=key, shard_bytes=recipe.prepare.shard_bytes)
    tally = Tally.from_json(made.counts)
    if made.num_items:
        print(f"reasoning: {name}/{split} goes on after {tally.read} trajectories, in whole shards already", flush=True)
    with made, contextlib.closing(Writer(asked, recipe, out, name, source)) as writer:
        _write(writer, made, tally, f"{name}/{split}")
        funnel = {**tally.as_json(), "judge": writer.facts()}
        if not tally.kept:
            raise DataError("no trajectory is left", where=f"prepare.sources.{name} ({split})", expected="at least one",
                            got=", ".join(f"{count} {what}" for what, count in tally.bad.items()) or "none read",
                            do="look at the counts; filtered: bare keeps steps without reasoning")  # fmt: skip
        made.finish(funnel, source=name, split=split, reasoning={"filters": asked.filters.model_dump(mode="json")})
    told = ", ".join(f"{count:,} {what}" for what, count in sorted(tally.made.items()))
    print(
        f"reasoning: {name}/{split} {tally.kept} trajectories ({told}; {time.monotonic() - started:.1f} s)", flush=True
    )
    return funnel


def _write(writer: Writer, made: ResumableShards, tally: Tally, told: str) -> None:
    last = time.monotonic()
    for block in blocks(islice(samples_of(writer.source), made.num_items, None), BLOCK_SAMPLES):
        answers = writer.ask(block)
        writer.check_failed(tally, answers)  # before any of them is written: what is in a whole shard stays
        for place, texts in zip(block, answers, strict=True):
            before = tally.as_json()
            found = writer.reasoned(place[2], texts, tally)
            files = writer.files(place)[: len(found.media)] if found is not None else []
            made.add([] if found is None else [(found, files)], counts=lambda counts=before: counts)
            tally.read += 1
            tally.kept += found is not None
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"reasoning: {told} {tally.read} trajectories, {tally.made['steps']} steps", flush=True)


Answers = dict[int, list[Reasoned]]
"""Number of a step that was asked about -> its valid answers, in the order of their seeds."""


class Writer:
    """One judge on the trajectories of one source."""

    def __init__(self, asked: Reasoning, recipe: Recipe, out: str, name: str, source: Source):
        self.asked, self.name, self.source = asked, name, source
        self.kind = recipe.prepare.sources[name].kind
        at = f"prepare.sources.{name}.reasoning.judge"
        record = Record(storage.join(out, "data", "answers", "reasoning", name))
        self.why = Asking(asked.judge, record, explain.parse_reasoned, seed=recipe.seed, field=at)
        self.checking = Asking(asked.judge, record, explain.parse_agreement, seed=recipe.seed, field=at)
        self.num_steps = sum(len(self._open(steps_of(sample))) for _, _, sample in samples_of(source))
        self._reader = ShardReader(source)
        self._files: tuple[tuple[int, int], list[bytes]] | None = None
        self._agreement: dict[tuple[str, int, str], float] = {}

    def _open(self, steps: Sequence[Step]) -> list[Step]:
        """Steps that the judge is asked about."""
        return [step for step in steps if not step.reasoning or self.asked.existing == "replace"]

    def close(self) -> None:
        self._reader.close()

    def files(self, place: Place) -> list[bytes]:
        """Of one trajectory; the last one's stay in memory, as each of its steps needs them."""
        if self._files is None or self._files[0] != place[:2]:
            self._files = (place[:2], self._reader.media(place[0], place[1]))
        return self._files[1]

    def ask(self, block: Sequence[Place]) -> list[Answers]:
        """Of each trajectory the valid answers of its steps; with min_agreement every one that passes the other filters
        is put to the judge again."""
        listed = [(at, step) for at, place in enumerate(block) for step in self._open(steps_of(place[2]))]
        existing = self.asked.existing == "replace"
        requests = [
            explain.why(block[at][2], step, self._later(block[at]), self.asked.judge, existing=existing)
            for at, step in listed
        ]
        found: list[Answers] = [{} for _ in block]
        for (at, step), valid in zip(listed, self.why.answers(requests), strict=True):
            found[at][step.number] = valid
        if self.asked.min_agreement is not None:
            self._check(block, [(at, step, found[at][step.number]) for at, step in listed])
        return found

    def _later(self, place: Place) -> explain.Files:
        return lambda: self.files(place)

    def _check(self, block: Sequence[Place], listed: Sequence[tuple[int, Step, list[Reasoned]]]) -> None:
        wanted: list[tuple[tuple[str, int, str], Request]] = []
        for at, step, valid in listed:
            for text in dict.fromkeys(tidy(one.reasoning) for one in valid):
                if problem(text, step, (), self.asked.filters) is None:
                    sample = block[at][2]
                    request = explain.check(sample, step, self._later(block[at]), self.asked.judge, text)
                    wanted.append(((sample.id, step.number, text), request))
        answers: list[list[Agreement]] = self.checking.answers([request for _, request in wanted])
        self._agreement = {
            place: median(one.agreement for one in given) / explain.BEST
            for (place, _), given in zip(wanted, answers, strict=True)
            if given
        }

    def reasoned(self, sample: Sample, answers: Answers, tally: Tally) -> Sample | None:
        """The trajectory with what passed; None where it is left out. Samples without steps stay as they are."""
        steps = steps_of(sample)
        texts: dict[int, str] = {}
        by: list[str] = []
        for step in steps:
            tally.made["steps"] += 1
            text = step.reasoning
            if step.number not in answers:
                tally.made["steps with words of the source"] += 1
                by.append("source")
            elif (
                chosen := self._chosen(sample, step, answers[step.number], by_now(steps, texts, step), tally)
            ) is None:
                tally.made["steps without reasoning"] += 1
                if self.asked.filtered != "bare":
                    return self._short(sample, step, texts, by, tally)
                by.append("")
                text = ""
            else:
                tally.made["steps reasoned"] += 1
                by.append(f"judge {self.why.model}")
                text = chosen
            texts[step.number] = text
        if not steps:
            tally.made["samples that are no trajectory"] += 1
        return self._own(with_reasoning(sample, texts), by)

    def _chosen(
        self, sample: Sample, step: Step, valid: Sequence[Reasoned], earlier: Sequence[str], tally: Tally
    ) -> str | None:
        """The first answer that passes all filters; the others are counted."""
        if not valid:
            tally.made["steps without a valid answer"] += 1
        for one in valid:
            text = tidy(one.reasoning)
            refused = self._refused(sample, step, one, text, earlier)
            if refused is None:
                return text
            tally.refuse(f"{sample.id}, step {step.number + 1}", *refused, text)
        return None

    def _refused(
        self, sample: Sample, step: Step, one: Reasoned, text: str, earlier: Sequence[str]
    ) -> tuple[str, str] | None:
        filters: Filters = self.asked.filters
        names = [action.action for action in step.actions]
        if filters.consistent and one.action.strip().split(" ")[0].casefold() not in names:
            return "inconsistent", f"explains {one.action[:40]!r}, the action is {' and '.join(names)}"
        if (found := problem(text, step, earlier, filters)) is not None:
            return found
        if self.asked.min_agreement is None:
            return None
        agreement = self._agreement.get((sample.id, step.number, text))
        if agreement is None or agreement < self.asked.min_agreement:
            return "disagreement", "no valid answer" if agreement is None else f"{agreement:.2f}"
        return None

    def _short(self, sample: Sample, step: Step, texts: dict[int, str], by: list[str], tally: Tally) -> Sample | None:
        """What is left of a trajectory one of whose steps has no reasoning."""
        left = cut_before(sample, step) if self.asked.filtered == "cut" else None
        if left is None:
            tally.bad["step-without-reasoning"] += 1
            return None
        tally.made["trajectories cut short"] += 1
        return self._own(with_reasoning(left, texts), by)

    def _own(self, sample: Sample, by: list[str]) -> Sample:
        meta = {**sample.meta, "reasoning": by} if by else sample.meta
        return sample.model_copy(update={"source": self.name, "kind": self.kind, "meta": meta})

    def check_failed(self, tally: Tally, answers: Sequence[Answers]) -> None:
        """Raises Unfinished: more steps than judge.max_failed are without a valid answer."""
        failed = sum(not valid for of_sample in answers for valid in of_sample.values())
        check_failed(
            [self.why.counts, self.checking.counts],
            self.asked.judge,
            where=f"prepare.sources.{self.name}.reasoning.judge",
            what="steps",
            failed=tally.made["steps without a valid answer"] + failed,
            of=self.num_steps,
        )

    def facts(self) -> Json:
        """What asking took in this run."""
        why, checking = self.why.counts.as_json(), self.checking.counts.as_json()
        return {name: why[name] + checking[name] for name in why}


def by_now(steps: Sequence[Step], texts: dict[int, str], step: Step) -> list[str]:
    """The reasoning of the steps before, as it will stand."""
    return [text for one in steps[: step.number] if (text := texts.get(one.number, one.reasoning))]

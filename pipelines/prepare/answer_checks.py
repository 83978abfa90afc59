"""What a sampled answer must be besides correct (`sampling.checks`): not too long, not repetitive, in one language, and
with steps that use the picture. Report, section 2.3.2: code-switching, excessive length and repetition are taken out,
and intermediate steps that neglect or misread the picture are what rejection sampling of VLMs suffers from.

Rules see scripts, not languages: French inside English is no code-switching to them. They see words for looking and for
places, not whether what is said is true; a judge reads the steps and the picture (`steps: judge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import regex
from pydantic import BaseModel, ConfigDict, Field

from pipelines.prepare.curate.answer_rules import FENCED, repetition
from pipelines.prepare.curate.asking import Asking, Request, check_failed, first_of
from pipelines.prepare.curate.content import words_of
from pipelines.prepare.curate.conversations import media_kinds, shown, text_of_part
from pipelines.prepare.curate.record import Record
from trainer.after.answers import prompt_of
from trainer.after.final import answered, steps_of
from trainer.curation import Checks, Judge
from trainer.data.sample import Message, Sample, Text
from trainer.resolve import digest

VERSION = 1
SCRIPTS = (
    "Latin", "Han", "Hiragana", "Katakana", "Hangul", "Cyrillic", "Arabic", "Hebrew", "Thai", "Devanagari", "Bengali",
    "Tamil", "Telugu", "Georgian", "Armenian", "Khmer", "Lao", "Myanmar", "Ethiopic",
)  # fmt: skip
"""Greek is left out: its letters are signs of mathematics everywhere."""
JAPANESE = frozenset(("Han", "Hiragana", "Katakana"))
NO_LANGUAGE = regex.compile(r"`[^`\n]*`|\$\$?[^$]*\$\$?|\\[A-Za-z]+|<[^<>\n]*>|https?://\S+")
LOOKING = regex.compile(
    r"\b(?:images?|pictures?|photos?|photographs?|figures?|diagrams?|charts?|graphs?|plots?|screenshots?|frames?|scenes?"
    r"|shown|shows?|showing|visible|see|seen|saw|looks?|looking|appears?|depicts?|depicted|displayed|drawn|labell?ed"
    r"|left|right|top|bottom|upper|lower|cent(?:er|re)|middle|corner|background|foreground|above|below|beside|behind"
    r"|next to|in front of|axis|axes|legend|bars?|slice|curve|rows?|columns?|header|sign|caption|reads|written"
    r"|colou?red|black|blue|brown|gr[ae]y|green|orange|pink|purple|red|white|yellow|bbox_2d|point_2d)\b"
    r"|[图画]|左|右|上方|下方|中间|背景|看到|可见|显示|颜色|标签|坐标|写着|如所示",
    regex.IGNORECASE,
)
STEPS_PROMPT = """You judge how a vision-language model reasoned. Below are a picture, a question, and an answer with
steps. Count the steps of the reasoning before the final answer, and among them those that rest on what the picture
shows: a step that names something seen and is right about it. A step that could be written without the picture, or
that misreads it, is not counted among them.
Answer with one JSON object and nothing else:
{"steps": 0, "steps_with_image": 0}"""


def problem(checks: Checks, sample: Sample, text: str, with_image: float | None = None) -> str | None:
    """The first check that an answer fails, by its name in the recipe. `with_image`: the judge's share of the steps,
    where it was asked; NaN: it gave no valid answer, and the answer stays."""
    if checks.max_words is not None and len(words_of(text)) > checks.max_words:
        return "max_words"
    if checks.max_repetition is not None and repetition(text) > checks.max_repetition:
        return "max_repetition"
    if checks.max_code_switching is not None and code_switching(sample, text) > checks.max_code_switching:
        return "max_code_switching"
    if checks.min_steps_with_image is not None:
        share = steps_with_image(sample, text) if with_image is None else with_image
        if share < checks.min_steps_with_image:  # not so for NaN
            return "min_steps_with_image"
    return None


# ---------------------------------------------------------------- code-switching


def code_switching(sample: Sample, text: str) -> float:
    """Share 0..1 of an answer's letters in scripts that neither what it was asked nor the known answer uses. Code,
    formulas, tags, addresses and the words that mark the final answer are no language. 0 where the question has no
    letters."""
    known = "\n".join(text_of_part(part) for message in prompt_of(sample) for part in message.parts)
    if sample.key is not None:
        known += f"\n{sample.key.value}"
    allowed = set(_letters(known))
    if not allowed:
        return 0.0
    if allowed & {"Hiragana", "Katakana"}:
        allowed |= JAPANESE
    reasoning, final = answered(text)
    counts = _letters(NO_LANGUAGE.sub(" ", FENCED.sub(" ", f"{reasoning}\n{final}")))
    return sum(count for script, count in counts.items() if script not in allowed) / (sum(counts.values()) or 1)


def _letters(text: str) -> dict[str, int]:
    """{script: number of its letters}, of scripts that occur."""
    return {script: count for script in SCRIPTS if (count := len(_script(script).findall(text)))}


@lru_cache(maxsize=len(SCRIPTS))
def _script(name: str) -> regex.Pattern:
    return regex.compile(rf"\p{{Script={name}}}")


# ---------------------------------------------------------------- steps


def steps_with_image(sample: Sample, text: str) -> float:
    """Share 0..1 of the steps with a word for looking, for a place or a part of a picture, or with the name of
    something that the sample says is in it. NaN without steps or without a picture."""
    steps = steps_of(text)
    if not steps or not media_kinds(sample):
        return math.nan
    named = _named(sample)
    return sum(bool(LOOKING.search(step) or (named and named.search(step))) for step in steps) / len(steps)


def _named(sample: Sample) -> regex.Pattern | None:
    """Labels and contents of the objects that the question comes with."""
    parts = [part for message in prompt_of(sample) for part in message.parts if part.part == "objects"]
    words = {word.strip() for part in parts for thing in part.objects for word in (thing.label, thing.content or "")}
    known = sorted(word for word in words if len(word) > 2)
    return regex.compile(rf"\b(?:{'|'.join(map(regex.escape, known))})\b", regex.IGNORECASE) if known else None


class Steps(BaseModel):
    model_config = ConfigDict(extra="ignore")

    steps: int = Field(ge=0, strict=True)
    steps_with_image: int = Field(ge=0, strict=True)


def parse_steps(text: str) -> Steps | None:
    found = first_of(text, Steps)
    return found if found is not None and found.steps_with_image <= found.steps else None


def _share(valid: Sequence[Steps]) -> float:
    """The median of the answers that found steps; NaN has no order, and would make it depend on theirs."""
    found = [one.steps_with_image / one.steps for one in valid if one.steps]
    return median(found) if found else math.nan


class Asked:
    """One answer that a judge is to read."""

    def __init__(self, name: str, sample: Sample, text: str, files: Callable[[], Sequence[bytes]]):
        self.name, self.sample, self.text, self.files = name, sample, text, files

    def request(self, judge: Judge) -> Request:
        turns = (*prompt_of(self.sample), Message(role="assistant", parts=(Text(text=self.text),)))
        names = ("temperature", "max_tokens", "image_max_pixels", "max_images", "max_characters")
        content = {
            "version": VERSION,
            "prompt": STEPS_PROMPT,
            "document": [turn.model_dump(mode="json") for turn in turns],
            "media": [file.digest for file in self.sample.media],
            "shown": {name: getattr(judge, name) for name in names},
        }
        return Request(digest(content), self.name, lambda: shown(turns, self.files(), STEPS_PROMPT, judge))


def judged_steps(
    asked: Sequence[Asked], judge: Judge, *, record: str, seed: int, where: str
) -> tuple[list[float], dict[str, Any]]:
    """(of each answer the share of its steps that use the picture, what asking took). NaN: no steps, or no valid
    answer of the judge.

    Raises:
        Unfinished: more than judge.max_failed of the answers are without a valid one.
    """
    asking = Asking(judge, Record(record), parse_steps, seed=seed, field=where)
    answers = asking.answers([one.request(judge) for one in asked])
    counts = asking.counts
    check_failed([counts], judge, where=where, what="answers", failed=counts.failed, of=len(asked))
    return [_share(valid) for valid in answers], counts.as_json()

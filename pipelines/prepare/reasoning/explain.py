"""What a judge is asked about a step: why this action (`why`), and whether a reasoning leads to it (`check`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.prepare.curate.asking import Request, first_of, picture_part, smaller
from pipelines.prepare.reasoning.mark import marked
from pipelines.prepare.reasoning.steps import Step
from trainer.curation import Judge
from trainer.data import media as images
from trainer.data.sample import Sample
from trainer.resolve import digest

VERSION = 1
"""Of the prompts and the mark: part of what answers are recorded under."""
BEST = 5
Files = Callable[[], Sequence[bytes]]
"""Reads the files of the sample."""
Json = dict[str, Any]

WHY = """You write down the reasoning of somebody who uses a screen, to teach a model to act on screens.
You get the task, the actions so far, the screenshot before one action with its place marked in magenta (a circle; an
arrow from start to end), the action, and the screenshot after it.
Write the reasoning that leads from the task and the first screenshot to this action: what on the screen matters, what
is still to be done, and why this action is next.
- One to four sentences, in the first person and the present tense, in the language of the task.
- Name elements by their words and where they are on the screen, never by coordinates.
- The screenshot after the action helps you to understand it. Do not tell what it shows.
- Do not mention the mark or the screenshots. Do not repeat the task word by word.
Answer with one JSON object and nothing else, `action` being the name of the action:
{"action": "NAME", "reasoning": "TEXT"}"""

CHECK = f"""You check the reasoning for one action on a screen.
You get the task, the actions so far, the screenshot before the action with its place marked in magenta (a circle; an
arrow from start to end), the action, the screenshot after it, and a reasoning.
Does the reasoning lead to exactly this action, at exactly this place, and is what it says about the screen true? Answer
with a whole number from 0 (it speaks of another action or another element) to {BEST} (it leads to this one).
Answer with one JSON object and nothing else: {{"agreement": 0}}"""


class Reasoned(BaseModel):
    model_config = ConfigDict(extra="ignore")

    action: str
    reasoning: Annotated[str, Field(min_length=1)]


class Agreement(BaseModel):
    model_config = ConfigDict(extra="ignore")

    agreement: Annotated[int, Field(ge=0, le=BEST, strict=True)]


def parse_reasoned(text: str) -> Reasoned | None:
    return first_of(text, Reasoned)


def parse_agreement(text: str) -> Agreement | None:
    return first_of(text, Agreement)


def why(sample: Sample, step: Step, files: Files, judge: Judge, *, existing: bool) -> Request:
    """`existing`: the judge is told what stands before the call already."""
    told = [f"A person described the action: {step.reasoning}"] if existing and step.reasoning else []
    return _request(WHY, sample, step, files, judge, told)


def check(sample: Sample, step: Step, files: Files, judge: Judge, reasoning: str) -> Request:
    return _request(CHECK, sample, step, files, judge, [f"Reasoning: {reasoning}"])


def _request(prompt: str, sample: Sample, step: Step, files: Files, judge: Judge, more: Sequence[str]) -> Request:
    words = _words(step, judge.max_characters)
    shown = [sample.media[number].digest for number in (step.before, step.after) if number is not None]
    places = [action.coordinates for action in step.actions]
    how = {name: getattr(judge, name) for name in ("temperature", "max_tokens", "image_max_pixels")}
    said = {"version": VERSION, "prompt": prompt, "words": words, "more": list(more), "media": shown, "places": places}
    asked = digest({**said, "shown": how})
    name = f"{sample.source}/{sample.id}, step {step.number + 1}"
    return Request(asked, name, lambda: _messages(prompt, sample, step, files(), judge, words, more))


def _words(step: Step, room: int) -> tuple[str, str]:
    """(task and actions so far, the action); of the actions so far the last that fit."""
    action = f"The action: {step.calls}" + (", at the marked place" if step.actions[0].coordinates else "")
    task = f"Task: {step.query[:room]}"
    lines: list[str] = []
    room -= len(task)
    for number in range(len(step.earlier), 0, -1):
        line = f"{number}. {step.earlier[number - 1]}"
        if (room := room - len(line)) < 0:
            lines.append("(earlier ones are left out)")
            break
        lines.append(line)
    return f"{task}\nActions so far:\n" + ("\n".join(reversed(lines)) or "none"), action


def _messages(
    prompt: str,
    sample: Sample,
    step: Step,
    files: Sequence[bytes],
    judge: Judge,
    words: tuple[str, str],
    more: Sequence[str],
) -> list[Json]:
    """Raises MediaError: a screenshot cannot be decoded."""
    size = (sample.media[step.before].width, sample.media[step.before].height)
    before = smaller(images.upright(files[step.before], where=sample.id), judge.image_max_pixels)
    content: list[Json] = [_text(words[0]), _text("The screenshot before the action:")]
    content.append(picture_part(marked(before, size, step.actions), judge))
    content.append(_text("\n".join([words[1], *more])))
    if step.after is None:
        content.append(_text("It was the last action: there is no screenshot after it."))
    else:
        content.append(_text("The screenshot after the action:"))
        content.append(picture_part(images.upright(files[step.after], where=sample.id), judge))
    return [{"role": "system", "content": prompt}, {"role": "user", "content": content}]


def _text(value: str) -> Json:
    return {"type": "text", "text": value}

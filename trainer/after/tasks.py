"""Held-out tasks: what a model is asked, and how right its answers are.

A sample's key is its task. Where it has none the task follows from what it is: a page's HTML, the times in a video's
caption, the place of an agent's last action.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from trainer.after import decode, scores
from trainer.after.decode import Ask
from trainer.after.held_out import VARIANT, Item
from trainer.after.prompts import Prompt, as_document_prompt, as_prompt, frame_of, without_media
from trainer.after.scores import Frame
from trainer.data.sample import Key, Sample
from trainer.errors import DataError
from trainer.models.family import Family

MAX_HTML_TOKENS = 320
MAX_HTML_TASKS = 12
"""Pages are long to write: a dozen of those that are short enough tell how far a model is."""
SECONDS_BETWEEN = re.compile(r"between (\d+(?:\.\d+)?) and (\d+(?:\.\d+)?) seconds")


@dataclass(frozen=True)
class Task:
    item: Item
    key: Key
    prompt: Prompt
    frame: Frame | None
    max_new_tokens: int
    question: str


def tasks_of(items: Sequence[Item], *, max_new_tokens: int) -> list[Task]:
    """Every task of some samples, in their order."""
    found: list[Task] = []
    pages = 0
    for item in items:
        task = _task(item, max_new_tokens)
        if task is not None and task.key.task == "html":
            pages += 1
            task = task if pages <= MAX_HTML_TASKS else None
        if task is not None:
            found.append(task)
    return found


def blindfolded(tasks: Sequence[Task]) -> list[Task]:
    """The same questions in text alone, of tasks that ask something."""
    found = []
    for task in tasks:
        if task.item.rules.rendering != "chat" or not task.item.encoded.grid_thw.size:
            continue
        prompt = as_prompt(without_media(task.item.sample), [], VARIANT, task.item.rules)
        if isinstance(prompt, Prompt):
            found.append(Task(task.item, task.key, prompt, task.frame, task.max_new_tokens, task.question))
    return found


def answer(model: nn.Module, tasks: Sequence[Task], family: Family) -> list[str]:
    """Greedy answers, one a task."""
    if not tasks:
        return []
    texts = [""] * len(tasks)
    for budget in sorted({task.max_new_tokens for task in tasks}):
        members = [index for index, task in enumerate(tasks) if task.max_new_tokens == budget]
        tokenizer, marks = tasks[0].item.rules.tokenizer, tasks[0].item.rules.family.markers
        sampling = decode.Sampling(0, 1, budget, (tokenizer.id(marks.turn_end), tokenizer.id(marks.eos)))
        asks = [Ask(tasks[index].prompt, (0,)) for index in members]
        for index, (one,) in zip(members, decode.complete(model, asks, sampling, family), strict=True):
            texts[index] = tokenizer.decode(list(one.ids))
    return texts


def score(task: Task, text: str) -> dict[str, float]:
    return scores.score(task.key, text, task.frame)


# ---------------------------------------------------------------- one task


def _task(item: Item, max_new_tokens: int) -> Task | None:
    key, media = key_of(item)
    if key is None:
        return None
    if item.rules.rendering == "document":
        prompt = as_document_prompt(item.sample, item.media, VARIANT, item.fit, item.rules)
    else:
        prompt = _chat_prompt(item)
    if prompt is None:
        return None
    frame = frame_of(item.sample, prompt.layout, item.rules, media)
    if key.task in ("box", "point") and frame is None:
        return None
    if key.task == "html":
        if len(item.encoded.label_ids) > MAX_HTML_TOKENS:
            return None
        max_new_tokens = MAX_HTML_TOKENS
        if item.sample.key is None:  # what follows the question is the page as training shows it
            rest = item.encoded.ids[len(prompt.ids) :].tolist()
            key = Key(task="html", value=item.rules.tokenizer.decode(rest, skip_special=True))
    return Task(item, key, prompt, frame, max_new_tokens, question_of(item.sample))


def _chat_prompt(item: Item) -> Prompt | None:
    try:
        found = as_prompt(item.sample, item.media, VARIANT, item.rules)
    except DataError:  # no question before an answer
        return None
    return found if isinstance(found, Prompt) else None


def key_of(item: Item) -> tuple[Key | None, int]:
    """(key, the medium that its coordinates are about)."""
    sample = item.sample
    if sample.key is not None:
        return sample.key, 0
    last = sample.messages[-1].parts if sample.messages else ()
    if sample.kind == "document" and any(part.part == "objects" and part.form == "html" for part in last):
        return Key(task="html", value=""), 0  # told apart from its question when the prompt is known
    if sample.kind == "video":
        text = " ".join(part.text for part in last if part.part == "text")
        if found := SECONDS_BETWEEN.search(text):
            return Key(task="time", value=[float(found.group(1)), float(found.group(2))]), 0
    for part in last:
        if part.part == "action" and "coordinate" in part.coordinates:
            return Key(task="point", value=list(part.coordinates["coordinate"])), part.media
    return None, 0


def question_of(sample: Sample) -> str:
    """What is asked, for people."""
    asked = [message for message in sample.messages if message.role == "user"]
    texts = [part.text for message in asked[-1:] for part in message.parts if part.part == "text"]
    return " ".join(texts).strip()[:400]

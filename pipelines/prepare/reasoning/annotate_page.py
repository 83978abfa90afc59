"""The page on which people write the reasoning of steps: one file, nothing is loaded and nothing is sent. The script
that saves is the only one that its policy lets run."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from pipelines.prepare.preview.draw import picture
from pipelines.prepare.reasoning.steps import Step, steps_of
from trainer.data.sample import Sample
from trainer.errors import MediaError
from trainer.reasoning import Filters

Json = dict[str, Any]
Shown = tuple[Sample, Sequence[bytes], Sequence[Json]]
"""A trajectory, its files, and its lines of steps.jsonl."""


def write_page(trajectories: Iterable[Shown], path: str, filters: Filters) -> None:
    """Writes the page, piece by piece."""
    folder = resources.files("pipelines.prepare.reasoning")
    script = (folder / "annotate.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (resources.files("pipelines.report") / "style.css").read_text(encoding="utf-8")
    style += (resources.files("pipelines.prepare.preview") / "style.css").read_text(encoding="utf-8")
    style += (folder / "annotate.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Reasoning of steps</title>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style></head><body>'
            f"{_bar()}<main><header><h1>Reasoning of steps</h1>{_guide(filters)}</header>"
        )
        for sample, files, lines in trajectories:
            file.write(_trajectory(sample, files, lines))
        file.write(f"</main><script>{script}</script></body></html>\n")


def _bar() -> str:
    return (
        "<nav class='bar-top'><button id='save' type='button'>Save JSONL</button>"
        "<label class='load'>Load JSONL <input id='load' type='file' accept='.jsonl,.json,.txt'></label>"
        "<label><input id='open' type='checkbox'> only steps without words</label>"
        "<span id='count' class='quiet' role='status'></span></nav>"
    )


def _guide(filters: Filters) -> str:
    return (
        "<p class='lead'>For every step: why is this action the next one? Say what on the left screenshot matters and "
        f"what is still to be done, in the first person, in {filters.min_words} to {filters.max_words} words, in the "
        "language of the task. Name elements by their words, not by coordinates. The right screenshot shows what "
        "followed and the red mark where it happened: who will learn from it sees neither, so do not speak of them. "
        "Leave empty what you cannot say; words that stand there already are taken away where you empty their field. "
        "Then save, and give the file to <code>qwenvl data annotate import</code>.</p>"
    )


def _trajectory(sample: Sample, files: Sequence[bytes], lines: Sequence[Json]) -> str:
    steps = steps_of(sample)
    shown = "".join(_step(sample, files, step, line, len(steps)) for step, line in zip(steps, lines, strict=True))
    head = f"<h2>{_text(steps[0].query)}</h2><p class='quiet'>{_text(sample.id)}</p>"
    return f"<section class='walk'>{head}{shown}</section>"


def _step(sample: Sample, files: Sequence[bytes], step: Step, line: Json, count: int) -> str:
    name = f"{sample.id}, step {step.number + 1}"
    placed = any(action.coordinates for action in step.actions)
    shown = _figure(_picture(sample, files, step.before, step), f"before{'; the action is marked' if placed else ''}")
    if step.after is None:
        shown += "<p class='quiet'>The last action: nothing follows.</p>"
    else:
        shown += _figure(_picture(sample, files, step.after), "after")
    by = f"<span class='quiet'>written by {_text(line['by'])}</span>" if line["by"] else ""
    return (
        f"<article class='card step' data-sample='{_text(sample.id)}' data-step='{step.number}' "
        f"data-digest='{line['digest']}'><h3>Step {step.number + 1} of {count} {by}</h3>"
        f"<p class='act'><b>{_text(step.calls)}</b></p><div class='screens'>{shown}</div>"
        f"<textarea rows='3' spellcheck='true' aria-label='Reasoning of {_text(name)}'>{_text(step.reasoning)}"
        "</textarea><p class='quiet words'></p></article>"
    )


def _figure(shown: str, caption: str) -> str:
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _picture(sample: Sample, files: Sequence[bytes], number: int, marked: Step | None = None) -> str:
    actions = list(enumerate(marked.actions)) if marked is not None else []
    try:
        return picture(sample.media[number], files[number], [], actions)
    except MediaError as error:
        return f"<p class='bad'>{_text(error)}</p>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)

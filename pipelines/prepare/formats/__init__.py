"""Readers of public formats, one file a format, all of one shape: read(path, media_root, source) -> rows.

llava         LLaVA and ShareGPT JSON or JSONL: conversations with <image> and <video>
openai        OpenAI chat messages as JSONL (also ms-swift's `messages`), images as paths, URLs or data URIs
coco          COCO detection: boxes and masks
interleaved   OBELICS: `images` and `texts` of one length
layout        pages with boxes of headings, paragraphs, tables, figures
agent         trajectories of screenshots and actions, and where an element is
android_control, aitw, mind2web         traces of these data sets in the one action space (actions.py: what becomes what)
uiautomator, accessibility, web_dom     UI elements of a screen: Android views, desktop trees, pages with their DOM
text          plain text: JSONL with `text`, or text files
preference    pairs of a chosen and a rejected answer: LLaMA-Factory's ranking, or prompt/chosen/rejected
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from pipelines.prepare.corpus.names import corpus_problem
from pipelines.prepare.formats.rows import Reader
from trainer.errors import RecipeError
from trainer.recipe import Source

FORMATS = (
    *("agent", "coco", "interleaved", "layout", "llava", "openai", "preference", "text"),
    *("android_control", "aitw", "mind2web", "uiautomator", "accessibility", "web_dom"),
)
RENDERED = {"interleaved": "document", "text": "document", "preference": "chat"}
"""What a format can only be rendered as; the others go both ways."""


def problems_of_sources(sources: Mapping[str, Source]) -> list[tuple[str, str]]:
    """(field path, message) of everything about the sources that can be known without reading them."""
    problems = []
    for name, source in sources.items():
        at = f"prepare.sources.{name}"
        if (unknown := _unknown(source.format)) is not None:
            problems.append((f"{at}.format", unknown))
            continue
        if (source.format == "preference") != (source.kind == "preference"):
            problems.append((f"{at}.kind", f"{source.kind} does not go with the format {source.format}: "
                             "pairs of answers have the format preference and the kind preference"))  # fmt: skip
        if (only := RENDERED.get(source.format, source.rendering)) != source.rendering:
            problems.append((f"{at}.rendering", f"the format {source.format} needs {only}, got {source.rendering}"))
        for field in ("path", "held_out"):
            if (told := corpus_problem(getattr(source, field))) is not None:
                problems.append((f"{at}.{field}", told))
    return problems


def _unknown(name: str) -> str | None:
    if name in FORMATS:
        return None
    close = get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no such format {name!r}; there is {', '.join(FORMATS)}{hint}"


def reader(name: str, source: str) -> Reader:
    """The reader of a format. Raises RecipeError when there is none of that name."""
    if (unknown := _unknown(name)) is not None:
        raise RecipeError([(f"prepare.sources.{source}.format", unknown)])
    return import_module(f"pipelines.prepare.formats.{name}").read

"""Readers of public formats, one file a format, all of one shape: read(path, media_root, source) -> rows.

llava         LLaVA and ShareGPT JSON or JSONL: conversations with <image> and <video>
openai        OpenAI chat messages as JSONL (also ms-swift's `messages`), images as paths, URLs or data URIs
coco          COCO detection: boxes and masks
interleaved   OBELICS: `images` and `texts` of one length
layout        pages with boxes of headings, paragraphs, tables, figures
agent         trajectories of screenshots and actions, and where an element is
text          plain text: JSONL with `text`, or text files
preference    pairs of a chosen and a rejected answer: LLaMA-Factory's ranking, or prompt/chosen/rejected
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from pipelines.prepare.formats.rows import Reader
from trainer.errors import RecipeError

FORMATS = ("agent", "coco", "interleaved", "layout", "llava", "openai", "preference", "text")


def check_formats(named: Mapping[str, str]) -> None:
    """{source: format}. Raises RecipeError with every source whose format has no reader."""
    problems = []
    for source, name in named.items():
        if name not in FORMATS:
            close = get_close_matches(name, FORMATS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            said = f"no such format {name!r}; there is {', '.join(FORMATS)}{hint}"
            problems.append((f"prepare.sources.{source}.format", said))
    if problems:
        raise RecipeError(problems)


def reader(name: str, source: str) -> Reader:
    """The reader of a format. Raises RecipeError when there is none of that name."""
    check_formats({source: name})
    return import_module(f"pipelines.prepare.formats.{name}").read

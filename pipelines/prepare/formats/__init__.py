"""Readers of public formats, one file a format, all of one shape: read(path, media_root, source) -> rows,
looks(peek) -> by what the reader knows a file (`format: auto`), and the usual KIND and RENDERING.

llava         LLaVA and ShareGPT JSON or JSONL: conversations with <image> and <video>
openai        OpenAI chat messages as JSON or JSONL, images as paths, URLs or data URIs
ms_swift      messages with images, videos and objects: <ref-object>, <bbox>
llama_factory alpaca and sharegpt rows, ranking pairs; dataset_info.json where there is one
qwen_vl       Qwen-VL v1: <img>, <ref>, <box> in thousandths
captions      a picture with its caption, or with question and answer
coco_captions COCO captions: images with their captions
webdataset    tars of pictures and texts by key; the shards of this project
parquet       tables of a hub: pictures in columns, rows of any form above
coco          COCO detection: boxes and masks
refcoco       referring expressions beside COCO's instances
points        pictures, labels and points (PixMo-Points)
interleaved   OBELICS: `images` and `texts` of one length
mmc4          MMC4: `text_list` and `image_info` with the matched sentence
layout        pages with boxes of headings, paragraphs, tables, figures
coco_layout   DocLayNet and alike: boxes in COCO's form, text in the annotations or in cells
hocr          pages of an OCR program
pdf           PDF documents with a text layer
musicxml      scores: a picture of every page and its ABC
activitynet   videos with captions or events and their times
charades_sta  where in a video a sentence happens, a line each
agent         trajectories of screenshots and actions, and where an element is
android_control, aitw, mind2web        traces of these data sets in the one action space (actions.py)
uiautomator, accessibility, web_dom    UI elements of a screen: Android views, desktop trees, pages with their DOM
text          plain text: JSONL with `text`, or text files
preference    pairs of a chosen and a rejected answer: LLaMA-Factory's ranking, or as TRL writes them
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from pipelines.prepare.corpus.names import corpus_problem
from pipelines.prepare.formats.auto import AUTO, recognise
from pipelines.prepare.formats.rows import Reader
from trainer.errors import RecipeError
from trainer.grounding import is_made
from trainer.recipe import Kind, Rendering, Source

FORMATS = (
    *("agent", "coco", "interleaved", "layout", "llava", "openai", "preference", "text"),
    *("captions", "llama_factory", "mmc4", "ms_swift", "parquet", "points", "qwen_vl", "refcoco", "webdataset"),
    *("coco_captions", "coco_layout", "hocr", "pdf", "musicxml", "activitynet", "charades_sta"),
    *("android_control", "aitw", "mind2web", "uiautomator", "accessibility", "web_dom"),
)
RENDERED = {"interleaved": "document", "mmc4": "document", "text": "document", "preference": "chat"}
"""What a format can only be rendered as; the others go both ways."""
PAIRS = ("preference", "llama_factory", "ms_swift", "parquet", "webdataset", AUTO)
"""Formats that may hold pairs of answers; the first one holds nothing else."""


def problems_of_sources(sources: Mapping[str, Source]) -> list[tuple[str, str]]:
    """(field path, message) of everything about the sources that can be known without reading them."""
    problems = []
    for name, source in sources.items():
        at = f"prepare.sources.{name}"
        if is_made(source):  # checked with the recipe: trainer/grounding.py, trainer/reasoning.py
            continue
        if (unknown := _unknown(source.format)) is not None:
            problems.append((f"{at}.format", unknown))
            continue
        if (source.kind == "preference" and source.format not in PAIRS) or source.format == "preference" != source.kind:
            problems.append((f"{at}.kind", f"{source.kind} does not go with the format {source.format}: "
                             f"pairs have the kind preference and a format of {', '.join(PAIRS)}"))  # fmt: skip
        if (only := RENDERED.get(source.format, source.rendering)) != source.rendering:
            problems.append((f"{at}.rendering", f"the format {source.format} needs {only}, got {source.rendering}"))
        for field in ("path", "held_out"):
            if (told := corpus_problem(getattr(source, field))) is not None:
                problems.append((f"{at}.{field}", told))
    return problems


def _unknown(name: str) -> str | None:
    if name in (*FORMATS, AUTO):
        return None
    close = get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no such format {name!r}; there is {', '.join(FORMATS)}, or {AUTO}{hint}"


def reader(name: str, source: str) -> Reader:
    """The reader of a format. Raises RecipeError when there is none of that name."""
    if (unknown := _unknown(name)) is not None:
        raise RecipeError([(f"prepare.sources.{source}.format", unknown)])
    return import_module(f"pipelines.prepare.formats.{name}").read


def format_of(name: str, path: str) -> str:
    """The format of a file: the one named, or with `auto` the one recognised. Raises DataError."""
    return recognise(path, FORMATS)[0] if name == AUTO else name


def usual(name: str, path: str | None = None) -> tuple[Kind, Rendering]:
    """The kind and rendering that sources of a format mostly have. A table of rows that go only one way has theirs,
    where its `path` is known."""
    module = import_module(f"pipelines.prepare.formats.{name}")
    if path is not None and hasattr(module, "form_of") and (form := module.form_of(path)) in RENDERED:
        module = import_module(f"pipelines.prepare.formats.{form}")
    if hasattr(module, "KIND"):
        return module.KIND, module.RENDERING
    return ("document", "document") if name == "layout" else ("agent", "chat")

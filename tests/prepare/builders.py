"""Small recipes and files for the tests of data preparation."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.prepare.corpus.draw import encode_video
from trainer.recipe import Recipe, Source
from trainer.resolve import load_recipe

CORPUS_FILES = {
    "captions": "json",
    "interleaved": "jsonl",
    "grounding": "json",
    "documents": "jsonl",
    "videos": "json",
    "agents": "jsonl",
    "text": "jsonl",
    "instructions": "jsonl",
    "preferences": "jsonl",
}


def small_recipe(*overrides: str) -> Recipe:
    """The tiny recipe on the small corpus."""
    paths = [f"prepare.sources.{name}.path=corpus://small/{name}.{suffix}" for name, suffix in CORPUS_FILES.items()]
    held = [
        f"prepare.sources.{name}.held_out=corpus://small/{name}.held_out.{suffix}"
        for name, suffix in CORPUS_FILES.items()
    ]
    return load_recipe("tiny", [*paths, *held, "prepare.shard_bytes=300000", *overrides])


def a_recipe(source: Source, *overrides: str) -> Recipe:
    """The tiny recipe with one source, called `mine`, in every place."""
    kind = "caption" if source.kind == "preference" else source.kind
    content = source.model_copy(update={"kind": kind}).model_dump_json(exclude_none=True)
    return load_recipe(
        "tiny",
        [
            f"prepare.sources={{mine: {content}}}",
            "model.pretrain.sources={text: [mine], pairs: [mine]}",
            "stages.stage1.data={mine: 1}",
            "stages.stage2=null",
            "stages.stage3=null",
            "stages.sft=null",
            "stages.dpo=null",
            *overrides,
        ],
    )


def a_source(format: str, path: Any = "rows.jsonl", **changes: Any) -> Source:
    kinds = {"coco": "grounding", "interleaved": "interleaved", "layout": "document", "agent": "agent", "text": "text"}
    kinds |= {"llava": "caption", "openai": "instruction", "preference": "preference"}
    rendering = "document" if format in ("llava", "interleaved", "layout", "text") else "chat"
    fields = {"format": format, "path": str(path), "kind": kinds[format], "rendering": rendering, **changes}
    return Source.model_validate(fields)


def a_picture(width: int = 60, height: int = 40, colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


def a_clip(num_frames: int = 8, fps: int = 4) -> bytes:
    return encode_video([Image.new("RGB", (56, 56), (20 * n, 0, 0)) for n in range(num_frames)], fps)


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSONL; a row that is text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def a_caption(number: int = 0, **changes: Any) -> dict:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"picture number {number}"}]
    return {"id": f"c{number}", "image": "red.png", "conversations": turns, **changes}

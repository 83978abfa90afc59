"""Small recipes and files for the tests of data preparation."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import av
from PIL import Image

from pipelines.prepare.corpus.draw import encode_video
from pipelines.prepare.corpus.names import FILES
from trainer.recipe import Recipe, Source
from trainer.resolve import load_recipe


def small_recipe(*overrides: str) -> Recipe:
    """The tiny recipe on the small corpus."""
    paths = [f"prepare.sources.{name}.path=corpus://small/{name}.{suffix}" for name, suffix in FILES.items()]
    held = [
        f"prepare.sources.{name}.held_out=corpus://small/{name}.held_out.{suffix}" for name, suffix in FILES.items()
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
    fields = {
        "format": format,
        "path": str(path),
        "kind": kinds.get(format, "instruction"),
        "rendering": rendering,
        **changes,
    }
    return Source.model_validate(fields)


def a_picture(width: int = 60, height: int = 40, colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


def a_clip(num_frames: int = 8, fps: int = 4, *, table_first: bool = False) -> bytes:
    """Noise, so that a frame takes some bytes; `table_first`: the table of frames before them, as on the web."""
    noise = Random(0)
    frames = [Image.frombytes("L", (56, 56), noise.randbytes(56 * 56)).convert("RGB") for _ in range(num_frames)]
    data = encode_video(frames, fps)
    if not table_first:
        return data
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file, av.open(io.BytesIO(data)) as source:
        with av.open(file.name, "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        return Path(file.name).read_bytes()


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSONL; a row that is text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def a_caption(number: int = 0, **changes: Any) -> dict:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"picture number {number}"}]
    return {"id": f"c{number}", "image": "red.png", "conversations": turns, **changes}

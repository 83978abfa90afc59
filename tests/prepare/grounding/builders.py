"""Small annotated pictures, as arrays, as samples and as prepared sources."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from trainer import storage
from trainer.data.masks import run_lengths
from trainer.data.media import digest_of
from trainer.data.sample import Box, Mask, Media, Object, Point, Sample
from trainer.data.shards import ShardReader, ShardWriter, Source
from trainer.grounding import CopyPaste


def disc(width: int, height: int, x: int, y: int, radius: int) -> np.ndarray:
    """bool[H, W]"""
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def masked(label: str, inside: np.ndarray) -> Object:
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Object(label=label, at=Mask(xyxy=box, rle=run_lengths(inside)))


def boxed(label: str, *xyxy: float) -> Object:
    return Object(label=label, at=Box(xyxy=xyxy))  # type: ignore[arg-type]


def dot(label: str, x: float, y: float) -> Object:
    return Object(label=label, at=Point(xy=(x, y)))


def a_copy_paste(**changes: Any) -> CopyPaste:
    return CopyPaste.model_validate({"samples": 4, "complete": "vocabulary", **changes})


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def a_picture_of(
    name: str, pixels: np.ndarray, *things: Object, split: str = "train", meta: dict[str, Any] | None = None
) -> tuple[Sample, list[bytes]]:
    """A sample as a reader makes it: one question, every object in the answer."""
    data = png(pixels)
    height, width = pixels.shape[:2]
    file = Media(digest=digest_of(data), kind="image", suffix="png", size_bytes=len(data), width=width, height=height)
    part = {"part": "objects", "media": 0, "objects": [thing.model_dump() for thing in things], "form": "json"}
    asked = [{"part": "image", "media": 0}, {"part": "text", "text": "Locate every object."}]
    sample = Sample.model_validate(
        {
            "id": name,
            "source": "mine",
            "kind": "grounding",
            "split": split,
            "messages": [{"role": "user", "parts": asked}, {"role": "assistant", "parts": [part]}],
            "media": [file.model_dump()],
            "meta": meta or {},
        }
    )
    return sample, [data]


def stored(out: str, name: str, made: list[tuple[Sample, list[bytes]]], split: str = "train") -> Source:
    uri = storage.join(out, "data", "sources", name, split)
    writer = ShardWriter(uri, shard_bytes=10**6)
    for sample, files in made:
        writer.add(sample, files)
    writer.close(source=name, split=split)
    return Source.open(uri)


def read_back(uri: str) -> list[tuple[Sample, np.ndarray]]:
    source = Source.open(uri)
    reader = ShardReader(source)
    found = []
    for shard in range(source.num_shards):
        for row in range(source.index(shard).num_rows):
            image = Image.open(io.BytesIO(reader.media(shard, row)[0])).convert("RGB")
            found.append((source.sample(shard, row), np.asarray(image)))
    return found


def objects_in(sample: Sample) -> list[Object]:
    parts = [part for message in sample.messages for part in message.parts if part.part == "objects"]
    return [thing for part in parts for thing in part.objects]


def words_in(sample: Sample, message: int) -> str:
    return "".join(part.text for part in sample.messages[message].parts if part.part == "text")

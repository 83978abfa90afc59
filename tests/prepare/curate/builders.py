"""Small sources on disk for the tests of curation."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pil

from trainer import storage
from trainer.data.sample import Image, Media, Message, Sample, Text
from trainer.data.shards import ShardWriter
from trainer.recipe import Recipe
from trainer.resolve import load_recipe

WORDS = (
    "river", "mountain", "teacher", "window", "garden", "engine", "market", "winter", "school", "letter",
    "bridge", "forest", "doctor", "island", "kitchen", "morning", "village", "picture", "history", "science",
    "music", "summer", "coffee", "family", "friend", "number", "animal", "country", "station", "table",
)  # fmt: skip
LINKS = (
    "the", "of", "and", "that", "have", "with", "near", "before", "after", "behind",
    "under", "without", "beside", "from", "into", "through", "above",
)  # fmt: skip


def prose(seed: int, num_words: int = 120) -> str:
    """Sentences of English words that Gopher's rules keep."""
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < num_words:
        words = [rng.choice(LINKS if place % 2 else WORDS) for place in range(rng.randint(5, 11))]
        found += [words[0].capitalize(), *words[1:], f"{rng.choice(WORDS)}."]
    return " ".join(found)


def a_photo(seed: int, width: int = 200, height: int = 160, kind: str = "PNG", quality: int = 90) -> bytes:
    """Smooth colour patches: a picture of its own for each seed, with low frequencies as photographs have."""
    rng = np.random.default_rng(seed)
    small = Pil.fromarray(rng.integers(0, 255, (7, 9, 3), np.uint8))
    return as_file(small.resize((width, height), Pil.Resampling.BICUBIC), kind, quality)


def as_file(picture: Pil.Image, kind: str = "PNG", quality: int = 90) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return stream.getvalue()


def a_document(
    identity: str,
    text: str = "",
    pictures: Sequence[bytes] = (),
    *,
    source: str = "web",
    split: Any = "train",
    **meta: Any,
) -> tuple[Sample, list[bytes]]:
    """Text, then the pictures."""
    media = []
    for data in pictures:
        width, height = Pil.open(io.BytesIO(data)).size
        kind = "png" if data.startswith(b"\x89PNG") else "jpg"
        media.append(
            Media(
                digest=hashlib.sha256(data).hexdigest(), kind="image", suffix=kind, size_bytes=len(data),
                width=width, height=height, origin=meta.pop("origin", f"{identity}.{kind}"),
            )
        )  # fmt: skip
    parts = [Text(text=text)] * bool(text) + [Image(media=number) for number in range(len(media))]
    message = Message(role="document", parts=tuple(parts))
    sample = Sample(
        id=identity, source=source, kind="interleaved", messages=(message,), media=tuple(media), split=split, meta=meta
    )
    return sample, list(pictures)


def write_source(
    out: Path | str,
    documents: Iterable[tuple[Sample, list[bytes]]],
    *,
    name: str = "web",
    split: str = "train",
    shard_bytes: int = 2**30,
) -> str:
    """A finished source; returns its folder."""
    folder = storage.join(str(out), "data", "sources", name, split)
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for sample, files in documents:
        writer.add(sample, files)
    writer.close(source=name, split=split)
    return folder


def a_recipe(curate: str, **sources: str) -> Recipe:
    """The tiny recipe with the source `web`, curated as the YAML says; `sources` come before it, by name -> YAML of
    their curate section, or null."""

    def section(curated: str) -> str:
        fixed = "format: interleaved, path: a.jsonl, held_out: b.jsonl, kind: interleaved, rendering: document"
        return f"{{{fixed}, curate: {curated}}}"

    named = [f"{name}: {section(one)}" for name, one in {**sources, "web": curate}.items()]
    return load_recipe(
        "tiny",
        [
            f"prepare.sources={{{', '.join(named)}}}",
            "model.pretrain.sources={text: [web], pairs: [web]}",
            "stages.stage1.data={web: 1}",
            *(f"stages.{stage}=null" for stage in ("stage2", "stage3", "sft", "dpo")),
        ],
    )

"""Where one corpus lies and how big it is: the small surroundings that every writer of the corpus gets."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.prepare.corpus.sources import Clip, Icon, Photo, Split, TextFile, of_split


@dataclass(frozen=True)
class Ingredients:
    """Everything that is read from packages, of both splits."""

    photos: list[Photo]
    icons: list[Icon]
    clips: list[Clip]
    texts: list[TextFile]

    def of(self, split: Split) -> Ingredients:
        return Ingredients(*(of_split(items, split) for items in (self.photos, self.icons, self.clips, self.texts)))


@dataclass(frozen=True)
class Folder:
    """A corpus on a local disk; `scale` multiplies the number of samples of every kind."""

    root: Path
    seed: int
    scale: float

    def count(self, full: int, at_least: int = 4) -> int:
        return max(at_least, round(full * self.scale))

    def rng(self, *names: str) -> random.Random:
        return random.Random(f"{self.seed}/{'/'.join(names)}")

    def media(self, name: str, data: bytes) -> str:
        """Write a media file; returns its path relative to the corpus."""
        path = self.root / "media" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"media/{name}"

    def json(self, name: str, split: Split, value: Any) -> None:
        (self.root / file_name(name, split, "json")).write_text(json.dumps(value, ensure_ascii=False, indent=0) + "\n")

    def jsonl(self, name: str, split: Split, rows: Iterable[dict]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (self.root / file_name(name, split, "jsonl")).write_text("\n".join(lines) + "\n")


def file_name(name: str, split: Split, suffix: str) -> str:
    return f"{name}.{suffix}" if split == "train" else f"{name}.held_out.{suffix}"

"""Events of a video with their times: what readers of captioned videos share. Times are seconds from the first frame;
they are written at encode time, in seconds or as hours:minutes:seconds:frame, whichever the variant picks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.prepare.formats.rows import BadRow, message, text
from trainer import storage

LIST = "List the events of this video with their times."
WHEN = 'When does this happen: "{0}"? Give start and end.'
SUFFIXES = ("mp4", "mkv", "webm", "avi", "mov")


@dataclass(frozen=True)
class Event:
    sentence: str
    start_s: float
    end_s: float

    def as_object(self) -> dict:
        if not self.sentence:
            raise BadRow("wrong-form", "a sentence for every event", "none")
        if not (math.isfinite(self.start_s) and math.isfinite(self.end_s) and 0 <= self.start_s < self.end_s):
            raise BadRow("empty-span", "0 <= start < end, in seconds", f"{self.start_s:g} to {self.end_s:g}")
        return {"label": self.sentence, "at": {"shape": "span", "start_s": self.start_s, "end_s": self.end_s}}


def grounding_messages(events: Sequence[Event], *, listed: bool) -> list[dict]:
    """Where each event is, one question each; with `listed` all of them first, in the order of the video."""
    turns: list[dict] = []
    if listed:
        in_order = sorted(events, key=lambda event: (event.start_s, event.end_s))
        turns += [message("user", text(LIST)), _told([event.as_object() for event in in_order], "any")]
    for event in events:
        turns += [
            message("user", text(WHEN.format(event.sentence))),
            _told([{**event.as_object(), "label": ""}], "plain"),
        ]
    turns[0]["parts"].insert(0, {"part": "video", "media": 0})
    return turns


def _told(objects: list[dict], form: str) -> dict:
    return message("assistant", {"part": "objects", "media": 0, "objects": objects, "form": form})


def video_of(name: str, root: str) -> str:
    """The file of a video that annotations only name: NAME with one of SUFFIXES, in small or capital letters, the first
    where there is none."""
    if name.rpartition(".")[2].lower() in SUFFIXES:
        return f"{root.rstrip('/')}/{name}"
    tried = [f"{root.rstrip('/')}/{name}.{suffix}" for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES))]
    return next(filter(storage.exists, tried), tried[0])

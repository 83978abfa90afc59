"""Temporal grounding as Charades-STA (arXiv 1705.02101) writes it: lines of "VIDEO start end##sentence", times in
seconds. Lines of one video are one sample, wherever they stand in the file: where each of its sentences is. Files are
VIDEO.mp4 (mkv, webm, avi, mov) below the media folder. A bad line costs itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from pipelines.prepare.formats.events import Event, grounding_messages, video_of
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import Bad, Draft, MediaRef, Row, guarded, read_text
from trainer.recipe import Source

KIND, RENDERING = "video", "chat"
LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\d+(?:\.\d+)?)\s+(?P<end>\d+(?:\.\d+)?)\s*##\s*(?P<sentence>\S.*)")


def looks(peek: Peek) -> str | None:
    return "lines of VIDEO start end##sentence" if peek.holds == "times" else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        events: list[Event] = entry["events"]
        key = {"task": "time", "value": [events[0].start_s, events[0].end_s]} if len(events) == 1 else None
        media = [MediaRef(video_of(entry["video"], media_root), "video")]
        return Draft(where, entry["video"], grounding_messages(events, listed=False), media, key=key)

    first: dict[str, int] = {}
    events: dict[str, list[Event]] = defaultdict(list)
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line.strip())
        if found is None:
            yield Bad(f"{path}, line {number}", "VIDEO start end##sentence", repr(line[:80]), "wrong-form")
            continue
        event = Event(found["sentence"].strip(), float(found["start"]), float(found["end"]))
        if event.start_s >= event.end_s:
            yield Bad(f"{path}, line {number}", "start < end", f"{found['start']} to {found['end']}", "empty-span")
            continue
        first.setdefault(found["video"], number)
        events[found["video"]].append(event)
    for video, number in first.items():
        yield guarded(f"{path}, line {number}", one, {"video": video, "events": events[video]})

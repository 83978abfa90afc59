"""Videos with events, as ActivityNet Captions (arXiv 1705.00754) and others write them: one object {VIDEO:
{"duration": seconds, "timestamps": [[start, end], ...], "sentences": [...]}}. A video is a sample: all events with
their times (dense captions), then where each of them is (temporal grounding). Files are VIDEO.mp4 (mkv, webm, avi,
mov) below the media folder. A file whose length is not the stated one is another video, and a bad row.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.events import Event, grounding_messages, video_of
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import BadRow, Draft, MediaRef, Row, field_of, guarded, json_document
from trainer.recipe import Source

KIND, RENDERING = "video", "chat"


def looks(peek: Peek) -> str | None:
    if peek.holds != "object":
        return None
    first = next(iter(peek.entries[0].values()), None)
    return (
        "timestamps and sentences by video"
        if isinstance(first, dict) and {"timestamps", "sentences"} <= first.keys()
        else None
    )


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        name, facts = entry["name"], entry["facts"]
        times, sentences = field_of(facts, "timestamps"), field_of(facts, "sentences")
        if not times or len(times) != len(sentences):
            raise BadRow("wrong-form", f"a sentence for each of {len(times)} timestamps, one at least", len(sentences))
        events = [
            Event(" ".join(sentence.split()), float(start), float(end))
            for (start, end), sentence in zip(times, sentences, strict=True)
        ]
        messages = grounding_messages(events, listed=True)
        meta = {"stated_duration_s": float(field_of(facts, "duration"))}
        return Draft(where, name, messages, [MediaRef(video_of(name, media_root), "video")], meta=meta)

    for name, facts in json_document(path).items():
        yield guarded(f"{path}, {name}", one, {"name": name, "facts": facts})

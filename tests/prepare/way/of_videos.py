"""Rows of videos with events: listed and grounded in time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.prepare.formats.events import LIST, WHEN
from tests.data.test_video_times import a_song
from tests.prepare.builders import a_clip as a_short_clip
from tests.prepare.test_video_formats import the_clip
from tests.prepare.way.row import VIDEO, Row, objects, span, want

EVENTS = {
    "v_1": {
        "duration": 60.0,
        "timestamps": [[20.0, 35.5], [0, 12.25]],
        "sentences": ["A man  runs.", 'He says "go".'],
    }
}


def with_clips(folder: Path) -> Path:
    """Two clips of a minute and of a variable rate; and what is none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "v_1.mp4").write_bytes(the_clip())
    (folder / "Z9.mkv").write_bytes(the_clip())
    (folder / "song.mp4").write_bytes(a_song(cover=False))
    (folder / "cut.mp4").write_bytes(a_short_clip(table_first=True)[:-4000])
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def activitynet(folder: Path, events: dict[str, Any]) -> Path:
    (with_clips(folder) / "train.json").write_text(json.dumps(events))
    return folder / "train.json"


def faulty_events() -> dict[str, Any]:
    plain = EVENTS["v_1"]
    wrong = {
        "v_1": {**plain, "timestamps": [[20, 10], [0, 1]]},
        "v_1.mp4": {**plain, "timestamps": [[20, 90], [0, 1]]},
        "Z9": {**plain, "duration": 70},
        "Z9.mkv": {**plain, "sentences": ["one"]},
    }
    return {**wrong, **dict.fromkeys(("song", "cut", "empty", "gone"), plain)}


def charades(folder: Path, lines: list[str]) -> Path:
    (with_clips(folder) / "train.txt").write_text("\n".join(lines) + "\n")
    return folder / "train.txt"


def asked(sentence: str) -> str:
    return WHEN.format(sentence)


def when(start_s: float, end_s: float) -> tuple:
    return objects(span("", start_s, end_s), form="plain")


LISTED = objects(span('He says "go".', 0, 12.25), span("A man runs.", 20, 35.5))
SIZE = "32x32"
ROWS = [
    Row(
        "activitynet",
        "video",
        "chat",
        partial(activitynet, events=EVENTS),
        [
            want(
                "good/train.json/v_1",
                [
                    ("user", [VIDEO, LIST]),
                    ("assistant", [LISTED]),
                    ("user", [asked("A man runs.")]),
                    ("assistant", [when(20, 35.5)]),
                    ("user", [asked('He says "go".')]),
                    ("assistant", [when(0, 12.25)]),
                ],
                f"v_1.mp4 {SIZE}",
            )
        ],
        partial(activitynet, events=faulty_events()),
        {"empty-span": 1, "outside-video": 2, "wrong-form": 1, "damaged-media": 3, "missing-media": 1},
        quick=True,
    ),
    Row(
        "charades_sta",
        "video",
        "chat",
        partial(charades, lines=["v_1 0.0 6.9##a person sits.", "Z9 5.5 10##a person laughs."]),
        [
            want(
                "v_1",
                [("user", [VIDEO, asked("a person sits.")]), ("assistant", [when(0, 6.9)])],
                f"v_1.mp4 {SIZE}",
                key=("time", [0, 6.9]),
            ),
            want(
                "Z9",
                [("user", [VIDEO, asked("a person laughs.")]), ("assistant", [when(5.5, 10)])],
                f"Z9.mkv {SIZE}",
                key=("time", [5.5, 10]),
            ),
        ],
        partial(charades, lines=["v_1 6.9 3.0##backwards.", "v_1 3.0 6.9 nothing", "gone 0 1##x", "song 0 1##y"]),
        {"empty-span": 1, "wrong-form": 1, "missing-media": 1, "damaged-media": 1},
    ),
]

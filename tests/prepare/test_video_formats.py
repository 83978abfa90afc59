"""Videos with events: ActivityNet's captions and Charades-STA's lines, through plan and encode, times read back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.prepare.formats.events import video_of
from pipelines.prepare.formats.rows import Bad
from tests.data.test_video_times import a_clip, a_song
from tests.prepare.builders import a_clip as a_short_clip
from tests.prepare.through import made, only, read, trained
from trainer.data.sample import Objects, Sample, Span

EVENTS = {
    "duration": 60.0,
    "timestamps": [[20.0, 35.5], [0, 12.25], [50.0, 60.4]],
    "sentences": ["A man  runs.", "He says \"go\".", "The end."],
}  # fmt: skip


def spans(sample: Sample) -> list[list[tuple]]:
    parts = [part for message in sample.messages for part in message.parts if isinstance(part, Objects)]
    return [
        [(item.label, item.at.start_s, item.at.end_s) for item in part.objects if isinstance(item.at, Span)]
        for part in parts
    ]


def seconds(text: str, fps: float) -> float:
    """Either way of writing a time, read back."""
    if found := re.fullmatch(r"([\d.]+) seconds", text):
        return float(found[1])
    hours, minutes, whole, frame = map(int, text.split(":"))
    return 3600 * hours + 60 * minutes + whole + frame / round(fps)


def the_clip() -> bytes:
    """60 s of a variable rate: ten frames a second, then one every two seconds."""
    return a_clip([*range(100), *range(100, 600, 20)], last=20, form="mp4")


def test_events_of_a_video_are_listed_and_grounded_in_both_time_formats(tmp_path: Path):
    (tmp_path / "v_1.mp4").write_bytes(the_clip())
    (tmp_path / "train.json").write_text(json.dumps({"v_1": EVENTS}))
    sample, files = only(read("activitynet", tmp_path / "train.json"), "video")
    duration = sample.media[0].duration_s
    assert duration == pytest.approx(60, abs=0.1) and sample.id == "v_1"
    last = ("The end.", 50.0, duration)
    assert spans(sample) == [
        [('He says "go".', 0, 12.25), ("A man runs.", 20, 35.5), last],
        [("", 20, 35.5)],
        [("", 0, 12.25)],
        [("", *last[1:])],
    ]
    written = {}
    for found in trained(sample, files, tmp_path):
        listed, *single = found.targets.strip().splitlines()
        entries = json.loads(listed)
        assert [entry["label"] for entry in entries] == ['He says "go".', "A man runs.", "The end."]
        pairs = [(entry["start"], entry["end"]) for entry in entries] + [tuple(line.split(" - ")) for line in single]
        want = [span[1:] for part in spans(sample) for span in part]
        fps = sample.media[0].fps
        for pair, times in zip(pairs, want, strict=True):
            assert [seconds(text, fps) for text in pair] == pytest.approx(
                times, abs=0.051 if "sec" in pair[0] else 0.51
            )
        written[found.variant] = pairs[1][0]
        assert found.frames and max(found.frames[0]) < sample.media[0].num_frames
    assert written == {0: "20.0 seconds", 1: "00:00:20:00"}


@pytest.mark.parametrize(
    ("name", "file"), [("v_1", "v_1.MP4"), ("v_1", "v_1.webm"), ("v.2", "v.2.mp4"), ("a.MP4", "a.MP4")]
)
def test_a_videos_file_is_found_by_its_name_with_an_ending_in_small_or_capital_letters(
    name: str, file: str, tmp_path: Path
):
    (tmp_path / file).write_bytes(b"")
    assert video_of(name, str(tmp_path)) == str(tmp_path / file)
    assert video_of("gone", str(tmp_path)) == str(tmp_path / "gone.mp4")


def test_lines_of_charades_become_one_sample_a_video_and_a_bad_line_costs_itself(tmp_path: Path):
    for name in ("AO8RW.mp4", "Z9.mkv"):
        (tmp_path / name).write_bytes(the_clip())
    lines = [
        "AO8RW 0.0 6.9##a person puts a book on a shelf.",
        "Z9 5.5 10##a person laughs.",
        "AO8RW 6.9 3.0##backwards.",
        "AO8RW 3.0 6.9 no sentence",
        "",
        "AO8RW 12.1 30.25##a person ## sits.",
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    rows = made(read("charades_sta", tmp_path / "train.txt"), "video")
    bad = [(row.reason, row.where.rpartition(", ")[2]) for row in rows if isinstance(row, Bad)]
    assert bad == [("empty-span", "line 3"), ("wrong-form", "line 4")]
    (first, files), (second, _) = [row for row in rows if not isinstance(row, Bad)]
    assert spans(first) == [[("", 0, 6.9)], [("", 12.1, 30.25)]] and first.key is None
    assert second.key is not None and (second.id, second.key.value) == ("Z9", [5.5, 10])
    assert 'When does this happen: "a person ## sits."' in first.messages[2].parts[0].text  # type: ignore[union-attr]
    assert [found.targets.splitlines()[0] for found in trained(first, files, tmp_path)] == [
        "0.0 seconds - 6.9 seconds",
        "00:00:00:00 - 00:00:06:01",  # 125 frames in 60 s: two a second
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"timestamps": [[1, 2]]}, "wrong-form"),
        ({"timestamps": [], "sentences": []}, "wrong-form"),
        ({"timestamps": [[20, 10], [0, 1], [0, 1]]}, "empty-span"),
        ({"timestamps": [[20, 90], [0, 1], [0, 1]]}, "outside-video"),
        ({"timestamps": [[60.1, 60.2], [0, 1], [0, 1]]}, "outside-video"),
        ({"duration": 70}, "outside-video"),
        ({"sentences": ["a", "", "b"]}, "wrong-form"),
        ({"duration": None}, "wrong-form"),
    ],
)
def test_events_that_do_not_lie_in_the_video_are_a_bad_row(tmp_path: Path, changes: dict, reason: str):
    (tmp_path / "v_1.mp4").write_bytes(the_clip())
    (tmp_path / "train.json").write_text(json.dumps({"v_1": {**EVENTS, **changes}}))
    [bad] = made(read("activitynet", tmp_path / "train.json"), "video")
    assert isinstance(bad, Bad) and bad.reason == reason and bad.where.endswith("train.json, v_1")


@pytest.mark.parametrize(
    ("data", "reason", "got"),
    [
        (None, "missing-media", "no such file"),
        (b"", "damaged-media", "0 bytes"),
        (a_song(cover=False), "damaged-media", "no video stream"),
        (a_clip([0], last=600), "damaged-media", "one frame"),
        (a_short_clip(table_first=True)[:-4000], "damaged-media", "truncated"),
    ],
    ids=["missing", "zero length", "audio only", "one frame", "cut"],
)
def test_a_file_without_a_whole_video_is_a_bad_row(tmp_path: Path, data: bytes | None, reason: str, got: str):
    if data is not None:
        (tmp_path / "v_1.mp4").write_bytes(data)
    (tmp_path / "train.json").write_text(json.dumps({"v_1": EVENTS}))
    [bad] = made(read("activitynet", tmp_path / "train.json"), "video")
    assert isinstance(bad, Bad) and bad.reason == reason and got in bad.got

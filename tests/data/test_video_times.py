"""Times of videos: a variable rate, pictures that stay, long files, and files that hold no video."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import pytest
from av.error import FFmpegError

from tests.data.builders import a_video, an_image
from trainer.data import video
from trainer.errors import MediaError


def level(frame: np.ndarray) -> int:
    return round(float(frame.mean()) / 10)


def a_clip(moments: Sequence[int], *, rate: int = 10, last: int = 1, form: str = "matroska", gop: int = 12) -> bytes:
    """Frame n is grey of level n (modulo 25), shown from moments[n] / rate on; the last one for `last` / rate."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", gop
        for number, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * (number % 25), np.uint8), format="rgb24")
            frame.pts = moment
            for packet in stream.encode(frame):
                packet.duration = last if packet.pts == moments[-1] else 1
                container.mux(packet)
        for packet in stream.encode():
            packet.duration = last
            container.mux(packet)
    return sink.getvalue()


SLIDES = (0, 100, 130, 600)
"""Shown from 0, 10, 13 and 60 s on, the last one for 40 s."""


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_pictures_that_stay_are_chosen_and_dated_by_their_presentation_times(form: str):
    data = a_clip(SLIDES, last=400, form=form)
    header = video.video_header(data)
    assert header.num_frames == 4 and header.duration_s == pytest.approx(100, abs=0.2)
    count = video.num_selected(header.num_frames, header.fps, sample_fps=1.0, min_frames=4, max_frames=8)
    found = video.select_frames(header.num_frames, header.fps, count)
    times = [number / header.fps for number in found.numbers]
    assert times == pytest.approx([0, 25, 50, 75], abs=0.2)
    frames = video.decode_video(data, found.numbers, header.fps, 28, 28)
    assert [level(frame) for frame in frames] == [0, 2, 2, 3]  # what is on the screen then, and not frames 0 to 3


def test_the_frame_of_a_time_is_that_of_the_screen_within_a_twentieth_of_a_second():
    """A rate that changes from 10 to 2 a second: every chosen frame is the one shown at its stated time."""
    moments = [*range(40), *range(40, 240, 5)]
    data = a_clip(moments, last=5)
    header = video.video_header(data)
    numbers = tuple(range(0, header.num_frames, 3))
    frames = video.decode_video(data, numbers, header.fps, 28, 28)
    for number, frame in zip(numbers, frames, strict=True):
        time = number / header.fps + video.NEAR_S
        on_screen = max(place for place, moment in enumerate(moments) if moment / 10 <= time + 1e-6)
        assert level(frame) == on_screen % 25, number


def test_a_constant_rate_still_gives_frame_n_for_number_n():
    for rate in (1, 7, 10):
        data = a_video(num_frames=20, fps=rate)
        fps = video.video_header(data).fps
        assert fps == pytest.approx(rate, rel=1e-6)
        assert [level(frame) for frame in video.decode_video(data, range(20), fps, 28, 28)] == list(range(20))


@pytest.mark.parametrize("form", ["matroska", "mp4", "mpegts"])
def test_far_apart_frames_are_found_by_key_frames_and_equal_those_read_in_order(form: str, monkeypatch):
    data = a_clip(range(0, 3000, 5), form=form)  # 300 s, a key frame every 6 s
    fps = video.video_header(data).fps
    numbers = (0, 55, 56, 130, 301, 400, 599)
    decoded = counted(monkeypatch)
    jumped = video.decode_video(data, numbers, fps, 28, 28)
    assert [level(frame) for frame in jumped] == [number % 25 for number in numbers]
    few, decoded[0] = decoded[0], 0
    monkeypatch.setattr(video, "SPARSE_S", 1e9)
    assert np.array_equal(video.decode_video(data, numbers, fps, 28, 28), jumped)
    assert decoded[0] >= 590 and few < (150 if form != "mpegts" else 600)


def counted(monkeypatch) -> list[int]:
    """Counts the frames that are decoded."""
    count, original = [0], video._Screen._decoded

    def decoded(self):
        for frame in original(self):
            count[0] += 1
            yield frame

    monkeypatch.setattr(video._Screen, "_decoded", decoded)
    return count


def test_a_file_of_ten_hours_costs_what_its_chosen_frames_cost(monkeypatch):
    data = a_clip(range(0, 360_000, 25), gop=10)  # 36,000 s, a frame every 2.5 s
    header = video.video_header(data)
    assert header.duration_s == pytest.approx(36_000, rel=1e-3)
    count = video.num_selected(header.num_frames, header.fps, sample_fps=2.0, min_frames=4, max_frames=64)
    found = video.select_frames(header.num_frames, header.fps, count)
    assert count == 64 and found.seconds_per_grid == pytest.approx(2 * 36_000 / 64, rel=1e-3)
    decoded = counted(monkeypatch)
    frames = video.decode_video(data, found.numbers, header.fps, 28, 28)
    assert [level(frame) for frame in frames] == [number % 25 for number in found.numbers]
    assert decoded[0] <= 64 * 12 < header.num_frames / 15


def a_song(cover: bool) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as container:
        stream = container.add_stream("flac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        if cover:
            container.add_attachment("cover.png", "image/png", an_image())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "cannot be decoded"),
        (b"not a video at all", "cannot be decoded"),
        (a_song(cover=False), "no video stream"),
        (a_song(cover=True), "no video stream"),
        (a_video(6)[:60], "cannot be decoded"),
    ],
    ids=["zero length", "text", "audio only", "audio with a cover", "cut in its header"],
)
def test_what_holds_no_video_is_one_error(data: bytes, told: str):
    with pytest.raises(MediaError, match=told):
        video.video_header(data, where="clip.mp4")


def test_builders_write_what_they_say():
    with av.open(io.BytesIO(a_clip(SLIDES, last=400)), "r") as container:
        frames = [frame.time for frame in container.decode(video=0)]
    assert frames == pytest.approx([0, 10, 13, 60], abs=0.01)
    with pytest.raises(FFmpegError):
        av.open(io.BytesIO(b"not a video at all"))

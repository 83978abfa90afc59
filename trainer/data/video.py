"""Videos: header, which frames a variant sees, and the pixels of those frames. Decoded with PyAV.

Frames are chosen evenly over the whole duration, an even number of them, at the frame rate that the variant picks
(Qwen2.5-VL trains with dynamic frame rates). A frame is found by its presentation time and not by counting, so a file
with a variable frame rate gives what was on the screen at that moment.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from trainer.data import media
from trainer.errors import MediaError

NEAR_S = 0.05
"""How far from a stated time the frame may be chosen: a rate that wavers by less still gives frame n for n / fps, and
in a file of long still pictures the picture is the one of that time."""
SPARSE_S = 4.0
"""Mean time between chosen frames from which on key frames are jumped to."""


@dataclass(frozen=True)
class VideoHeader:
    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    suffix: str


@dataclass(frozen=True)
class Frames:
    """Source frame numbers (at the average rate of the file), and the time between two grid rows."""

    numbers: tuple[int, ...]
    seconds_per_grid: float


def num_selected(
    num_frames: int, fps: float, *, sample_fps: float, min_frames: int, max_frames: int, multiple: int = 2
) -> int:
    """How many frames a video is sampled to, a multiple of `multiple`."""
    limit = min(max_frames, num_frames) // multiple * multiple
    wanted = min(max(num_frames / fps * sample_fps, min_frames), limit)
    return max(math.floor(wanted / multiple) * multiple, multiple)


def select_frames(num_frames: int, fps: float, count: int, *, multiple: int = 2, both_ends: bool = False) -> Frames:
    """`count` evenly spaced frames: each the first of an equal part of the video, the rule of transformers'
    Qwen2VLVideoProcessor; with `both_ends` from the first frame to the last, that of Qwen3VLVideoProcessor.

    A video with fewer frames than `count` repeats its last one.
    """
    if count > num_frames:
        numbers = tuple(min(number, num_frames - 1) for number in range(count))
    elif both_ends:
        numbers = tuple(int(number) for number in np.linspace(0, num_frames - 1, count).round())
    else:
        numbers = tuple(number * num_frames // count for number in range(count))
    return Frames(numbers, multiple * num_frames / fps / count)


def video_header(data: bytes, *, where: object = None) -> VideoHeader:
    """Raises MediaError. Frames are counted by demuxing, without decoding: containers often state none or too many."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = main_stream(container, where)
            shown = sorted((p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None and p.size)
            rate = stream.average_rate or stream.base_rate or Fraction(0)
            time_base = stream.time_base or Fraction(0)
            width, height = _display_size(container, stream)
            suffix = container.format.name.split(",")[0]
    except (FFmpegError, ValueError, IndexError) as error:
        raise _unreadable(where, data, error) from error
    if not shown or rate <= 0:
        raise _unreadable(where, data, "no frames")
    if width * height > media.MAX_PIXELS:
        raise MediaError(
            "the header promises more pixels than are read",
            where=where,
            expected=f"at most {media.MAX_PIXELS} pixels a frame",
            got=f"{width}x{height}",
        )
    fps = float(rate)
    if len(shown) > 1 and time_base:  # the container's average may be a guess; presentation times are the truth
        span = shown[-1][0] - shown[0][0]
        gap = Fraction(span, len(shown) - 1)
        # The last picture may stay for long; a little more or less than the others is how containers round.
        last = shown[-1][1] if shown[-1][1] > 1.5 * gap else gap
        fps = float(len(shown) / ((span + last) * time_base))
    names = {"mov": "mp4", "matroska": "mkv"}
    return VideoHeader(width, height, len(shown), fps, len(shown) / fps, names.get(suffix) or suffix)


def decode_video(
    data: bytes,
    numbers: Sequence[int],
    fps: float,
    width: int,
    height: int,
    *,
    original: tuple[int, int] | None = None,
    where: object = None,
) -> np.ndarray:
    """uint8[len(numbers), height, width, 3]: for each number, in order, the frame on the screen at n / fps and a little
    (half a frame, NEAR_S at most) later.

    Raises MediaError when the file ends before the last of them, or is not of the size `original`.
    """
    moments = [number / fps + min(0.5 / fps, NEAR_S) for number in numbers]
    pictures: list[np.ndarray] = []
    to_rgb = VideoReformatter()  # one for all frames: a conversion is set up once
    shown: av.VideoFrame | None = None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            keys = _key_times(data, where) if _is_sparse(moments) else []
            screen = _Screen(container, 1 / fps, keys, where)
            for moment in moments:
                frame = screen.at(moment)
                if frame is None:
                    break
                if frame is not shown:
                    image = _upright(to_rgb.reformat(frame, format="rgb24"), frame.rotation)
                    media.check_size(image.size, original, where)
                    picture, shown = np.asarray(media.resize(image, width, height)), frame
                pictures.append(picture)
    except (FFmpegError, ValueError) as error:
        raise _unreadable(where, data, error) from error
    if len(pictures) < len(moments):
        raise MediaError(
            "the video ends before its last chosen frame",
            where=where,
            expected=f"frame {numbers[len(pictures)]} at {moments[len(pictures)]:.3f} s",
            got=f"{len(pictures)} of {len(moments)} frames",
            do="replace the file, or take the sample out of the source",
        )
    return np.stack(pictures)


class _Screen:
    """What is on the screen at moments that only go forward, in seconds since the first frame. The last frame stays as
    long as the container says, at least for one frame of the average rate, and half a frame more for rounding."""

    def __init__(self, container: InputContainer, frame_s: float, keys: Sequence[float], where: object):
        self.container, self.stream, self.frame_s, self.keys = container, main_stream(container, where), frame_s, keys
        self.stream.thread_type = "SLICE"  # frame threads would decode ahead of what is kept
        self.frames = self._decoded()
        self.next = next(self.frames, None)
        self.start = self.next.time or 0.0 if self.next is not None else 0.0
        self.shown: av.VideoFrame | None = None
        self.until = 0.0

    def at(self, moment: float) -> av.VideoFrame | None:
        """None: the video is over."""
        self._skip(moment)
        while moment >= self.until:
            if self.next is None:
                return None
            self.shown, self.next = self.next, next(self.frames, None)
            if self.next is not None:
                self.until = self._time(self.next)
            else:
                own = float((self.shown.duration or 0) * (self.shown.time_base or 0))
                self.until = self._time(self.shown) + max(own, self.frame_s) + 0.5 * self.frame_s
        return self.shown

    def _skip(self, moment: float) -> None:
        """Goes on at the last key frame before the moment, where that lies ahead of what has been decoded."""
        at = bisect_right(self.keys, moment) - 1
        if at < 0 or self.next is None or self.keys[at] <= self._time(self.next):
            return
        key = self.keys[at]
        self.container.seek(round((self.start + key) / float(self.stream.time_base or 1)), stream=self.stream)
        self.frames = self._decoded()
        self.next = next(self.frames, None)
        while self.next is not None and self._time(self.next) < key - 1e-3:  # an earlier key frame, or what leads this
            self.next = next(self.frames, None)
        if self.next is None or self._time(self.next) > moment:  # its index is wrong: from the beginning, in order
            self.keys = []
            self.container.seek(0)
            self.frames = self._decoded()
            self.next = next(self.frames, None)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        return (frame for frame in self.container.decode(self.stream) if frame.time is not None)

    def _time(self, frame: av.VideoFrame) -> float:
        return (frame.time or 0.0) - self.start


def _is_sparse(moments: Sequence[float]) -> bool:
    """Whether decoding everything between the moments would be mostly in vain."""
    return len(moments) > 1 and (moments[-1] - moments[0]) / (len(moments) - 1) > SPARSE_S


def _key_times(data: bytes, where: object) -> list[float]:
    """Seconds of the key frames since the first frame, without decoding."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = main_stream(container, where)
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None and p.size]
        time_base = stream.time_base or Fraction(0)  # a stream may not be asked once its container is closed
    first = min(pts for pts, _ in packets) if packets else 0
    return sorted(float((pts - first) * time_base) for pts, is_key in packets if is_key)


def _upright(frame: av.VideoFrame, rotation: int) -> Image.Image:
    """The display matrix of phones applied."""
    image = frame.to_image()
    turns = round(rotation / 90) % 4
    return image.transpose(_ROTATIONS[turns - 1]) if turns else image


_ROTATIONS = (media.TURNS[8], media.TURNS[3], media.TURNS[6])
"""By 90, 180, 270 degrees counter-clockwise: the direction of a display matrix."""


def main_stream(container: InputContainer, where: object) -> VideoStream:
    """The first that is not a cover. Raises MediaError."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song
            return stream
    raise MediaError("the file has no video stream", where=where, got=container.format.name)


def _display_size(container: InputContainer, stream: VideoStream) -> tuple[int, int]:
    """Size after the rotation that phones write as a display matrix: seen on the first decoded frame."""
    width, height = stream.codec_context.width, stream.codec_context.height
    container.seek(0)
    frame = next(container.decode(stream), None)
    return (height, width) if frame is not None and round(frame.rotation / 90) % 2 else (width, height)


def _unreadable(where: object, data: bytes, cause: object) -> MediaError:
    return MediaError(
        "the video cannot be decoded",
        where=where,
        expected="a video file that PyAV reads",
        got=f"{cause} ({len(data)} bytes)",
        do="replace the file, or take the sample out of the source",
    )

"""Videos: header, which frames a variant sees, and the pixels of those frames. Decoded with PyAV.

Frames are chosen evenly over the whole duration, an even number of them, at the frame rate that the variant picks
(Qwen2.5-VL trains with dynamic frame rates). A frame is found by its presentation time and not by counting, so a file
with a variable frame rate gives what was on the screen at that moment.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from trainer.data import media
from trainer.errors import MediaError


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
            stream = _stream(container, where)
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size)
            rate = stream.average_rate or stream.base_rate or Fraction(0)
            time_base = stream.time_base or Fraction(0)
            width, height = _display_size(container, stream)
            suffix = container.format.name.split(",")[0]
    except (FFmpegError, ValueError, IndexError) as error:
        raise _unreadable(where, data, error) from error
    if not times or rate <= 0:
        raise _unreadable(where, data, "no frames")
    if width * height > media.MAX_PIXELS:
        raise MediaError(
            "the header promises more pixels than are read",
            where=where,
            expected=f"at most {media.MAX_PIXELS} pixels a frame",
            got=f"{width}x{height}",
        )
    fps = float(rate)
    if len(times) > 1 and time_base:  # the container's average may be a guess; presentation times are the truth
        fps = float((len(times) - 1) / ((times[-1] - times[0]) * time_base))
    names = {"mov": "mp4", "matroska": "mkv"}
    return VideoHeader(width, height, len(times), fps, len(times) / fps, names.get(suffix) or suffix)


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
    """uint8[len(numbers), height, width, 3]: for each number the frame shown in the middle of [n / fps, (n + 1) / fps).

    Raises MediaError when the file ends before the last of them, or is not of the size `original`.
    """
    moments = [(number + 0.5) / fps for number in numbers]
    pictures: list[np.ndarray] = []
    to_rgb = VideoReformatter()  # one for all frames: a conversion is set up once
    try:
        with av.open(io.BytesIO(data), "r") as container:
            for frame, until in _shown(container, 1 / fps, where):
                while len(pictures) < len(moments) and moments[len(pictures)] < until:
                    image = _upright(to_rgb.reformat(frame, format="rgb24"), frame.rotation)
                    media.check_size(image.size, original, where)
                    pictures.append(np.asarray(media.resize(image, width, height)))
                if len(pictures) == len(moments):
                    break
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


def _shown(container: InputContainer, frame_s: float, where: object) -> Iterator[tuple[av.VideoFrame, float]]:
    """(frame, seconds since the first frame until which it is on the screen); the last one stays for one frame, and
    half a frame more for rounding."""
    stream = _stream(container, where)
    stream.thread_type = "SLICE"  # frame threads would decode ahead of what is kept
    before: av.VideoFrame | None = None
    start = now = 0.0
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        start = frame.time if before is None else start
        now = frame.time - start
        if before is not None:
            yield before, now
        before = frame
    if before is not None:
        yield before, now + 1.5 * frame_s


def _upright(frame: av.VideoFrame, rotation: int) -> Image.Image:
    """The display matrix of phones applied."""
    image = frame.to_image()
    turns = round(rotation / 90) % 4
    return image.transpose(_ROTATIONS[turns - 1]) if turns else image


_ROTATIONS = (media.TURNS[8], media.TURNS[3], media.TURNS[6])
"""By 90, 180, 270 degrees counter-clockwise: the direction of a display matrix."""


def _stream(container: InputContainer, where: object) -> VideoStream:
    if not container.streams.video:
        raise MediaError("the file has no video stream", where=where, got=container.format.name)
    return container.streams.video[0]


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

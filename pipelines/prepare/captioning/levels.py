"""Captions of one long video: frames, segments of some minutes, groups of segments, until one is left. Every caption
has its time, and is one request; all requests of a level are made before the next level's.

The request's digest covers the prompt, the video's digest, the time and the captions that it shows, so a run given the
record asks nothing, and other segments of the same video ask for what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Annotated, Any

from PIL import Image as Pil
from pydantic import BaseModel, ConfigDict, Field

from pipelines.prepare.curate.asking import BLOCK, Asking, Request, first_of, picture_part
from trainer.captioning import Captioning
from trainer.data.sample import Media
from trainer.data.video import decode_video
from trainer.errors import MediaError
from trainer.resolve import digest

VERSION = 1
"""Of prompts, frames and groups: part of what answers are recorded under."""
Json = dict[str, Any]
FORM = 'Answer with one JSON object and nothing else: {"caption": "..."}'
FRAME = f"""You describe one frame of a long video for training a vision-language model.
Say in one to three sentences what is seen: people, things, place, text on the screen, what is being done. Do not guess
at what is not seen. {FORM}"""
SEGMENT = f"""You are given captions of frames of one segment of a video, each with its time.
Write one caption of what happens in the segment, in the order of time, in two to five sentences. Leave out what only
one frame's caption claims against the others; speak of the video, not of frames or captions. {FORM}"""
GROUP = f"""You are given captions of consecutive parts of a video, each with its time.
Write one caption of what happens over all of them, in the order of time: what goes on, what changes, how it ends, in
three to eight sentences. Speak of the video, not of parts or captions. {FORM}"""


class Caption(BaseModel):
    model_config = ConfigDict(extra="ignore", str_strip_whitespace=True)

    caption: Annotated[str, Field(min_length=3)]


def parse(text: str) -> Caption | None:
    """The first JSON object in the text that has the form; None where there is none."""
    return first_of(text, Caption)


@dataclass(frozen=True)
class Part:
    """A stretch of the video with what happens in it, in seconds; a frame has no length."""

    start_s: float
    end_s: float
    caption: str

    def line(self) -> str:
        when = clock(self.start_s) + (f" - {clock(self.end_s)}" if self.end_s > self.start_s else "")
        return f"{when}: {' '.join(self.caption.split())}"


class Uncaptioned(Exception):
    """A part of the video that no valid answer came for."""


class Damaged(Exception):
    """The video cannot be decoded: no fault of who is asked."""


def clock(seconds: float) -> str:
    """hh:mm:ss, whole seconds."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def segments(duration_s: float, longest_s: float) -> list[tuple[float, float]]:
    """Equal stretches of a video, each at most so long."""
    count = max(1, ceil(duration_s / longest_s))
    ends = [duration_s * number / count for number in range(count)]
    return list(pairwise([*ends, duration_s]))


def frames_of(start_s: float, end_s: float, count: int) -> list[float]:
    """Times in the middle of equal parts."""
    return [start_s + (end_s - start_s) * (number + 0.5) / count for number in range(count)]


def groups(num: int, most: int) -> list[tuple[int, int]]:
    """[begin, end) of consecutive groups of like size, each at most so many."""
    count = ceil(num / most)
    ends = [num * number // count for number in range(count + 1)]
    return list(pairwise(ends))


def caption(video: Media, read: Callable[[], bytes], asked: Captioning, asking: Asking[Caption]) -> list[list[Part]]:
    """Levels of captions: of segments, of groups of them, ..., the last is one caption of the whole video.

    Raises:
        Uncaptioned: a segment none of whose frames has a valid caption, or a part above without one.
        Damaged: the video cannot be decoded. DataError: the endpoint does not answer.
    """
    stretches = segments(video.duration_s, asked.segment_s)
    frames = _frames(video, read, [frames_of(*one, asked.frames_per_segment) for one in stretches], asked, asking)
    levels = [_combined(SEGMENT, video, list(zip(stretches, frames, strict=True)), asked, asking)]
    while len(levels[-1]) > 1:
        below = [levels[-1][begin:end] for begin, end in groups(len(levels[-1]), asked.combined)]
        listed = [((parts[0].start_s, parts[-1].end_s), parts) for parts in below]
        levels.append(_combined(GROUP, video, listed, asked, asking))
    return levels


def events(levels: Sequence[Sequence[Part]], most: int) -> Sequence[Part]:
    """The finest level that has no more parts than that."""
    return next(parts for parts in levels if len(parts) <= most)


# ---------------------------------------------------------------- requests


def _frames(
    video: Media,
    read: Callable[[], bytes],
    times: Sequence[Sequence[float]],
    asked: Captioning,
    asking: Asking[Caption],
) -> list[list[Part]]:
    """Of each segment the captions of its frames; a frame without a valid answer is left out."""
    every = [moment for segment in times for moment in segment]
    pictures = _Pictures(video, read, every, asked.judge.image_max_pixels)
    how = {name: getattr(asked.judge, name) for name in ("temperature", "max_tokens", "image_max_pixels")}
    requests = []
    for number, moment in enumerate(every):
        said = {"version": VERSION, "prompt": FRAME, "media": video.digest, "time_s": round(moment, 3), "shown": how}
        name = f"{video.origin}, frame at {clock(moment)}"
        requests.append(Request(digest(said), name, lambda at=number: _shown(pictures.at(at), every[at], asked)))
    answers = iter(zip(every, asking.answers(requests), strict=True))
    found = []
    for segment in times:
        given = [next(answers) for _ in segment]
        found.append([Part(moment, moment, valid[0].caption) for moment, valid in given if valid])
    return found


def _shown(picture: Pil.Image, moment: float, asked: Captioning) -> list[Json]:
    content = [picture_part(picture, asked.judge), {"type": "text", "text": f"The frame at {clock(moment)}."}]
    return [{"role": "system", "content": FRAME}, {"role": "user", "content": content}]


class _Pictures:
    """Frames of a video, decoded when they are asked for, as many at a time as are asked about together."""

    def __init__(self, video: Media, read: Callable[[], bytes], times: Sequence[float], max_pixels: int):
        self.video, self.read, self.times = video, read, times
        scale = min(1.0, (max_pixels / (video.width * video.height)) ** 0.5)
        self.size = (max(1, int(video.width * scale)), max(1, int(video.height * scale)))
        self.begin, self.found = -1, []

    def at(self, number: int) -> Pil.Image:
        """Raises Damaged."""
        begin = number // BLOCK * BLOCK
        if begin != self.begin:
            last = self.video.num_frames - 1
            numbers = [min(last, int(moment * self.video.fps)) for moment in self.times[begin : begin + BLOCK]]
            try:
                found = decode_video(self.read(), numbers, self.video.fps, *self.size, where=self.video.origin)
            except MediaError as error:
                raise Damaged(error.what) from error
            self.begin, self.found = begin, [Pil.fromarray(picture) for picture in found]
        return self.found[number - begin]


def _combined(
    prompt: str,
    video: Media,
    listed: Sequence[tuple[tuple[float, float], Sequence[Part]]],
    asked: Captioning,
    asking: Asking[Caption],
) -> list[Part]:
    """One caption of each stretch, from those of its parts."""
    how = {name: getattr(asked.judge, name) for name in ("temperature", "max_tokens", "max_characters")}
    requests = []
    for (start_s, end_s), parts in listed:
        when = f"from {clock(start_s)} to {clock(end_s)}"
        if not parts:
            raise Uncaptioned(f"no caption of any frame {when}")
        text = f"{when[0].upper()}{when[1:]}:\n{_lines(parts, asked.judge.max_characters)}"
        said = {"version": VERSION, "prompt": prompt, "media": video.digest, "text": text, "shown": how}
        messages = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        requests.append(Request(digest(said), f"{video.origin}, {when}", lambda found=messages: found))
    made = []
    for ((start_s, end_s), _), valid in zip(listed, asking.answers(requests), strict=True):
        if not valid:
            raise Uncaptioned(f"no valid caption from {clock(start_s)} to {clock(end_s)}")
        made.append(Part(start_s, end_s, valid[0].caption))
    return made


def _lines(parts: Sequence[Part], room: int) -> str:
    """A line each; where they are too long together, each is cut to its share, and said to be."""
    lines = [part.line() for part in parts]
    share = max(40, room // len(lines))
    if sum(map(len, lines)) > room:
        lines = [line if len(line) <= share else f"{line[:share]} [cut]" for line in lines]
    return "\n".join(lines)

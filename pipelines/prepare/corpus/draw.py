"""Small pictures and clips for the built-in corpus: named icons in one of eight colours over crops of real photographs.

A picture returns what is in it (name, colour, box, mask), so that captions, boxes and answers are true by construction.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image

from pipelines.prepare.corpus.sources import Icon, Photo
from trainer.data.masks import run_lengths

COLOURS = {
    "red": (225, 25, 30),
    "green": (20, 165, 50),
    "blue": (30, 70, 235),
    "yellow": (250, 225, 20),
    "pink": (255, 90, 200),
    "cyan": (20, 225, 235),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
# Where an icon's centre lies, as a share of the free room.
PLACES = {
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "in the middle": (0.5, 0.5),
}
# Photographs behind icons keep to 45-210 of 255: a black icon shows in front of the night sky, a white one before snow.
CALM = [round(45 + value * 165 / 255) for value in range(256)]
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


@dataclass(frozen=True)
class Placed:
    """One icon in a picture."""

    name: str
    colour: str
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; right and bottom are exclusive."""
    rle: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.colour} {self.name}"


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def crop_photo(rng: random.Random, photo: Photo, width: int, height: int) -> Image.Image:
    """A random part of the photograph, resized to width x height."""
    full_width, full_height = photo.pixels.size
    scale = min(full_width / width, full_height / height) * rng.uniform(0.5, 1.0)
    part_width, part_height = int(width * scale), int(height * scale)
    left, top = rng.randint(0, full_width - part_width), rng.randint(0, full_height - part_height)
    box = (left, top, left + part_width, top + part_height)
    part = photo.pixels.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return part.point(CALM * 3)


def paste(
    picture: Image.Image, icon: Icon, colour: str, side: int, at: tuple[float, float], *, with_mask: bool = False
) -> Placed:
    """Paste the icon, its longer side `side` pixels, at a share of the free room; changes `picture`."""
    scale = side / max(icon.mask.size)
    width, height = (max(1, round(length * scale)) for length in icon.mask.size)
    mask = icon.mask.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round(at[0] * (picture.width - width)), round(at[1] * (picture.height - height))
    picture.paste(COLOURS[colour], (left, top, left + width, top + height), mask)
    rle: tuple[int, ...] = ()
    if with_mask:
        full = np.zeros((picture.height, picture.width), bool)
        full[top : top + height, left : left + width] = np.asarray(mask) > 127
        rle = run_lengths(full)
    return Placed(icon.name, colour, (left, top, left + width, top + height), rle)


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def one_icon(
    rng: random.Random, photos: Sequence[Photo], icons: Sequence[Icon], *, side: int, share: tuple[float, float]
) -> tuple[Image.Image, Placed, str]:
    """A large icon over a photograph; returns the picture, what was pasted and its place in words."""
    picture = crop_photo(rng, rng.choice(photos), side, side)
    place = rng.choice(list(PLACES))
    size = round(side * rng.uniform(*share))
    placed = paste(picture, rng.choice(icons), rng.choice(list(COLOURS)), size, PLACES[place])
    return picture, placed, place


def several_icons(
    rng: random.Random,
    photos: Sequence[Photo],
    icons: Sequence[Icon],
    *,
    width: int,
    height: int,
    count: int,
    same: bool,
) -> tuple[Image.Image, list[Placed]]:
    """Up to four icons in the corners of a picture, without overlap: all alike (`same`) or all of different colours."""
    picture = crop_photo(rng, rng.choice(photos), width, height)
    colours = rng.sample(list(COLOURS), count)
    chosen = rng.sample(list(icons), count)
    corners = rng.sample(CORNERS, count)
    placed = []
    for icon, colour, corner in zip(chosen, colours, corners, strict=True):
        side = round(min(width, height) * rng.uniform(0.36, 0.47))
        icon, colour = (chosen[0], colours[0]) if same else (icon, colour)
        placed.append(paste(picture, icon, colour, side, corner, with_mask=not same))
    return picture, placed


MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def moving_icon(
    rng: random.Random, photos: Sequence[Photo], icons: Sequence[Icon], *, side: int, fps: int, num_frames: int
) -> tuple[bytes, Placed, str, tuple[float, float]]:
    """A clip in which an icon rests, moves across the picture and rests again.

    Returns the mp4's bytes, the icon, the direction and when it moves (start, end in seconds).
    """
    background = crop_photo(rng, rng.choice(photos), side, side)
    icon, colour, direction = rng.choice(icons), rng.choice(list(COLOURS)), rng.choice(list(MOVES))
    dx, dy = MOVES[direction]
    size = round(side * rng.uniform(0.5, 0.6))
    half_seconds = num_frames * 2 // fps
    start = rng.randint(0, half_seconds // 2 - 1) / 2
    end = start + rng.randint(2, max(2, half_seconds - int(start * 2) - 1)) / 2
    frames, placed = [], None
    for number in range(num_frames):
        progress = min(1.0, max(0.0, (number / fps - start) / (end - start)))
        frame = background.copy()
        placed = paste(frame, icon, colour, size, (0.5 + dx * (progress - 0.5), 0.5 + dy * (progress - 0.5)))
        frames.append(frame)
    assert placed is not None
    return encode_video(frames, fps), placed, direction, (start, end)


def encode_video(frames: Sequence[Image.Image], fps: int) -> bytes:
    """H.264 in mp4, one thread (the same bytes every time). Width and height must be even."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "20", "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return buffer.getvalue()

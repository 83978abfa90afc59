"""Masks in every form that annotations have, as arrays, and what is asked of them. Polygons and compressed run lengths
are COCO's own (pycocotools); uncompressed ones are numpy's (trainer/data/masks.py).

A `Region` is a part of a picture: a window and which of its pixels belong. A picture has many objects and most are
small, so their masks are kept no larger than they are. H, W: pixels of the picture; h, w: of the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as coco
from scipy.ndimage import distance_transform_edt

from trainer.data.masks import check_run_lengths, from_run_lengths, run_lengths
from trainer.data.sample import Box, Mask

FAR = 1.0
"""Sides of its picture by which a polygon may go beyond it."""
Xyxy = tuple[int, int, int, int]
"""Left, top, right, bottom in whole pixels; right and bottom are exclusive."""


def decompressed(counts: str | bytes, size: Sequence[int]) -> tuple[int, ...]:
    """COCO's compressed run lengths of a mask of `size` (height, width), uncompressed.

    Read here and not by pycocotools, whose decode (2.0.11) gives whatever lies in memory for runs that end too early.
    Each run is written in groups of 5 bits, lowest first, 0x20 marking that another follows; from the fourth on it is
    the difference to the run before the last (cocoapi, rleFrString).

    Raises:
        ValueError: not such text, or not of this size.
    """
    height, width = map(int, size)
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"compressed run lengths, got the byte {byte}")
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        value -= (1 << shift) if group & 0x10 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths that end within a run")
    check_run_lengths(runs, width, height)
    return tuple(runs)


def mask_of(mask: Mask, width: int, height: int) -> np.ndarray:
    """bool[H, W] of a stored mask.

    Raises:
        ValueError: neither run lengths of this size nor polygons, or polygons that go far beyond the picture.
    """
    if mask.rle is not None:
        return from_run_lengths(mask.rle, width, height)
    if not mask.polygons or any(len(ring) < 6 or len(ring) % 2 for ring in mask.polygons):
        raise ValueError("a mask without run lengths, and without polygons of three points and more")
    for ring in mask.polygons:  # pycocotools takes memory for every pixel along a side, and overflows
        for values, side in ((ring[::2], width), (ring[1::2], height)):
            if not all(-FAR * side <= value <= (1 + FAR) * side for value in values):
                raise ValueError(f"a polygon that goes further than {FAR:g} sides beyond a picture of {width}x{height}")
    listed: Any = [list(ring) for ring in mask.polygons]
    rings: Any = coco.frPyObjects(listed, height, width)
    return coco.decode(coco.merge(rings)).astype(bool)


@dataclass(frozen=True)
class Region:
    left: int
    top: int
    inside: np.ndarray
    """bool[h, w]"""

    @property
    def area(self) -> int:
        return int(self.inside.sum())

    @property
    def window(self) -> Xyxy:
        height, width = self.inside.shape
        return self.left, self.top, self.left + width, self.top + height

    def box(self) -> Xyxy | None:
        """The smallest box around what belongs; None where nothing does."""
        rows, columns = np.flatnonzero(self.inside.any(1)), np.flatnonzero(self.inside.any(0))
        if not rows.size:
            return None
        return (
            self.left + int(columns[0]),
            self.top + int(rows[0]),
            self.left + int(columns[-1]) + 1,
            self.top + int(rows[-1]) + 1,
        )

    def tight(self) -> Region | None:
        """The same in its smallest window."""
        box = self.box()
        return None if box is None else self.cut(box)

    def cut(self, window: Xyxy) -> Region:
        """The part that lies in a window."""
        left, top, right, bottom = _shared(self.window, window)
        part = self.inside[top - self.top : bottom - self.top, left - self.left : right - self.left]
        return Region(left, top, part)

    def without(self, over: Region) -> Region:
        """What is left when `over` lies on top."""
        left, top, right, bottom = _shared(self.window, over.window)
        if right <= left or bottom <= top:
            return self
        inside = self.inside.copy()
        part = inside[top - self.top : bottom - self.top, left - self.left : right - self.left]
        part &= ~over.cut((left, top, right, bottom)).inside
        return Region(self.left, self.top, inside)

    def full(self, width: int, height: int) -> np.ndarray:
        """bool[H, W]"""
        found = np.zeros((height, width), bool)
        left, top, right, bottom = self.window
        found[top:bottom, left:right] = self.inside
        return found

    def holds(self, x: float, y: float) -> bool:
        """Whether the pixel that a point lies in belongs."""
        column, row = math.floor(x) - self.left, math.floor(y) - self.top
        height, width = self.inside.shape
        return 0 <= row < height and 0 <= column < width and bool(self.inside[row, column])

    def deepest(self) -> tuple[float, float]:
        """The middle of the pixel that lies furthest from the border: a point that is surely on the object."""
        depth = distance_transform_edt(np.pad(self.inside, 1))[1:-1, 1:-1]  # type: ignore[index]
        row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
        return self.left + int(column) + 0.5, self.top + int(row) + 0.5


def region_of(at: Mask | Box, width: int, height: int) -> Region | None:
    """A stored mask, or a box as the whole pixels that it touches; None where no pixel belongs.

    Raises:
        ValueError: a mask that cannot be read.
    """
    if isinstance(at, Mask):
        return Region(0, 0, mask_of(at, width, height)).tight()
    left, top, right, bottom = outward(at.xyxy, width, height)
    return Region(left, top, np.ones((bottom - top, right - left), bool)) if right > left and bottom > top else None


def outward(xyxy: Sequence[float], width: int, height: int) -> Xyxy:
    """The whole pixels that a box touches, within the picture."""
    left, top = max(math.floor(xyxy[0]), 0), max(math.floor(xyxy[1]), 0)
    return left, top, min(math.ceil(xyxy[2]), width), min(math.ceil(xyxy[3]), height)


def as_mask(region: Region, width: int, height: int) -> Mask:
    """The stored form: run lengths, and the box exact to the pixel. The region is not empty."""
    box = region.box()
    assert box is not None
    return Mask(xyxy=tuple(map(float, box)), rle=run_lengths(region.full(width, height)))  # type: ignore[arg-type]


def _shared(one: Xyxy, other: Xyxy) -> Xyxy:
    left, top = max(one[0], other[0]), max(one[1], other[1])
    return left, top, max(left, min(one[2], other[2])), max(top, min(one[3], other[3]))

"""The place of an action, drawn on a screenshot for who explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from trainer.data.sample import Action

COLOUR, EDGE = (255, 0, 255), (255, 255, 255)
"""Magenta, which screens seldom have, with a white edge that shows on magenta as well."""
RADIUS = 0.025
"""Of the mean of the sides, at least LEAST pixels: it is drawn after the picture was made smaller."""
LEAST = 9
Point = tuple[float, float]


def marked(picture: Image.Image, size: tuple[int, int], actions: Sequence[Action]) -> Image.Image:
    """A copy with a circle around the place of every action, and an arrow from the first to the second place of a swipe
    or a drag. Coordinates are pixels of `size`, which the picture may be a smaller copy of."""
    found = picture.convert("RGB").copy()
    pen = ImageDraw.Draw(found)
    across, down = picture.width / size[0], picture.height / size[1]
    radius = max(LEAST, RADIUS * (picture.width + picture.height) / 2)
    for action in actions:
        points: list[Point] = [(x * across, y * down) for x, y in action.coordinates.values()]
        for colour, width in ((EDGE, 6), (COLOUR, 3)):
            if len(points) > 1:
                _arrow(pen, points[0], points[1], radius, colour, width)
            if points:
                _circle(pen, points[0], radius, colour, width)
    return found


def _circle(pen: ImageDraw.ImageDraw, at: Point, radius: float, colour: tuple[int, int, int], width: int) -> None:
    """A ring of that width, in the middle of which the circle lies; what is inside stays to be seen."""
    outer = radius + width / 2
    pen.ellipse((at[0] - outer, at[1] - outer, at[0] + outer, at[1] + outer), outline=colour, width=width)


def _arrow(
    pen: ImageDraw.ImageDraw, start: Point, end: Point, radius: float, colour: tuple[int, int, int], width: int
) -> None:
    pen.line((*start, *end), fill=colour, width=width)
    turn = math.atan2(end[1] - start[1], end[0] - start[0])
    for side in (math.pi - 0.5, math.pi + 0.5):
        tip = (end[0] + radius * math.cos(turn + side), end[1] + radius * math.sin(turn + side))
        pen.line((*end, *tip), fill=colour, width=width)

"""How a family writes coordinates: absolute pixels of the resized image, 0-1000, or 0-1.

Geometry in a Sample is in pixels of the original file. It is converted when the grid of the medium is known, in one
place, here: coordinates that were not rescaled with the image are the first cause of "0 mAP" reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
"""width, height"""


@dataclass(frozen=True)
class Convention:
    """absolute: Qwen2.5-VL; thousand: Qwen-VL, Qwen2-VL, Qwen3-VL; unit: LLaVA-1.6; square: LLaVA-1.5, 0-1 on the
    picture padded to a square, the picture in its middle."""

    kind: Literal["absolute", "thousand", "unit", "square"]

    def _scale(self, resized: int) -> float:
        return {"absolute": float(resized), "thousand": 1000.0, "unit": 1.0, "square": 1.0}[self.kind]

    def to_model(self, x: float, y: float, original: Size, resized: Size) -> tuple[float, float] | tuple[int, int]:
        """A point of the original file as the model reads and writes it, clamped to the picture.

        Integers for absolute and thousand; two decimals for unit and square, as LLaVA's data has them.
        """
        (left, top), canvas = self._canvas(original)
        x, y = min(max(x, 0.0), float(original[0])), min(max(y, 0.0), float(original[1]))
        fx = (x + left) / canvas[0] * self._scale(resized[0])
        fy = (y + top) / canvas[1] * self._scale(resized[1])
        if self.kind in ("unit", "square"):
            return round(fx, 2), round(fy, 2)
        return _nearest(fx), _nearest(fy)

    def to_original(self, x: float, y: float, original: Size, resized: Size) -> tuple[float, float]:
        """A point that the model wrote, in pixels of the original file, clamped to the picture."""
        (left, top), canvas = self._canvas(original)
        fx = x / self._scale(resized[0]) * canvas[0] - left
        fy = y / self._scale(resized[1]) * canvas[1] - top
        return min(max(fx, 0.0), float(original[0])), min(max(fy, 0.0), float(original[1]))

    def screen(self, resized: Size) -> Size:
        """The size of a picture in the units that are written: what a tool's schema says of the screen. ValueError:
        coordinates are shares of the picture."""
        if self.kind in ("unit", "square"):
            raise ValueError("a tool's coordinates are in pixels of the screen, the family writes shares of it, 0 to 1")
        return resized if self.kind == "absolute" else (1000, 1000)

    def _canvas(self, original: Size) -> tuple[tuple[int, int], Size]:
        """Where the picture begins on what coordinates are relative to, and the size of that. LLaVA's expand2square
        pads (difference // 2) before."""
        if self.kind != "square":
            return (0, 0), original
        side = max(original)
        return ((side - original[0]) // 2, (side - original[1]) // 2), (side, side)


def _nearest(value: float) -> int:
    """Half away from zero: Python's round() goes to even, which moves every second half pixel."""
    return int(value + 0.5)

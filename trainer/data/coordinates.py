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
    """absolute: Qwen2.5-VL; thousand: Qwen-VL, Qwen2-VL, Qwen3-VL; unit: LLaVA."""

    kind: Literal["absolute", "thousand", "unit"]

    def _scale(self, resized: int) -> float:
        return {"absolute": float(resized), "thousand": 1000.0, "unit": 1.0}[self.kind]

    def to_model(self, x: float, y: float, original: Size, resized: Size) -> tuple[float, float] | tuple[int, int]:
        """A point of the original file as the model reads and writes it, clamped to the picture.

        Integers for absolute and thousand; two decimals for unit, as LLaVA's data has them.
        """
        fx = min(max(x / original[0], 0.0), 1.0) * self._scale(resized[0])
        fy = min(max(y / original[1], 0.0), 1.0) * self._scale(resized[1])
        if self.kind == "unit":
            return round(fx, 2), round(fy, 2)
        return _nearest(fx), _nearest(fy)

    def to_original(self, x: float, y: float, original: Size, resized: Size) -> tuple[float, float]:
        """A point that the model wrote, in pixels of the original file, clamped to the picture."""
        fx = min(max(x / self._scale(resized[0]), 0.0), 1.0)
        fy = min(max(y / self._scale(resized[1]), 0.0), 1.0)
        return fx * original[0], fy * original[1]


def _nearest(value: float) -> int:
    """Half away from zero: Python's round() goes to even, which moves every second half pixel."""
    return int(value + 0.5)

"""LLaVA-1.5: a picture padded to a square is one tile of CLIP (arXiv 2310.03744; transformers 5.23).

The released preprocessor_config.json crops the middle of a picture instead; training pads (finetune.sh of
haotian-liu/LLaVA: --image_aspect_ratio pad), and so do we and the processor that we export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image as Pil
from PIL.Image import Image

from trainer.data.chat import ChatTemplate, Vicuna
from trainer.data.coordinates import Convention
from trainer.data.media import MAX_PIXELS, resize
from trainer.models.family import Grid
from trainer.models.tiles import Tiles


class Llava(Tiles):
    name = model_type = "llava"
    processor_class = "LlavaProcessor"
    templates: ClassVar[Mapping[str, ChatTemplate]] = {"llama": Vicuna()}
    coordinates = Convention("square")
    grid_columns = 3

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid:
        """One tile, whatever the budgets; width and height are the picture's in it."""
        longest = max(width, height)
        inside = (max(round(self.tile * length / longest), 1) for length in (width, height))
        return Grid(1, self.side, self.side, *inside, source=(width, height))

    def grid_row(self, grid: Grid) -> tuple[int, ...]:
        return grid.t, grid.h, grid.w

    def visual_tokens(self, grid: Grid) -> int:
        return grid.h * grid.w

    def image_patches(self, picture: Image, grid: Grid) -> np.ndarray:
        """A picture is padded, then resized, as in the published training; one whose square would have more than
        MAX_PIXELS is resized first, to whole pixels of the tile: that moves its edges by up to half of one."""
        picture = resize(picture, *grid.source)
        if max(grid.source) ** 2 > MAX_PIXELS:
            picture = resize(picture, grid.width, grid.height)
        width, height = picture.size
        if width != height:
            side = max(width, height)
            square = Pil.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.image_mean))
            square.paste(picture, ((side - width) // 2, (side - height) // 2))
            picture = square
        return self.patches_of(np.asarray(resize(picture, self.tile, self.tile)))

    def image_settings(self) -> dict[str, Any]:
        return self.pixel_settings(image_processor_type="LlavaImageProcessor")

    def import_warnings(self, processor: Mapping[str, Any]) -> list[str]:
        """What a released preprocessor_config.json does otherwise than training here."""
        if processor.get("do_pad"):
            return []
        return [
            "the released processor crops the middle of a picture (do_pad is not set); training pads it to a square "
            "with the mean colour, and the exported processor does so too (do_pad true)"
        ]

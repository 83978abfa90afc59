"""LLaVA-1.6 (LLaVA-NeXT): the whole picture as one tile, and itself, larger, as a grid of tiles (transformers 5.23).

Of the grids in the config (image_grid_pinpoints) the one that keeps most of the picture is taken; the picture is
resized into it, its sides kept in proportion, and padded with black around. Features of the padding are left out again
(spatial_unpad), and after each row of patches stands the learned image_newline. Counts are those of transformers'
LlavaNextProcessor for every size of picture; budgets in pixels do not move the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image as Pil
from PIL.Image import Image

from trainer.data.chat import ChatTemplate, MistralInstruct, Vicuna
from trainer.data.coordinates import Convention
from trainer.data.media import resize
from trainer.errors import ModelError
from trainer.models.family import Grid
from trainer.models.tiles import Tiles

RELEASED_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""(height, width), in every released config.json."""
Size = tuple[int, int]
"""height, width"""


class LlavaNext(Tiles):
    name = model_type = "llava_next"
    processor_class = "LlavaNextProcessor"
    templates: ClassVar[Mapping[str, ChatTemplate]] = {"llama": Vicuna(), "mistral": MistralInstruct()}
    coordinates = Convention("unit")
    grid_columns = 7

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        stated = self.config.get("image_grid_pinpoints") or RELEASED_PINPOINTS
        if not _are_sizes(stated):
            raise ModelError(
                "grids are pairs of pixels",
                where="image_grid_pinpoints",
                expected="[[height, width], ...]",
                got=stated,
            )
        self.pinpoints: list[Size] = [(height, width) for height, width in stated]
        self.config["image_grid_pinpoints"] = [list(size) for size in self.pinpoints]
        if odd := [size for size in self.pinpoints if size[0] % self.tile or size[1] % self.tile]:
            raise ModelError(
                "a grid that tiles do not fill",
                where="image_grid_pinpoints",
                expected=f"multiples of vision_config.image_size {self.tile}",
                got=odd,
            )

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid:
        """Tiles of the best grid and one of the whole picture; width and height are the picture's in that grid."""
        best = best_grid((height, width), self.pinpoints)
        inside = fitted((height, width), best)
        tiles = 1 + best[0] * best[1] // self.tile**2
        return Grid(tiles, self.side, self.side, inside[1], inside[0], source=(width, height))

    def grid_row(self, grid: Grid) -> tuple[int, ...]:
        """t, h, w; rows and columns of the grid of tiles; rows and columns of patches that are cut off at each end."""
        rows, columns = self._tiles(grid)
        return grid.t, grid.h, grid.w, rows, columns, *self._cut(grid)

    def visual_tokens(self, grid: Grid) -> int:
        """Patches of the whole picture, those of the grid without padding, one image_newline a row of these."""
        (rows, columns), (cut_rows, cut_columns) = self._tiles(grid), self._cut(grid)
        kept = rows * grid.h - 2 * cut_rows
        return grid.h * grid.w + kept * (columns * grid.w - 2 * cut_columns + 1)

    def _tiles(self, grid: Grid) -> Size:
        width, height = grid.source
        best = best_grid((height, width), self.pinpoints)
        return best[0] // self.tile, best[1] // self.tile

    def _cut(self, grid: Grid) -> Size:
        rows, columns = self._tiles(grid)
        return padding((grid.source[1], grid.source[0]), (rows * grid.h, columns * grid.w))

    def image_patches(self, picture: Image, grid: Grid) -> np.ndarray:
        picture = resize(picture, *grid.source)
        rows, columns = self._tiles(grid)
        canvas = Pil.new("RGB", (columns * self.tile, rows * self.tile))
        place = ((canvas.width - grid.width) // 2, (canvas.height - grid.height) // 2)
        canvas.paste(resize(picture, grid.width, grid.height), place)
        whole = resize(picture, self.tile, self.tile)
        return np.concatenate([self.patches_of(np.asarray(part)) for part in (whole, canvas)])

    def image_settings(self) -> dict[str, Any]:
        return self.pixel_settings(
            image_processor_type="LlavaNextImageProcessor", image_grid_pinpoints=self.config["image_grid_pinpoints"]
        )

    def layout_facts(self) -> dict[str, Any]:
        return {**super().layout_facts(), "pinpoints": self.config["image_grid_pinpoints"]}


def _are_sizes(stated: Any) -> bool:
    return isinstance(stated, list | tuple) and all(
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
        for size in stated
    )


# ---------------------------------------------------------------- the rules of transformers 5.23, rounding included


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """The grid in which most pixels of a picture of `size` are kept; of equal ones the least wasteful, then the first.

    transformers: select_best_resolution.
    """
    best, most, least = grids[0], 0, math.inf
    for height, width in grids:
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        wasted = height * width - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (height, width), kept, wasted
    return best


def fitted(size: Size, grid: Size) -> Size:
    """The picture's size inside its grid, sides rounded up. transformers: get_patch_output_size."""
    scale_h, scale_w = grid[0] / size[0], grid[1] / size[1]
    if scale_w < scale_h:
        return min(math.ceil(size[0] * scale_w), grid[0]), grid[1]
    return grid[0], min(math.ceil(size[1] * scale_h), grid[1])


def padding(size: Size, patches: Size) -> Size:
    """Rows and columns of patches that hold nothing but padding, at each end, in a grid of `patches`.

    transformers: unpad_image. An odd one stays; a picture thinner than a patch leaves nothing.
    """
    if size[1] / size[0] > patches[1] / patches[0]:
        return (patches[0] - int(round(size[0] * (patches[1] / size[1]), 7))) // 2, 0
    return 0, (patches[1] - int(round(size[1] * (patches[0] / size[0]), 7))) // 2

"""Pictures at their own resolution, as Qwen2-VL and its successors take them: grids, patches, M-RoPE.

Sides are rounded to multiples of patch x merge, a picture is cut into patches that the tower merges 2 x 2, an image
counts as two equal frames. arXiv 2409.12191 section 2.1; transformers 5.23 Qwen2VLImageProcessor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL.Image import Image

from trainer.data.media import resize
from trainer.data.pieces import Piece, Shown
from trainer.models.family import AspectError, Buildable, Grid, Placed

MAX_ASPECT = 200


class NativeResolution(Buildable):
    """Half of a family: it needs patch_size, merge_size, temporal_patch_size and tokens_per_second."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    tokens_per_second: float
    assumed: tuple[str, ...] = ()
    grid_columns = 3
    frames_to_both_ends = False

    @cached_property
    def factor(self) -> int:
        """Sides are multiples of it: 28 for patch 14, merge 2."""
        return self.patch_size * self.merge_size

    @cached_property
    def patch_width(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid:
        """The size and patches of an image of `width` x `height` (after EXIF orientation). ValueError above 200:1."""
        width, height = smart_resize(width, height, self.factor, min_pixels, max_pixels)
        return Grid(1, height // self.patch_size, width // self.patch_size, width, height)

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid:
        """The size and patches of `num_frames` frames, an even number.

        `total_pixels` counts a pair of frames once, since a pair becomes one grid row (qwen-vl-utils, and transformers
        with cap_pixels_per_frame): 24576 * 28 * 28 is 24576 visual tokens. An even share below 1.05 * `min_pixels` is
        raised to that, as there.
        """
        share = total_pixels * self.temporal_patch_size // num_frames
        cap = max(min(max_pixels, share), int(min_pixels * 1.05))
        width, height = smart_resize(width, height, self.factor, min_pixels, cap)
        t = num_frames // self.temporal_patch_size
        return Grid(t, height // self.patch_size, width // self.patch_size, width, height)

    def grid_row(self, grid: Grid) -> tuple[int, ...]:
        return grid.t, grid.h, grid.w

    def visual_tokens(self, grid: Grid) -> int:
        """Tokens that the language model sees: patches after merging."""
        return grid.t * grid.h * grid.w // self.merge_size**2

    def patches(self, grid: Grid) -> int:
        return grid.t * grid.h * grid.w

    def image_patches(self, picture: Image, grid: Grid) -> np.ndarray:
        return self._patchify(np.asarray(resize(picture, grid.width, grid.height))[None])

    def video_patches(self, frames: np.ndarray, grid: Grid) -> np.ndarray:
        return self._patchify(frames)

    def _patchify(self, frames: np.ndarray) -> np.ndarray:
        """uint8[T, H, W, 3] -> uint8[P, 3 * temporal * patch * patch], in the order that the vision tower expects:
        grid rows in merge blocks, then channel, frame, pixel. A last odd frame is repeated; an image is one frame."""
        tp, p, m = self.temporal_patch_size, self.patch_size, self.merge_size
        if pad := -len(frames) % tp:
            frames = np.concatenate([frames, np.repeat(frames[-1:], pad, axis=0)])
        t, height, width, channels = frames.shape
        gh, gw = height // p, width // p
        blocks = frames.reshape(t // tp, tp, gh // m, m, p, gw // m, m, p, channels)
        blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return np.ascontiguousarray(blocks).reshape(t // tp * gh * gw, channels * tp * p * p)

    def media_pieces(self, shown: Shown) -> list[Piece]:
        """<|vision_start|>, the medium, <|vision_end|>."""
        middle = Piece(shown.kind, media=shown.media)
        return [Piece("special", "<|vision_start|>"), middle, Piece("special", "<|vision_end|>")]

    def position_ids(self, spans: Sequence[Placed], *, start: int = 0, first: int = 0) -> np.ndarray:
        """int64[4, L] of one segment: row 0 counts tokens from `first`, rows 1-3 are the M-RoPE t, h, w from `start`.

        The published rule: what follows a vision span starts at its largest id + 1. transformers 5.23 advances by the
        larger side only, so ids of a long video overlap with the text after it; ours do not. Temporal ids stay float
        until the product with tokens_per_second is floored: cast earlier, ids collapse above 2 frames a second.
        A segment after a parent takes start = its largest id + 1 and first = the parent's length.
        """
        parts = []
        for span in spans:
            if span.grid is None:
                ids = np.broadcast_to(np.arange(start, start + span.num_tokens), (3, span.num_tokens))
            else:
                ids = self._vision_positions(span.grid, span.seconds_per_grid, video=span.kind == "video") + start
            parts.append(ids)
            start = int(ids.max(initial=start - 1)) + 1
        rope = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int64)
        count = np.arange(first, first + rope.shape[1])
        return np.concatenate([count[None], rope]).astype(np.int64)

    def _vision_positions(self, grid: Grid, seconds_per_grid: float, *, video: bool) -> np.ndarray:
        h, w = grid.h // self.merge_size, grid.w // self.merge_size
        interval = self._ids_per_grid(seconds_per_grid) if video else 1.0
        # 1e-6: 3 * (1 / 3) style products land a rounding error below the integer that they mean
        t = np.floor(np.arange(grid.t) * interval + 1e-6).astype(np.int64)
        return np.stack(np.meshgrid(t, np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)

    def _ids_per_grid(self, seconds_per_grid: float) -> float:
        """Temporal ids from one grid row of a video to the next: absolute time."""
        return seconds_per_grid * self.tokens_per_second

    def import_warnings(self, processor: Mapping[str, Any]) -> list[str]:
        """None: released processors resize as smart_resize does; budgets are the recipe's."""
        return []

    def unused(self, stored_name: str) -> bool:
        """Buffers that older versions saved."""
        return stored_name.endswith((".position_ids", "inv_freq"))

    def pixel_settings(self, **more: Any) -> dict[str, Any]:
        """What every processor file says of sizes and steps."""
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "merge_size": self.merge_size,
            "patch_size": self.patch_size,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": self.temporal_patch_size,
            **more,
        }


def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of `factor` within the budgets, aspect kept: the rule of the released processor.

    Python's round() (half to even) is part of the rule. AspectError above an aspect of 200.
    """
    aspect = max(height, width) / max(min(height, width), 1)
    if aspect > MAX_ASPECT or min(height, width) < 1:
        raise AspectError(f"aspect ratio {aspect:.1f} of {width}x{height} is above {MAX_ASPECT}")
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return w, h

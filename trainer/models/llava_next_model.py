"""LLaVA-1.6's torch side: transformers' model; the tiles of a pack's pictures are one batch, and which features stay
and where image_newline stands is derived on the host.

Imported by the family file inside build(); the weights' names are those of transformers 5.

Shapes: P patches, M media, N visual tokens, R rows of patches that an image_newline ends, C hidden width, D vision
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration

from trainer.models.tiles_model import (
    build_model,
    embed_tokens,
    exact_buffers,
    head_of,
    language_model,
    read,
    run_language,
    tower,
)

__all__ = [
    "build",
    "dummy_grid",
    "embed_tokens",
    "exact_buffers",
    "head_of",
    "language_model",
    "plan_vision",
    "read",
    "run_language",
    "run_vision",
    "see",
    "tower",
]


def build(
    config: Mapping[str, Any], *, dtype: torch.dtype, attn_implementation: str | None = None, init: bool = True
) -> LlavaNextForConditionalGeneration:
    return build_model(
        LlavaNextForConditionalGeneration,
        LlavaNextConfig,
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        init=init,
    )


@dataclass(frozen=True)
class TilesPlan:
    order: Tensor
    """int64[N]: row of [features of P patches, R times image_newline] that each visual token is. No row comes twice."""
    num_rows: int
    """R"""


def dummy_grid(model: nn.Module) -> tuple[int, ...]:
    """One tile, which an image_newline ends."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    side = vision.image_size // vision.patch_size
    return 1, side, side, 0, 0, 0, 0


def plan_vision(model: nn.Module, grids: Tensor, device: torch.device | str) -> TilesPlan:
    """int64[M, 7] on the host: tiles and patches of their sides, rows and columns of the grid of tiles, rows and
    columns of patches that are cut off at each end (LlavaNext.grid_row)."""
    rows = grids.tolist()
    newline = sum(t * h * w for t, h, w, *_ in rows)
    num_patches, found = newline, []
    at = 0
    for t, h, w, tiles_down, tiles_across, cut_rows, cut_columns in rows:
        whole = torch.arange(at, at + h * w)
        at += h * w
        if tiles_down * tiles_across == 0:
            found += [whole, torch.tensor([newline])]
            newline += 1
            continue
        picture = torch.arange(at, at + (t - 1) * h * w).view(tiles_down, tiles_across, h, w)
        picture = picture.transpose(1, 2).reshape(tiles_down * h, tiles_across * w)
        at += (t - 1) * h * w
        kept = picture[cut_rows : len(picture) - cut_rows, cut_columns : picture.shape[1] - cut_columns]
        ends = torch.arange(newline, newline + len(kept))
        newline += len(kept)
        found += [whole, torch.cat([kept, ends[:, None]], dim=1).flatten()]
    return TilesPlan(torch.cat(found).to(device, non_blocking=True), newline - num_patches)


def run_vision(model: nn.Module, pixels: Tensor, plan: TilesPlan) -> tuple[Tensor, ...]:
    """The one output of the vision path, [N, C].

    image_newline is expanded before the gather: the gradient of a row that is taken many times is then a sum, the same
    in every run, and the gather's has nothing to add up.
    """
    inner: Any = model.model
    features = inner.multi_modal_projector(tower(model, pixels, plan))
    rows = inner.image_newline.to(features.dtype).expand(plan.num_rows, -1)
    return (torch.cat([features, rows]).index_select(0, plan.order),)


def see(model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
    """int64[M, 7] -> ([N, C],): for generation."""
    return run_vision(model, pixels, plan_vision(model, grids.cpu(), pixels.device))

"""LLaVA-1.6's torch side: transformers' model; the tiles of a pack's pictures are one batch, and which features stay
and where image_newline stands is derived on the host.

Shapes: P patches, M media, N visual tokens, R rows of patches that an image_newline ends, C hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration

from trainer.models.tiles_model import TilesParts


@dataclass(frozen=True)
class TilesPlan:
    order: Tensor
    """int64[N]: row of [features of P patches, R times image_newline] that each visual token is. No row comes twice."""
    num_rows: int
    """R"""


class LlavaNextParts(TilesParts):
    model_class = LlavaNextForConditionalGeneration
    config_class = LlavaNextConfig

    def dummy_grid(self, model: nn.Module) -> tuple[int, ...]:
        """One tile, which an image_newline ends."""
        return *super().dummy_grid(model), 0, 0, 0, 0

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> TilesPlan:
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

    def run_vision(self, model: nn.Module, pixels: Tensor, plan: TilesPlan) -> tuple[Tensor, ...]:
        """The one output of the vision path, [N, C].

        image_newline is expanded before the gather: the gradient of a row that is taken many times is then a sum, the
        same in every run, and the gather's has nothing to add up.
        """
        inner: Any = model.model
        features = inner.multi_modal_projector(self.tower(model, pixels, plan))
        rows = inner.image_newline.to(features.dtype).expand(plan.num_rows, -1)
        return (torch.cat([features, rows]).index_select(0, plan.order),)


PARTS = LlavaNextParts()

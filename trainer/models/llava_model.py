"""LLaVA-1.5's torch side: transformers' model; a pack's pictures are one batch of tiles.

Shapes: N visual tokens (as many as patches), C hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from trainer.models.tiles_model import TilesParts


class LlavaParts(TilesParts):
    model_class = LlavaForConditionalGeneration
    config_class = LlavaConfig

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> None:
        """There is nothing to derive: every picture is one tile."""

    def run_vision(self, model: nn.Module, pixels: Tensor, plan: None) -> tuple[Tensor, ...]:
        """The one output of the vision path, [N, C]."""
        features = self.tower(model, pixels, plan)
        return (model.model.multi_modal_projector(features),)  # type: ignore[union-attr, operator]


PARTS = LlavaParts()

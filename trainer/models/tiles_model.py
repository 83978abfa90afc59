"""What the torch sides of LLaVA-1.5 and LLaVA-1.6 share: transformers' model, CLIP up to the feature layer over one
batch of tiles.

Shapes: P patches, T tiles, D vision width.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.common_model import CommonParts
from trainer.step import attention


class TilesParts(CommonParts):
    segments_as = {"": "sdpa", "text_config": attention.NAME, "vision_config": "sdpa"}  # noqa: RUF012
    """Tiles have one length: the tower's attention is one batched call of sdpa."""

    def causal_type(self, config: Mapping[str, Any]) -> str:
        return config["text_config"]["model_type"]

    def dummy_grid(self, model: nn.Module) -> tuple[int, ...]:
        """One tile."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        side = vision.image_size // vision.patch_size
        return 1, side, side

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> Any:
        raise NotImplementedError

    def run_vision(self, model: nn.Module, pixels: Tensor, plan: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def tower(self, model: nn.Module, pixels: Tensor, plan: Any) -> Tensor:
        """[P, 3 * patch^2] -> features of the patches [P, D], without class tokens. Layers above do not run."""
        clip: Any = model.model.vision_tower  # type: ignore[union-attr]
        config: Any = model.config
        size, patch = config.vision_config.image_size, config.vision_config.patch_size
        n = size // patch
        images = pixels.view(-1, n, n, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, size, size)
        hidden = clip.pre_layrnorm(clip.embeddings(images))
        layer = config.vision_feature_layer
        for block in islice(clip.encoder.layers, layer if layer >= 0 else len(clip.encoder.layers) + 1 + layer):
            hidden = block(hidden, None)
        return hidden[:, 1:].flatten(0, 1)

    def see(self, model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        """As run_vision: the tower's attention is transformers' in training too."""
        return self.run_vision(model, pixels, self.plan_vision(model, grids.cpu(), pixels.device))

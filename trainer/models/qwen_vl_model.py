"""Qwen-VL's torch side: our port (qwen_vl_port_model.py, qwen_vl_vision_model.py) as trainer and generation call it.

Importing it registers the port with transformers' Auto classes.

Shapes: P patches, M pictures, N visual tokens (M x queries), C hidden width, D tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.causal import build_causal
from trainer.models.common_model import CommonParts
from trainer.models.qwen_vl_port_model import QWenConfig, QWenLMHeadModel
from trainer.models.qwen_vl_vision_model import VisionPlan, plan_of


class QwenVLParts(CommonParts):
    model_class = QWenLMHeadModel
    config_class = QWenConfig

    def language_of(self, model: Any) -> Any:
        return model.transformer

    def exact_buffers(self, model: nn.Module) -> None:
        """There are none: frequencies are computed where they are used."""

    def language_model(self, config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """Qwen-7B's architecture with random weights, and its config.json: the same without `visual`."""
        alone = {key: value for key, value in config.items() if key != "visual"}
        return build_causal(alone, seed=seed), alone

    def dummy_grid(self, model: nn.Module) -> tuple[int, ...]:
        """One patch."""
        return 1, 1, 1

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> VisionPlan:
        """int64[M, 3] on the host: rows (1, side, side)."""
        return plan_of(grids, _visual(model).num_queries, device)

    def run_vision(self, model: nn.Module, pixels: Tensor, plan: VisionPlan) -> tuple[Tensor, ...]:
        """The one output of the vision path, [N, C]."""
        return (_visual(model)(pixels, plan),)

    def tower(self, model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """Patch features before the adapter [P, D]."""
        return _visual(model).patch_features(pixels, plan)

    def see(self, model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        """As run_vision: the tower's attention is ours in generation too."""
        return self.run_vision(model, pixels, self.plan_vision(model, grids.cpu(), pixels.device))


def _visual(model: nn.Module) -> Any:
    return model.transformer.visual  # type: ignore[union-attr]


PARTS = QwenVLParts()

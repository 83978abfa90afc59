"""Qwen2.5-VL's torch side: transformers' model, the tower's attention in windows in most layers.

Shapes: P patches, M media, D vision width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLVisionAttention,
)
from transformers.vision_utils import get_vision_window_index

from trainer.models.native_model import NativeParts, VisionPlan, block_attention
from trainer.step.attention import Windows, windows_of


class Attention(Qwen2_5_VLVisionAttention):
    """The same projections; blocks of equal length share one attention call."""

    full: bool
    """Attends to the whole image or frame, not to its window."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        frames: Windows,
        windows: Windows,
        **_: Any,
    ) -> Tensor:
        """hidden_states [P, D] in window order."""
        return block_attention(self, hidden_states, position_embeddings, frames if self.full else windows)


class Qwen25VLParts(NativeParts):
    model_class = Qwen2_5_VLForConditionalGeneration
    config_class = Qwen2_5_VLConfig
    attention_class = Attention

    def adapt(self, model: Any) -> None:
        super().adapt(model)
        visual = model.model.visual
        for number, block in enumerate(visual.blocks):
            block.attn.full = number in visual.fullatt_block_indexes

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> VisionPlan:
        """The windows, and the order of patches that puts those of one window side by side: it keeps the patches of one
        picture together."""
        visual: Any = model.model.visual  # type: ignore[union-attr]
        index, cu_window_seqlens = get_vision_window_index(
            grids,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return {
            **super().plan_vision(model, grids, device),
            "window_index": index.to(device, non_blocking=True),
            "cu_window_seqlens": cu_window_seqlens,
            "windows": windows_of(cu_window_seqlens.diff().tolist(), device),
        }


PARTS = Qwen25VLParts()

"""Qwen3-VL's torch side: transformers' model. Every layer of the tower attends to a whole image, or to a whole grid row
of a video; some hand their features to the language model's first layers (DeepStack).

Shapes: P patches, M media, N visual tokens (P / merge_size^2), C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextModel,
    Qwen3VLVisionAttention,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from trainer.models.native_model import FrameAttention, NativeParts, VisionPlan


class Attention(FrameAttention, Qwen3VLVisionAttention):
    pass


class PackedTextModel(Qwen3VLTextModel):
    """transformers adds DeepStack's outputs through a mask, whose number of rows the host has to ask the device for, in
    each of the first layers; here it is int64[N], the rows themselves."""

    def _deepstack_process(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        return hidden_states.index_add(1, visual_pos_masks, visual_embeds[None].to(hidden_states.dtype))


class Qwen3VLParts(NativeParts):
    model_class = Qwen3VLForConditionalGeneration
    config_class = Qwen3VLConfig
    attention_class = Attention

    def adapt(self, model: Any) -> None:
        super().adapt(model)
        model.model.language_model.__class__ = PackedTextModel

    def causal_type(self, config: Mapping[str, Any]) -> str:
        return "qwen3"

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> VisionPlan:
        """The entries of the learned position grid around each patch, int64[P, 4], and their weights."""
        visual: Any = model.model.visual  # type: ignore[union-attr]
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        return {
            **super().plan_vision(model, grids, device),
            "interp_indices": indices.to(device, non_blocking=True),
            "interp_weights": weights.to(device, non_blocking=True),
        }

    def outputs(self, out: Any) -> tuple[Tensor, ...]:
        """The merger's output, then one of each DeepStack merger: all [N, C]."""
        return (out.pooler_output, *out.deepstack_features)

    def deeper_inputs(
        self, deeper: tuple[Tensor, ...], visual_index: Tensor | None, embeddings: Tensor, *, packed: bool
    ) -> dict[str, Any]:
        """deeper[i] [N, C] is added after layer i: to the rows themselves in a pack, else by transformers' mask."""
        if not deeper:
            return {}
        where = visual_index
        if not packed:
            where = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            where.view(-1)[visual_index] = True
        return {"deepstack_visual_embeds": list(deeper), "visual_pos_masks": where}


PARTS = Qwen3VLParts()

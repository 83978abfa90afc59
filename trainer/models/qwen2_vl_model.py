"""Qwen2-VL's torch side: transformers' model, with attention over a pack and without host-device syncs.

Imported by the family file inside build(); the weights' names are those of transformers 5. The tower has no windows:
every layer attends to a whole image, or to a whole grid row of a video.

Shapes: P patches, M media, N visual tokens (P / merge_size^2), C hidden width, D vision width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration, VisionAttention
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from trainer.models.common_model import build_model
from trainer.models.native_model import (
    block_attention,
    dummy_grid,
    embed_tokens,
    exact_buffers,
    head_of,
    language_model,
    read,
    run_language,
    see,
)
from trainer.step import attention
from trainer.step.attention import Windows, windows_of

__all__ = [
    "VisionPlan",
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
) -> Qwen2VLForConditionalGeneration:
    """The model with random weights (`init`) or with memory only.

    attn_implementation "segments" is the trainer's; None leaves transformers' default, for generation and export.
    """
    made = {"dtype": dtype, "attn_implementation": attn_implementation, "init": init}
    model = build_model(Qwen2VLForConditionalGeneration, Qwen2VLConfig, config, **made)
    if attn_implementation == attention.NAME:
        for block in model.model.visual.blocks:
            block.attn.__class__ = FrameAttention
    return model


class FrameAttention(VisionAttention):
    """The same projections; frames of equal size share one attention call."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], frames: Windows, **_: Any
    ) -> Tensor:
        """hidden_states [P, D]; frames: the patches of each image and of each grid row of a video."""
        return block_attention(self, hidden_states, position_embeddings, frames)


@dataclass(frozen=True)
class VisionPlan:
    """What the vision tower derives from grids: computed on the host, so that no layer waits for the device."""

    grid_thw: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    frames: Windows


def plan_vision(model: nn.Module, grid_thw: Tensor, device: torch.device | str) -> VisionPlan:
    """int64[M, 3] on the host: patches (t, h, w) of each image or video."""
    visual: Any = model.model.visual  # type: ignore[union-attr]
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    return VisionPlan(
        grid_thw=grid_thw,
        position_ids=get_vision_position_ids(grid_thw, visual.spatial_merge_size).to(device, non_blocking=True),
        cu_seqlens=cu_seqlens,
        frames=windows_of(cu_seqlens.diff().tolist(), device),
    )


def run_vision(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> tuple[Tensor, ...]:
    """The one output of the vision path, [N, C]."""
    return (_visual(model, pixels, plan).pooler_output,)


def tower(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
    """Patch features before the merger [P, D]."""
    return _visual(model, pixels, plan).last_hidden_state


def _visual(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Any:
    visual: Any = model.model.visual  # type: ignore[union-attr]
    return visual(
        pixels,
        grid_thw=plan.grid_thw,
        position_ids=plan.position_ids,
        cu_seqlens=plan.cu_seqlens,
        frames=plan.frames,
    )

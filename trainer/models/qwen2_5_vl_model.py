"""Qwen2.5-VL's torch side: transformers' model, with attention over a pack and without host-device syncs.

Imported by the family file inside build(); the weights' names are those of transformers 5.

Shapes: L tokens of a pack, P patches, N visual tokens (P / merge_size^2), C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLVisionAttention,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

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
) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights (`init`) or with memory only.

    attn_implementation "segments" is the trainer's; None leaves transformers' default, for generation and export.
    """
    made = {"dtype": dtype, "attn_implementation": attn_implementation, "init": init}
    model = build_model(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, config, **made)
    if attn_implementation == attention.NAME:
        visual: Any = model.model.visual
        for number, block in enumerate(visual.blocks):
            block.attn.__class__ = WindowedVisionAttention
            block.attn.full = number in visual.fullatt_block_indexes
    return model


class WindowedVisionAttention(Qwen2_5_VLVisionAttention):
    """The same projections; blocks of equal length share one attention call."""

    full: bool
    """Attends to the whole image or frame, not to its window."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        blocks: tuple[Windows, Windows],
        **_: Any,
    ) -> Tensor:
        """hidden_states [P, C] in window order; blocks: of windows, of whole frames."""
        return block_attention(self, hidden_states, position_embeddings, blocks[1] if self.full else blocks[0])


@dataclass(frozen=True)
class VisionPlan:
    """What the vision tower derives from grids: computed on the host, so that no layer waits for the device."""

    grid_thw: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    window_index: Tensor
    cu_window_seqlens: Tensor
    blocks: tuple[Windows, Windows]


def plan_vision(model: nn.Module, grid_thw: Tensor, device: torch.device | str) -> VisionPlan:
    """int64[M, 3] on the host: patches (t, h, w) of each image or video."""
    visual: Any = model.model.visual  # type: ignore[union-attr]
    merge = visual.spatial_merge_size
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    window_index, cu_window_seqlens = get_vision_window_index(
        grid_thw, spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size
    )
    return VisionPlan(
        grid_thw=grid_thw,
        position_ids=get_vision_position_ids(grid_thw, merge).to(device, non_blocking=True),
        cu_seqlens=cu_seqlens,
        window_index=window_index.to(device, non_blocking=True),
        cu_window_seqlens=cu_window_seqlens,
        blocks=(windows_of(cu_window_seqlens.diff().tolist(), device), windows_of(cu_seqlens.diff().tolist(), device)),
    )


def run_vision(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> tuple[Tensor, ...]:
    """The one output of the vision path, [N, C]."""
    return (_visual(model, pixels, plan).pooler_output,)


def _visual(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Any:
    visual: Any = model.model.visual  # type: ignore[union-attr]
    return visual(
        pixels,
        grid_thw=plan.grid_thw,
        position_ids=plan.position_ids,
        cu_seqlens=plan.cu_seqlens,
        window_index=plan.window_index,
        cu_window_seqlens=plan.cu_window_seqlens,
        blocks=plan.blocks,
    )


def tower(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
    """Patch features before the merger [P, D]; in window order, which keeps the patches of one picture together."""
    return _visual(model, pixels, plan).last_hidden_state

"""Qwen3-VL's torch side: transformers' model, with attention over a pack and without host-device syncs.

Imported by the family file inside build(); the weights' names are those of transformers 5. Every layer of the tower
attends to a whole image, or to a whole grid row of a video.

Shapes: L tokens of a pack, P patches, M media, N visual tokens (P / merge_size^2), C hidden width, D vision width,
B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextModel,
    Qwen3VLVisionAttention,
)
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from trainer.models.causal import build_causal, causal_config
from trainer.models.common_model import build_model
from trainer.models.native_model import block_attention, dummy_grid, embed_tokens, exact_buffers, head_of
from trainer.step import attention
from trainer.step.attention import Segment, Windows, windows_of

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
) -> Qwen3VLForConditionalGeneration:
    """The model with random weights (`init`) or with memory only.

    attn_implementation "segments" is the trainer's; None leaves transformers' default, for generation and export.
    """
    made = {"dtype": dtype, "attn_implementation": attn_implementation, "init": init}
    model = build_model(Qwen3VLForConditionalGeneration, Qwen3VLConfig, config, **made)
    if attn_implementation == attention.NAME:
        for block in model.model.visual.blocks:
            block.attn.__class__ = FrameAttention
        model.model.language_model.__class__ = PackedTextModel
    return model


class FrameAttention(Qwen3VLVisionAttention):
    """The same projections; frames of equal size share one attention call."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], frames: Windows, **_: Any
    ) -> Tensor:
        """hidden_states [P, D]; frames: the patches of each image and of each grid row of a video."""
        return block_attention(self, hidden_states, position_embeddings, frames)


class PackedTextModel(Qwen3VLTextModel):
    """transformers adds DeepStack's outputs through a mask, whose number of rows the host has to ask the device for, in
    each of the first layers; here it is int64[N], the rows themselves."""

    def _deepstack_process(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        return hidden_states.index_add(1, visual_pos_masks, visual_embeds[None].to(hidden_states.dtype))


@dataclass(frozen=True)
class VisionPlan:
    """What the vision tower derives from grids: computed on the host, so that no layer waits for the device."""

    grid_thw: Tensor
    position_ids: Tensor
    interp_indices: Tensor
    """int64[P, 4]: entries of the learned position grid around each patch."""
    interp_weights: Tensor
    cu_seqlens: Tensor
    frames: Windows


def plan_vision(model: nn.Module, grid_thw: Tensor, device: torch.device | str) -> VisionPlan:
    """int64[M, 3] on the host: patches (t, h, w) of each image or grid row of a video."""
    visual: Any = model.model.visual  # type: ignore[union-attr]
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.spatial_merge_size,
    )
    return VisionPlan(
        grid_thw=grid_thw,
        position_ids=get_vision_position_ids(grid_thw, visual.spatial_merge_size).to(device, non_blocking=True),
        interp_indices=indices.to(device, non_blocking=True),
        interp_weights=weights.to(device, non_blocking=True),
        cu_seqlens=cu_seqlens,
        frames=windows_of(cu_seqlens.diff().tolist(), device),
    )


def run_vision(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> tuple[Tensor, ...]:
    """The merger's output, then one of each DeepStack merger: all [N, C]."""
    out = _visual(model, pixels, plan)
    return (out.pooler_output, *out.deepstack_features)


def tower(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
    """Patch features before the merger [P, D]."""
    return _visual(model, pixels, plan).last_hidden_state


def _visual(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Any:
    visual: Any = model.model.visual  # type: ignore[union-attr]
    return visual(
        pixels,
        grid_thw=plan.grid_thw,
        position_ids=plan.position_ids,
        interp_indices=plan.interp_indices,
        interp_weights=plan.interp_weights,
        cu_seqlens=plan.cu_seqlens,
        frames=plan.frames,
    )


def run_language(
    model: nn.Module,
    embeddings: Tensor,
    position_ids: Tensor,
    segments: Sequence[Segment],
    deeper: tuple[Tensor, ...],
    visual_index: Tensor,
) -> Tensor:
    """[L, C] and int64[4, L] -> final hidden states [L, C]. deeper[i] [N, C] is added to rows `visual_index` after
    layer i; empty where the pack has no picture."""
    out = model.model.language_model(  # type: ignore[union-attr, operator]
        inputs_embeds=embeddings[None],
        position_ids=position_ids[:, None],
        attention_mask=None,
        use_cache=False,
        deepstack_visual_embeds=list(deeper) or None,
        visual_pos_masks=visual_index if deeper else None,
        segments=segments,
    )
    return out.last_hidden_state[0]


def language_model(config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Qwen3ForCausalLM with random weights, and its config.json."""
    alone = causal_config(config, "qwen3")
    return build_causal(alone, seed=seed), alone


# ---------------------------------------------------------------- generation: transformers' own attention


def see(model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
    """int64[M, 3] -> as run_vision."""
    out = model.model.visual(pixels, grid_thw=grids)  # type: ignore[union-attr, operator]
    return (out.pooler_output, *out.deepstack_features)


def read(
    model: nn.Module,
    embeddings: Tensor,
    position_ids: Tensor,
    *,
    mask: Tensor | None,
    cache: Cache,
    deeper: tuple[Tensor, ...] = (),
    visual_index: Tensor | None = None,
) -> Tensor:
    """[B, L, C] and int64[4, B, L] -> hidden states [B, L, C]; `visual_index` are rows of [B * L]. The row that counts
    tokens is for packs: not passed."""
    where = None
    if deeper:
        where = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        where.view(-1)[visual_index] = True
    out = model.model.language_model(  # type: ignore[union-attr, operator]
        inputs_embeds=embeddings,
        position_ids=position_ids[1:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        deepstack_visual_embeds=list(deeper) or None,
        visual_pos_masks=where,
    )
    return out.last_hidden_state

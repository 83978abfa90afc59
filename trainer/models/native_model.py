"""What the torch sides of Qwen2-VL and its successors share: transformers' model.model.visual, its attention in blocks,
a language model with M-RoPE, and nothing that waits for the device.

Shapes: P patches, M media, N visual tokens (P / merge_size^2), D vision width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from trainer.models.common_model import CommonParts, set_frequencies
from trainer.step.attention import Windows, window_attention, windows_of

VisionPlan = dict[str, Any]
"""The tower's arguments besides pixels: computed on the host, so that no layer waits for the device."""


class NativeParts(CommonParts):
    attention_class: type[nn.Module]
    """The tower's attention layer with a forward of ours."""

    def adapt(self, model: Any) -> None:
        for block in model.model.visual.blocks:
            block.attn.__class__ = self.attention_class

    def exact_buffers(self, model: nn.Module) -> None:
        """The tower's frequencies as well."""
        super().exact_buffers(model)
        rotary: Any = model.model.visual.rotary_pos_emb  # type: ignore[union-attr]
        set_frequencies(rotary, *rotary.compute_axial_rope_parameters(rotary.config))

    def positions(self, position_ids: Tensor, *, packed: bool) -> Tensor:
        """All four rows of a pack; t, h, w in generation: the row that counts tokens is for packs."""
        return position_ids if packed else position_ids[1:]

    def causal_type(self, config: Mapping[str, Any]) -> str:
        return "qwen2"

    def dummy_grid(self, model: nn.Module) -> tuple[int, ...]:
        """One merged patch."""
        merge: Any = model.model.visual.spatial_merge_size  # type: ignore[union-attr]
        return 1, merge, merge

    def plan_vision(self, model: nn.Module, grids: Tensor, device: torch.device | str) -> VisionPlan:
        """int64[M, 3] on the host: patches (t, h, w). `frames` are the patches of each image and of each grid row of a
        video, which every layer attends to as a whole."""
        visual: Any = model.model.visual  # type: ignore[union-attr]
        cu_seqlens = get_vision_cu_seqlens(grids)
        positions = get_vision_position_ids(grids, visual.spatial_merge_size)
        return {
            "grid_thw": grids,
            "position_ids": positions.to(device, non_blocking=True),
            "cu_seqlens": cu_seqlens,
            "frames": windows_of(cu_seqlens.diff().tolist(), device),
        }

    def outputs(self, out: Any) -> tuple[Tensor, ...]:
        """What of the tower's result the language model uses: here one, [N, C]."""
        return (out.pooler_output,)

    def run_vision(self, model: nn.Module, pixels: Tensor, plan: VisionPlan) -> tuple[Tensor, ...]:
        return self.outputs(model.model.visual(pixels, **plan))  # type: ignore[union-attr, operator]

    def tower(self, model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """Patch features before the merger [P, D], those of one picture together."""
        return model.model.visual(pixels, **plan).last_hidden_state  # type: ignore[union-attr, operator]

    def see(self, model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        """As run_vision, with transformers' own attention: for generation."""
        return self.outputs(model.model.visual(pixels, grid_thw=grids))  # type: ignore[union-attr, operator]


class FrameAttention:
    """Before the tower's attention layer among the bases: the same projections; frames of equal size share one call."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], frames: Windows, **_: Any
    ) -> Tensor:
        """[P, D] -> [P, D]."""
        return block_attention(self, hidden_states, position_embeddings, frames)


def block_attention(
    layer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], blocks: Windows
) -> Tensor:
    """The tower's attention layer with its own projections, blocks of equal length sharing one call: [P, D] -> [P, D].

    transformers splits q, k and v at cu_seqlens, which reads them back from the device in every layer, and calls
    attention once a block: trainer/step/README.md, "Vision attention".
    """
    num_patches = hidden_states.shape[0]
    qkv = layer.qkv(hidden_states).view(num_patches, 3, layer.num_heads, layer.head_dim)
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *position_embeddings)
    out = window_attention(torch.stack([query, key, qkv[:, 2]], dim=1), blocks, layer.scaling)
    return layer.proj(out.reshape(num_patches, -1))

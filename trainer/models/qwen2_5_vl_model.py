"""Qwen2.5-VL's torch side: transformers' model, with attention over a pack and without host-device syncs.

Imported by the family file inside build(); the weights' names are those of transformers 5.

Shapes: L tokens of a pack, P patches, N visual tokens (P / merge_size^2), C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from trainer.models.causal import build_causal, causal_config
from trainer.step import attention
from trainer.step.attention import Segment, Windows, window_attention, windows_of
from trainer.step.loss import Head, as_head


def build(
    config: Mapping[str, Any], *, dtype: torch.dtype, attn_implementation: str | None = None, init: bool = True
) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights (`init`) or with memory only.

    attn_implementation "segments" is the trainer's; None leaves transformers' default, for generation and export.
    """
    if attn_implementation == attention.NAME:
        attention.register()
    parsed = Qwen2_5_VLConfig(**{key: value for key, value in config.items() if key != "architectures"})
    make = Qwen2_5_VLForConditionalGeneration._from_config
    if init:
        model = make(parsed, dtype=dtype, attn_implementation=attn_implementation)
    else:
        with no_init_weights():
            model = make(parsed, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()  # no_init_weights and zero.Init leave it undone
    if attn_implementation == attention.NAME:
        as_head(model.lm_head)
        visual: Any = model.model.visual
        for number, block in enumerate(visual.blocks):
            block.attn.__class__ = WindowedVisionAttention
            block.attn.full = number in visual.fullatt_block_indexes
    return model


def exact_buffers(model: nn.Module) -> None:
    """Compute the rotary frequencies again, in fp32, as transformers keeps them whatever the weights' dtype."""
    inner: Any = model.model
    visual, text = inner.visual.rotary_pos_emb, inner.language_model.rotary_emb
    kind = text.rope_type
    compute = text.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    for rotary, rule in ((visual, visual.compute_axial_rope_parameters), (text, compute)):
        frequencies, rotary.attention_scaling = rule(rotary.config)
        for name in ("inv_freq", "original_inv_freq"):
            old = getattr(rotary, name)
            setattr(rotary, name, nn.Buffer(frequencies.to(old.device, torch.float32), persistent=False))


class WindowedVisionAttention(Qwen2_5_VLVisionAttention):
    """The same projections; blocks of equal length share one attention call.

    transformers splits q, k and v at cu_seqlens, which reads them back from the device in every layer, and calls
    attention once a window: README, "Vision attention".
    """

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
        num_patches = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).view(num_patches, 3, self.num_heads, self.head_dim)
        query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *position_embeddings)
        qkv = torch.stack([query, key, qkv[:, 2]], dim=1)
        out = window_attention(qkv, blocks[1] if self.full else blocks[0], self.scaling)
        return self.proj(out.reshape(num_patches, -1))


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


def dummy_grid(model: nn.Module) -> tuple[int, ...]:
    """One merged patch."""
    merge: Any = model.model.visual.spatial_merge_size  # type: ignore[union-attr]
    return 1, merge, merge


def tower(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
    """Patch features before the merger [P, D]; in window order, which keeps the patches of one picture together."""
    return _visual(model, pixels, plan).last_hidden_state


def embed_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """int64[L] -> [L, C]."""
    return model.model.language_model.embed_tokens(ids)  # type: ignore[union-attr, operator]


def run_language(
    model: nn.Module,
    embeddings: Tensor,
    position_ids: Tensor,
    segments: Sequence[Segment],
    deeper: tuple[Tensor, ...],
    visual_index: Tensor,
) -> Tensor:
    """[L, C] and int64[4, L] -> final hidden states [L, C]; there are no deeper outputs."""
    out = model.model.language_model(  # type: ignore[union-attr, operator]
        inputs_embeds=embeddings[None],
        position_ids=position_ids[:, None],
        attention_mask=None,
        use_cache=False,
        segments=segments,
    )
    return out.last_hidden_state[0]


def head_of(model: nn.Module) -> Head:
    return model.lm_head  # type: ignore[return-value]


def language_model(config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Qwen2ForCausalLM with random weights, and its config.json."""
    alone = causal_config(config, "qwen2")
    return build_causal(alone, seed=seed), alone


# ---------------------------------------------------------------- generation: transformers' own attention


def see(model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
    """int64[M, 3] -> ([N, C],)."""
    return (model.model.visual(pixels, grid_thw=grids).pooler_output,)  # type: ignore[union-attr, operator]


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
    """[B, L, C] and int64[4, B, L] -> hidden states [B, L, C]. The row that counts tokens is for packs: not passed."""
    out = model.model.language_model(  # type: ignore[union-attr, operator]
        inputs_embeds=embeddings,
        position_ids=position_ids[1:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state

"""What the torch sides of Qwen2-VL and its successors share: transformers' model.model.visual (M-RoPE language model in
model.model.language_model), attention of the tower in blocks, and nothing that waits for the device.

Shapes: L tokens of a pack, P patches, M media, N visual tokens (P / merge_size^2), C hidden width, D vision width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from trainer.models.causal import build_causal, causal_config
from trainer.models.common_model import exact_rotary, set_frequencies
from trainer.step.attention import Segment, Windows, window_attention
from trainer.step.loss import Head


def exact_buffers(model: nn.Module) -> None:
    """Compute the rotary frequencies again, in fp32, as transformers keeps them whatever the weights' dtype."""
    inner: Any = model.model
    visual = inner.visual.rotary_pos_emb
    set_frequencies(visual, *visual.compute_axial_rope_parameters(visual.config))
    exact_rotary(inner.language_model.rotary_emb)


def block_attention(
    layer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], blocks: Windows
) -> Tensor:
    """The tower's attention layer with its own projections, blocks of equal length sharing one call: [P, D] -> [P, D].

    transformers splits q, k and v at cu_seqlens, which reads them back from the device in every layer, and calls
    attention once a block: README, "Vision attention".
    """
    num_patches = hidden_states.shape[0]
    qkv = layer.qkv(hidden_states).view(num_patches, 3, layer.num_heads, layer.head_dim)
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *position_embeddings)
    out = window_attention(torch.stack([query, key, qkv[:, 2]], dim=1), blocks, layer.scaling)
    return layer.proj(out.reshape(num_patches, -1))


def dummy_grid(model: nn.Module) -> tuple[int, ...]:
    """One merged patch."""
    merge: Any = model.model.visual.spatial_merge_size  # type: ignore[union-attr]
    return 1, merge, merge


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

"""What the torch sides of LLaVA-1.5 and LLaVA-1.6 share: transformers' model, CLIP up to the feature layer, a language
model with one row of positions.

Shapes: L tokens of a pack, P patches, T tiles, N visual tokens, C hidden width, D vision width, B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from trainer.models import common_model
from trainer.models.causal import build_causal, causal_config
from trainer.step import attention
from trainer.step.attention import Segment
from trainer.step.loss import Head


def build_model(model_class: Any, config_class: Any, config: Mapping[str, Any], **made: Any) -> Any:
    """As common_model's. "segments" is the language model's: tiles have one length, so the tower's are one batched call
    of sdpa."""
    parts = {"": "sdpa", "text_config": attention.NAME, "vision_config": "sdpa"}
    return common_model.build_model(model_class, config_class, config, segments_as=parts, **made)


def exact_buffers(model: nn.Module) -> None:
    """Compute the rotary frequencies again, in fp32, as transformers keeps them whatever the weights' dtype."""
    common_model.exact_rotary(model.model.language_model.rotary_emb)  # type: ignore[union-attr]


def tower(model: nn.Module, pixels: Tensor, plan: Any) -> Tensor:
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
    """[L, C] and int64[4, L] of four equal rows -> final hidden states [L, C]; there are no deeper outputs."""
    out = model.model.language_model(  # type: ignore[union-attr, operator]
        inputs_embeds=embeddings[None],
        position_ids=position_ids[:1],
        attention_mask=None,
        use_cache=False,
        segments=segments,
    )
    return out.last_hidden_state[0]


def head_of(model: nn.Module) -> Head:
    return model.lm_head  # type: ignore[return-value]


def language_model(config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """LlamaForCausalLM or MistralForCausalLM with random weights, and its config.json."""
    alone = causal_config(config, config["text_config"]["model_type"])
    return build_causal(alone, seed=seed), alone


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
    """[B, L, C] and int64[4, B, L] -> hidden states [B, L, C]: for generation, with transformers' own attention."""
    out = model.model.language_model(  # type: ignore[union-attr, operator]
        inputs_embeds=embeddings,
        position_ids=position_ids[0],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state

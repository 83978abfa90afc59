"""Qwen-VL's torch side: our port (qwen_vl_port_model.py, qwen_vl_vision_model.py) as trainer and generation call it.

Importing it registers the port with transformers' Auto classes.

Shapes: L tokens of a pack, P patches, M pictures, N visual tokens (M x queries), C hidden width, D tower width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from trainer.models.causal import build_causal
from trainer.models.common_model import build_model
from trainer.models.qwen_vl_port_model import QWenConfig, QWenLMHeadModel
from trainer.models.qwen_vl_vision_model import VisionPlan, plan_of
from trainer.step.attention import Segment
from trainer.step.loss import Head


def build(
    config: Mapping[str, Any], *, dtype: torch.dtype, attn_implementation: str | None = None, init: bool = True
) -> QWenLMHeadModel:
    """The model with random weights (`init`) or with memory only.

    attn_implementation "segments" is the trainer's; None leaves transformers' default, for generation and export.
    """
    made: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "init": init}
    return build_model(QWenLMHeadModel, QWenConfig, config, **made)


def exact_buffers(model: nn.Module) -> None:
    """There are none: frequencies are computed where they are used."""


def _visual(model: nn.Module) -> Any:
    return model.transformer.visual  # type: ignore[union-attr]


def plan_vision(model: nn.Module, grids: Tensor, device: torch.device | str) -> VisionPlan:
    """int64[M, 3] on the host: rows (1, side, side)."""
    return plan_of(grids, _visual(model).num_queries, device)


def run_vision(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> tuple[Tensor, ...]:
    """The one output of the vision path, [N, C]."""
    return (_visual(model)(pixels, plan),)


def dummy_grid(model: nn.Module) -> tuple[int, ...]:
    """One patch."""
    return 1, 1, 1


def tower(model: nn.Module, pixels: Tensor, plan: VisionPlan) -> Tensor:
    """Patch features before the adapter [P, D]."""
    return _visual(model).patch_features(pixels, plan)


def embed_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """int64[L] -> [L, C]."""
    return model.transformer.wte(ids)  # type: ignore[union-attr, operator]


def run_language(
    model: nn.Module,
    embeddings: Tensor,
    position_ids: Tensor,
    segments: Sequence[Segment],
    deeper: tuple[Tensor, ...],
    visual_index: Tensor,
) -> Tensor:
    """[L, C] and int64[4, L] -> final hidden states [L, C]; there are no deeper outputs."""
    out = model.transformer(  # type: ignore[operator]
        inputs_embeds=embeddings[None],
        position_ids=position_ids[1][None],
        attention_mask=None,
        use_cache=False,
        segments=segments,
    )
    return out.last_hidden_state[0]


def head_of(model: nn.Module) -> Head:
    return model.lm_head  # type: ignore[return-value]


def language_model(config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Qwen-7B's architecture with random weights, and its config.json: the same without `visual`."""
    alone = {key: value for key, value in config.items() if key != "visual"}
    return build_causal(alone, seed=seed), alone


# ---------------------------------------------------------------- generation: the same classes, transformers' attention


def see(model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
    """int64[M, 3] -> ([N, C],)."""
    return run_vision(model, pixels, plan_vision(model, grids.cpu(), pixels.device))


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
    """[B, L, C] and int64[4, B, L] -> hidden states [B, L, C]."""
    out = model.transformer(  # type: ignore[operator]
        inputs_embeds=embeddings,
        position_ids=position_ids[1],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state

"""LLaVA-1.5's torch side: transformers' model; a pack's pictures are one batch of tiles.

Imported by the family file inside build(); the weights' names are those of transformers 5.

Shapes: P patches, M media, N visual tokens (as many as patches), C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from trainer.models.tiles_model import (
    build_model,
    embed_tokens,
    exact_buffers,
    head_of,
    language_model,
    read,
    run_language,
    tower,
)

__all__ = [
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
) -> LlavaForConditionalGeneration:
    return build_model(
        LlavaForConditionalGeneration,
        LlavaConfig,
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        init=init,
    )


def dummy_grid(model: nn.Module) -> tuple[int, ...]:
    """One tile."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    side = vision.image_size // vision.patch_size
    return 1, side, side


def plan_vision(model: nn.Module, grids: Tensor, device: torch.device | str) -> None:
    """There is nothing to derive: every picture is one tile."""


def run_vision(model: nn.Module, pixels: Tensor, plan: None) -> tuple[Tensor, ...]:
    """The one output of the vision path, [N, C]."""
    return (model.model.multi_modal_projector(tower(model, pixels, plan)),)  # type: ignore[union-attr, operator]


def see(model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
    """int64[M, 3] -> ([N, C],): for generation."""
    return run_vision(model, pixels, None)

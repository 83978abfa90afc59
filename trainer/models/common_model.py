"""What every family's torch side does alike: its model with random weights or memory only, and rotary frequencies that
a cast has rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainer.step import attention
from trainer.step.loss import as_head


def build_model(
    model_class: Any,
    config_class: Any,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    init: bool,
    segments_as: str | dict[str, str] = attention.NAME,
) -> Any:
    """A model of transformers' kind with random weights (`init`) or with memory only; with attn_implementation
    "segments" its head computes the loss over target rows in chunks.

    Args:
        config: config.json; model_type and architectures follow from the classes.
        segments_as: what "segments" means to the model, where its parts differ.
    """
    ours = attn_implementation == attention.NAME
    if ours:
        attention.register()
    parsed = config_class(**{key: value for key, value in config.items() if key not in ("architectures", "model_type")})
    made: dict[str, Any] = {"dtype": dtype, "attn_implementation": segments_as if ours else attn_implementation}
    if init:
        model = model_class._from_config(parsed, **made)
    else:
        with no_init_weights():
            model = model_class._from_config(parsed, **made)
    model.tie_weights()  # no_init_weights and zero.Init leave it undone
    if ours:
        as_head(model.lm_head)
    return model


def exact_rotary(rotary: Any) -> None:
    """Compute a language model's rotary frequencies again, in fp32, as transformers keeps them whatever the weights'
    dtype."""
    kind = rotary.rope_type
    compute: Any = rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    set_frequencies(rotary, *compute(rotary.config))


def set_frequencies(rotary: Any, frequencies: Tensor, scaling: float) -> None:
    rotary.attention_scaling = scaling
    for name in ("inv_freq", "original_inv_freq"):
        old = getattr(rotary, name)
        setattr(rotary, name, nn.Buffer(frequencies.to(old.device, torch.float32), persistent=False))

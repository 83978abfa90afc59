"""The language model inside a vision-language model, alone: for step init, which trains one on text.

It stands in a folder in the layout of a released language model, so that what follows reads it as it would a real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_NOT_SHARED = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "layer_types", "head_dim")


def causal_config(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """config.json of a language model of type `model_type` (qwen2, qwen3, llama, mistral) with the shape of the one in
    a vision-language model's config.

    M-RoPE with three equal ids is exactly the plain rotation, so text-only training needs no sections. What the config
    leaves out is filled in from the vision-language model's class: the language model's own defaults differ
    (rms_norm_eps of Qwen2).
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    given = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    text = AutoConfig.for_model(config["model_type"], **given).get_text_config()
    alone = AutoConfig.for_model(model_type)
    known = set(alone.to_dict()) - set(_NOT_SHARED)
    shared = {key: value for key, value in text.to_dict().items() if key in known}
    rope = {key: value for key, value in text.rope_parameters.items() if not key.startswith("mrope")}
    if (size := getattr(text, "head_dim", None)) is not None and hasattr(alone, "head_dim"):
        shared["head_dim"] = size
    return {
        **shared,
        "model_type": model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "rope_parameters": rope,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.tie_word_embeddings)),
    }


def build_causal(config: Mapping[str, Any], *, seed: int) -> nn.Module:
    """A language model with random weights that depend on the seed alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    content = {key: value for key, value in config.items() if key != "architectures"}
    parsed = AutoConfig.for_model(content.pop("model_type"), **content)
    return AutoModelForCausalLM.from_config(parsed, attn_implementation="sdpa")

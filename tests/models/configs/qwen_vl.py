"""Qwen-VL with 16 queries, an adapter wider than the tower (so it has kv_proj), pictures of 8 x 8 patches (so both
tables of positions are resized), logn and dynamic ntk as released."""

from __future__ import annotations

from typing import Any

FAMILY = "qwen_vl"
HUGGING_FACE = False


def config() -> dict[str, Any]:
    return {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 12,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "seq_length": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "visual": {
            "image_size": 112,
            "patch_size": 14,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": 2.5,
            "output_dim": 48,
            "n_queries": 16,
        },
    }

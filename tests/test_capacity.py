"""Memory of a rank: counts are exact, and the arithmetic says no where it must."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.capacity import GIB, memory_of, sizes_of, table
from trainer.errors import ModelError
from trainer.resolve import load_recipe

# Qwen2.5-VL-7B-Instruct's config.json as released, the fields that shapes follow from
RELEASED_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}


def test_parameters_of_the_released_7b_are_counted_exactly() -> None:
    sizes = sizes_of(RELEASED_7B)
    assert sizes.parameters["llm"] == 7_615_616_512  # as Qwen2.5-7B
    assert sizes.parameters["vision"] + sizes.parameters["merger"] == 676_550_144


@pytest.mark.slow
def test_the_tiny_models_groups_are_counted_as_torch_counts_them() -> None:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = load_recipe("tiny").model.config
    assert isinstance(config, dict)
    config = {**config, "text_config": {**config["text_config"], "vocab_size": 1024}}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(**{k: v for k, v in config.items() if k != "model_type"})
        )
    found = {"vision": 0, "merger": 0, "llm": 0}
    for name, parameter in model.named_parameters():
        found["merger" if ".merger." in name else "vision" if ".visual." in name else "llm"] += parameter.numel()
    assert sizes_of(config).parameters == found


def test_more_ranks_need_less_and_frozen_groups_need_no_optimizer() -> None:
    recipe = load_recipe("qwen2_5_vl_7b")
    narrow = load_recipe("qwen2_5_vl_7b", ["stages.stage2.compute.nodes=1"])
    stage1, stage2 = (memory_of(recipe, stage, RELEASED_7B) for stage in ("stage1", "stage2"))
    assert stage1.parts["master and moments"] * 10 < stage2.parts["master and moments"]
    assert memory_of(narrow, "stage2", RELEASED_7B).parts["weights"] > 10 * stage2.parts["weights"]


@pytest.mark.parametrize(("gpu_gib", "want"), [(80, True), (16, False)])
def test_a_gpu_that_is_too_small_is_told(gpu_gib: int, want: bool) -> None:
    needed = memory_of(load_recipe("qwen2_5_vl_7b"), "stage2", RELEASED_7B, gpu_bytes=gpu_gib * GIB)
    assert needed.fits is want
    assert ("does not fit" in table(needed)) is not want


def test_a_config_without_a_field_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"config\.num_key_value_heads"):
        sizes_of({key: value for key, value in RELEASED_7B.items() if key != "num_key_value_heads"})
    with pytest.raises(ModelError, match="qwen2_5_vl only"):
        sizes_of({"model_type": "llama"})

"""LLaVA-1.6: which grid, tokens and pixels pictures of every shape have, as transformers' processor says."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.configs import llava_next
from tests.models.test_llava import RELEASED, a_picture, pixel_values
from trainer.errors import ModelError
from trainer.models.family import Family, load_family, parts_of
from trainer.recipe import Pixels

CONFIG = {"model_type": "llava_next", "text_config": {"model_type": "mistral", "sliding_window": None}}
"""As released: everything else is a default."""
THIN = [(1, 4000), (4000, 1), (3000, 2), (2, 3000), (1, 1), (7, 5)]


def random_sizes(count: int) -> list[tuple[int, int]]:
    """(width, height) of all shapes and magnitudes, the released grids and their neighbours among them."""
    rng = random.Random(3)
    near = [(w + rng.randint(-2, 2), h + rng.randint(-2, 2)) for w in (336, 672, 1008) for h in (336, 672, 1008)]
    wide = [tuple(round(10 ** rng.uniform(0.5, 3.6)) for _ in range(2)) for _ in range(count)]
    return [*near, *THIN, *wide]  # type: ignore[list-item]


def a_grid(family: Family, size: tuple[int, int]) -> Any:
    return family.image_grid(*size, min_pixels=1, max_pixels=1)


def a_processor(family: Family) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.models.llava_next import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    files = family.processor_files(Pixels())
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<image>": 0, "x": 1}, unk_token="x")))
    settings = json.loads(files["processor_config.json"])
    del settings["processor_class"]
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**json.loads(files["preprocessor_config.json"])), words, **settings
    )


@pytest.mark.parametrize("config", [CONFIG, llava_next.config()], ids=["released", "small"])
def test_counts_from_the_header_are_the_processors_for_every_size(config: dict[str, Any]) -> None:
    family = load_family("llava_next", config)
    processor, sizes = a_processor(family), random_sizes(2000)
    theirs = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    ours = [family.visual_tokens(a_grid(family, size)) for size in sizes]
    assert ours == theirs.num_image_tokens
    assert len(set(ours)) > 15


def test_a_square_and_a_wide_picture_have_the_counts_that_follow_from_the_rule() -> None:
    family = load_family("llava_next", CONFIG)
    square, wide, usual = (a_grid(family, size) for size in ((800, 800), (1000, 500), (800, 600)))
    assert (family.grid_row(square), family.visual_tokens(square)) == ((5, 24, 24, 2, 2, 0, 0), 576 + 48 * 49)
    assert (family.grid_row(wide), family.visual_tokens(wide)) == ((3, 24, 24, 1, 2, 0, 0), 576 + 24 * 49)
    assert (family.grid_row(usual), family.visual_tokens(usual)) == ((5, 24, 24, 2, 2, 6, 0), 576 + 36 * 49)
    assert family.patches(usual) == 5 * 576


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (112, 112), (300, 17), (13, 200), (41, 43), (1, 50), (500, 333)])
def test_pixels_are_those_of_the_processor(size: tuple[int, int]) -> None:
    family = load_family("llava_next", llava_next.config())
    picture, grid = a_picture(*size), a_grid(family, size)
    patches = family.image_patches(picture, grid)
    assert len(patches) == family.patches(grid)
    theirs = a_processor(family).image_processor(images=[picture], return_tensors="np")
    assert theirs["image_sizes"].tolist() == [[size[1], size[0]]]
    assert np.abs(pixel_values(family, patches) - theirs["pixel_values"][0]).max() < 1e-5


@pytest.mark.parametrize("size", [(90, 70), (300, 17), (13, 200), (1, 50), (112, 112), (168, 56)])
def test_tokens_are_in_the_order_of_pack_image_features(size: tuple[int, int]) -> None:
    family = load_family("llava_next", llava_next.config())
    model, parts, grid = family.build(dtype=torch.float32), parts_of(family), a_grid(family, size)
    features = torch.randn(family.patches(grid), 48)
    plan = parts.plan_vision(model, torch.tensor([family.grid_row(grid)]), "cpu")
    newline = model.model.image_newline
    ours = torch.cat([features, newline.expand(plan.num_rows, -1)])[plan.order]
    (theirs,), _ = model.model.pack_image_features(
        [features.view(grid.t, -1, 48)], torch.tensor([[size[1], size[0]]]), "default", image_newline=newline
    )
    assert torch.equal(ours, theirs)
    assert len(ours) == family.visual_tokens(grid) and len(set(plan.order.tolist())) == len(ours)


def test_image_newline_gets_a_gradient_from_a_dummy_and_from_a_picture_too_thin_for_a_row() -> None:
    family = load_family("llava_next", llava_next.config())
    parts, model = parts_of(family), family.build(dtype=torch.float32, attn_implementation="segments")
    for row in (parts.dummy_grid(model), family.grid_row(a_grid(family, (4000, 1)))):
        model.zero_grad(set_to_none=True)
        pixels = torch.randn(row[0] * row[1] * row[2], family.patch_width)
        (seen,) = parts.run_vision(model, pixels, parts.plan_vision(model, torch.tensor([row]), "cpu"))
        seen.sum().backward()
        without = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is None and family.group_of(name) != "llm" and not family.constant(name)
        ]
        assert without == []


def test_weights_go_between_the_trainers_model_and_transformers() -> None:
    """As evaluation shares them; image_newline is the merger's, under its one name."""
    family = load_family("llava_next", llava_next.config())
    ours, theirs = (family.build(dtype=torch.float32, attn_implementation=name) for name in ("segments", None))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    names = [name for name, _ in ours.named_parameters() if "image_newline" in name]
    assert names == [RELEASED["image_newline"]] and family.group_of(names[0]) == "merger"


def test_the_language_model_names_the_template() -> None:
    assert load_family("llava_next", CONFIG).template.name == "mistral_instruct"
    assert load_family("llava_next", {"model_type": "llava_next"}).template.name == "vicuna_v1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_pinpoints": [[56, 100]]}, "a grid that tiles do not fill"),
        ({"text_config": {"model_type": "mistral"}}, "sliding window"),
        ({"text_config": {"model_type": "mistral", "sliding_window": 128}}, "sliding window"),
        ({"text_config": {"model_type": "qwen2"}}, "no such language model"),
    ],
)
def test_configs_that_cannot_be_trained_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_family("llava_next", llava_next.config() | change)

"""config.json as released, saved again by transformers, or damaged: read as transformers does, or one ModelError."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from tests.data.builders import a_tokenizer, tokenizer_json
from tests.models import builders
from tests.models.configs import llava, llava_next, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from trainer.before.init import import_warnings, run_init
from trainer.errors import DataError, ModelError, RecipeError
from trainer.flops import Cost
from trainer.models import hub, initial, released
from trainer.models import qwen2_5_vl as qwen25
from trainer.models import qwen2_vl as qwen2
from trainer.models import qwen3_vl as qwen3
from trainer.models.cautions import cautions
from trainer.models.config import assumed, model_config
from trainer.models.family import load_family
from trainer.models.qwen_vl import TEXT_DEFAULTS, QwenVL
from trainer.models.templates import chat_template_of, chat_template_warnings
from trainer.recipe import Pixels, Train
from trainer.resolve import load_recipe

MODULES = {module.FAMILY: module for module in (llava, llava_next, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl)}
RELEASED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PUBLISHED = Path(__file__).parent / "published"


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """The config of tests/models/configs with fields replaced; __ goes into a section, ... takes a field away."""
    content = MODULES[name].config()
    for path, value in changes.items():
        *sections, field = path.split("__")
        at = content
        for section in sections:
            at = at[section]
        if value is ...:
            at.pop(field, None)
        else:
            at[field] = value
    return content


# ---------------------------------------------------------------- what is filled in


def test_a_config_that_transformers_trimmed_is_read_as_transformers_reads_it() -> None:
    """vision_config of Qwen2.5-VL-7B as transformers 4.49 and 4.50 saved it."""
    vision = {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
    }
    family = load_family("qwen2_5_vl", {"model_type": "qwen2_5_vl", "vision_config": vision})
    with torch.device("meta"):
        model = family.build(dtype=torch.bfloat16, init=False)
    shape = family.shape()
    assert (shape.full_layers, shape.windowed_layers, shape.window) == (4, 28, 8)
    layers = [p.numel() for n, p in model.model.visual.blocks.named_parameters() if n.endswith("weight") and p.ndim > 1]
    assert shape.patch_weights == sum(layers) + 1280 * family.patch_width
    assert family.tokens_per_second == 2


@pytest.mark.parametrize(
    ("text", "vision", "config"),
    [
        (released.TEXT_DEFAULTS, qwen2.VISION_DEFAULTS, Qwen2VLConfig()),
        (released.TEXT_DEFAULTS, qwen25.VISION_DEFAULTS, Qwen2_5_VLConfig()),
        (qwen3.TEXT_DEFAULTS, qwen3.VISION_DEFAULTS, Qwen3VLConfig()),
    ],
)
def test_defaults_are_those_of_transformers(text: dict[str, Any], vision: dict[str, Any], config: Any) -> None:
    assert dict(text) == {name: getattr(config.text_config, name) for name in text}
    assert vision == {name: getattr(config.vision_config, name) for name in vision}


def test_qwen_vls_defaults_are_those_of_its_class() -> None:
    from trainer.models.qwen_vl_port_model import QWenConfig

    assert {name: getattr(QWenConfig(), name) for name in TEXT_DEFAULTS} == TEXT_DEFAULTS
    left_out = changed("qwen_vl", hidden_size=..., intermediate_size=..., visual__image_size=...)
    assert QwenVL.from_config(left_out).shape().text_width == 4096


@pytest.mark.parametrize(("other", "got"), [("gpt2", "gpt2"), (None, "nothing"), (..., "nothing")])
@pytest.mark.parametrize("name", MODULES)
def test_the_config_of_another_model_is_refused(name: str, other: Any, got: str) -> None:
    own = MODULES[name].config()["model_type"]
    with pytest.raises(ModelError, match=rf"of another model\n  where: model_type\n  expected: {own}\n  got: {got}"):
        load_family(name, changed(name, model_type=other))


@pytest.mark.parametrize("name", MODULES)
def test_null_sections_are_left_out_sections(name: str) -> None:
    if name == "qwen_vl":
        pytest.skip("without visual it is Qwen-7B: test_qwen_vl.py")
    family = load_family(name, {"model_type": name, "vision_config": None, "text_config": None})
    assert family.shape() == load_family(name, {"model_type": name}).shape()


# ---------------------------------------------------------------- one error with the field's path


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2_5_vl", {"vision_config": "tower"}, "vision_config"),
        ("qwen2_vl", {"text_config": [1]}, "text_config"),
        ("qwen2_5_vl", {"vision_config__depth": None}, "vision_config.*depth: None"),
        ("qwen2_5_vl", {"vision_config__fullatt_block_indexes": 7}, "fullatt_block_indexes: 7.*list"),
        ("qwen2_5_vl", {"vision_config__tokens_per_second": None}, "tokens_per_second.*whole number"),
        ("qwen2_vl", {"vision_config__patch_size": "14"}, "vision_config.*patch_size: '14'"),
        ("qwen2_vl", {"text_config__hidden_size": 0}, "text_config.*hidden_size: 0"),
        ("qwen3_vl", {"text_config__head_dim": None}, "text_config.*head_dim: None"),
        ("qwen3_vl", {"vision_config__deepstack_visual_indexes": None}, "deepstack_visual_indexes: None"),
        ("llava", {"vision_config": 3}, "vision_config"),
        ("llava", {"vision_config__image_size": 5.5}, "vision_config.*image_size: 5.5"),
        ("llava", {"text_config__vocab_size": None}, "text_config.*vocab_size: None"),
        ("llava", {"vision_config__image_size": 340, "vision_config__patch_size": 14}, "patches do not fill.*of.*14"),
        ("llava_next", {"image_grid_pinpoints": [336, 672]}, "image_grid_pinpoints.*height, width"),
        ("llava_next", {"image_grid_pinpoints": [[336, None]]}, "image_grid_pinpoints.*height, width"),
        ("qwen_vl", {"visual": {}}, "width: missing.*layers: missing.*mlp_ratio: missing"),
        ("qwen_vl", {"visual__output_dim": ...}, "visual.*output_dim: missing"),
        ("qwen_vl", {"visual__n_queries": None}, "visual.*n_queries: None"),
        ("qwen_vl", {"num_hidden_layers": None}, "num_hidden_layers: None"),
        ("qwen2_5_vl", {"text_config__use_sliding_window": True}, "sliding window"),
        ("qwen2_vl", {"text_config__layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
    ],
)
def test_what_is_no_size_is_told_with_its_field(name: str, changes: dict[str, Any], said: str) -> None:
    load_family(name, changed(name))
    with pytest.raises(ModelError, match=f"(?s){said}"):
        load_family(name, changed(name, **changes))


def test_no_key_values_heads_means_as_many_as_heads() -> None:
    none, four = (changed("qwen2_vl", text_config__num_key_value_heads=heads) for heads in (None, 4))
    assert load_family("qwen2_vl", none).shape() == load_family("qwen2_vl", four).shape()


# ---------------------------------------------------------------- tokens_per_second


@pytest.mark.parametrize("rate", [2.5, math.inf, math.nan, 0.5])
def test_a_rate_that_is_not_exported_as_it_is_trained_is_refused(rate: float) -> None:
    with pytest.raises(ModelError, match=r"vision_config\.tokens_per_second"):
        load_family("qwen2_5_vl", changed("qwen2_5_vl", vision_config__tokens_per_second=rate))
    with pytest.raises(RecipeError, match=r"model\.tokens_per_second"):
        load_family("qwen2_5_vl", changed("qwen2_5_vl"), tokens_per_second=rate)


def test_the_recipes_rate_stands_over_a_bad_one_of_the_config() -> None:
    family = load_family("qwen2_5_vl", changed("qwen2_5_vl", vision_config__tokens_per_second=2.5), tokens_per_second=4)
    assert family.tokens_per_second == 4 and family.export_config()["vision_config"]["tokens_per_second"] == 4


def test_a_rate_left_out_is_transformers_own_and_told() -> None:
    content = changed("qwen2_5_vl", vision_config__tokens_per_second=...)
    family = load_family("qwen2_5_vl", content)
    theirs: Any = Qwen2_5_VLConfig().vision_config
    assert family.tokens_per_second == theirs.tokens_per_second == 4
    assert family.export_config()["vision_config"]["tokens_per_second"] == 4
    recipe = load_recipe("tiny", [f"model.config={json.dumps(content)}", "model.tokens_per_second=null"])
    assert recipe.model.config == content
    assert [field for field, _ in cautions(recipe)] == ["model.config"]
    (told,) = assumed(recipe)
    assert "4 is taken" in told and "have 2" in told
    assert assumed(load_recipe("tiny", [])) == () == load_family("qwen2_5_vl", changed("qwen2_5_vl")).assumed


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", RELEASED)
def test_the_end_of_text_is_learned_as_an_input(name: str, flat: bool) -> None:
    content = changed(name, text_config__vocab_size=512, text_config__pad_token_id=3)
    if flat:
        content = content.pop("text_config") | content
    if flat and name == "qwen3_vl":  # transformers reads no flat config of it
        with pytest.raises(ModelError, match="move the language model's fields into text_config"):
            load_family(name, content)
        return
    family = load_family(name, content)
    family = load_family(name, family.with_tokens(a_tokenizer().id))
    end = a_tokenizer().id(family.markers.eos)
    model = family.build(dtype=torch.float32)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx is None and embedding.weight[end].abs().sum() > 0
    embedding(torch.tensor([end])).sum().backward()
    assert embedding.weight.grad[end].eq(1).all()


def a_base(folder: Path, config: dict[str, Any]) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    unset = [f"model.{name}=null" for name in ("config", "init", "pretrain", "tokenizer", "vocab_size")]
    return load_recipe("tiny", [f"model.base={folder}", *unset])


def test_a_base_that_leaves_out_its_rows_has_those_of_its_class(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = a_base(tmp_path, changed("qwen2_5_vl"))
    assert model_config(recipe, str(tmp_path))["text_config"]["vocab_size"] == 152064
    defaults = dict(qwen25.Qwen25VL.text_defaults) | {"vocab_size": 300}  # as Llama's 32000 beside a tokenizer of 32064
    monkeypatch.setattr(qwen25.Qwen25VL, "text_defaults", defaults)
    with pytest.raises(ModelError, match=r"(?s)more tokens.*at most 300"):
        model_config(recipe, str(tmp_path))


def lacking(*tokens: str, has: tuple[str, ...]) -> Callable[[str], int]:
    known = ("<s>", "</s>", "<image>", *has)

    def id_of(token: str) -> int:
        if token not in known or token in tokens:
            raise DataError("the tokenizer lacks a token", where=token)
        return known.index(token)

    return id_of


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize(
    ("has", "without", "said"),
    [(("<|im_start|>",), (), "ChatML"), (("<|begin_of_text|>",), ("<s>", "</s>"), "Llama 3")],
)
def test_a_llama_of_another_template_is_refused(
    name: str, has: tuple[str, ...], without: tuple[str, ...], said: str
) -> None:
    family = load_family(name, changed(name))
    assert family.with_tokens(lacking(has=()))["image_token_index"] == 2
    with pytest.raises(ModelError, match=f"(?s)chat template.*{said}"):
        family.with_tokens(lacking(*without, has=has))


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("image_size", [112, 448])
def test_qwen_vls_adapter_costs_what_torch_counts_whatever_the_configs_size(image_size: int) -> None:
    """Queries are a cost of the picture, not of its patches: pictures of 4 x 4 and of 8 x 8."""
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.models.family import parts_of
    from trainer.models.qwen_vl_vision_model import POSITIONS

    aten = torch.ops.aten
    family = load_family("qwen_vl", changed("qwen_vl", visual__image_size=image_size, vocab_size=64))
    model, cost = family.build(dtype=torch.float32), Cost(family.shape(), Train(vision=True, merger=True, llm=True))
    for side in (4, 8):
        grids = torch.tensor([[1, side, side]] * 2)
        plan = parts_of(family).plan_vision(model, grids, "cpu")
        pixels = torch.zeros(2 * side * side, family.patch_width)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            parts_of(family).run_vision(model, pixels, plan)
        found = cost.forward([], grids.tolist(), 0).vision - cost._vision_attention(grids.tolist())
        counts = counter.get_flop_counts()["Global"]
        products = sum(counts[kind] for kind in (aten.mm, aten.addmm, aten.convolution))
        tables = 2 * side**2 * POSITIONS * 32 + (2 * side**2 * 16 * 48 if side != 4 else 0)  # resized once a call
        assert found + tables + 2 * 16 * 48**2 == products  # and the queries projected once


# ---------------------------------------------------------------- chat templates and old saves of a base


def test_a_thinking_base_is_told(tmp_path: Path) -> None:
    family = load_family("qwen3_vl", changed("qwen3_vl"))
    instruct = (PUBLISHED / "qwen3_vl.jinja").read_text(encoding="utf-8")
    assert chat_template_warnings(family, instruct) == [] == chat_template_warnings(family, None)
    thinking = instruct.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    assert thinking != instruct
    (told,) = chat_template_warnings(family, thinking)
    assert "<think>" in told
    assert import_warnings(family, str(tmp_path)) == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": thinking}))
    assert chat_template_of(str(tmp_path)) == thinking and import_warnings(family, str(tmp_path)) == [told]
    (tmp_path / "chat_template.jinja").write_text(instruct)  # which transformers takes first
    assert import_warnings(family, str(tmp_path)) == []
    (told,) = chat_template_warnings(family, "{{ raise_exception('text only') }}")
    assert "does not render" in told and "text only" in told


@pytest.mark.parametrize("name", MODULES)
def test_the_exported_template_is_that_of_training(name: str) -> None:
    family = load_family(name, changed(name))
    assert chat_template_warnings(family, family.processor_files(Pixels())["chat_template.jinja"]) == []


def test_the_published_template_of_qwen2_vl_writes_what_ours_does() -> None:
    published = (PUBLISHED / "qwen2_vl.jinja").read_text(encoding="utf-8")
    for name in ("qwen2_vl", "qwen2_5_vl"):
        assert chat_template_warnings(load_family(name, changed(name)), published) == []


def test_a_base_with_saved_buffers_is_a_base(tmp_path: Path) -> None:
    """Older versions of transformers saved rotary_emb.inv_freq with every layer."""
    config = changed("qwen2_5_vl", text_config__vocab_size=512)
    recipe, out = a_base(tmp_path / "base", config), str(tmp_path / "out")
    family = load_family("qwen2_5_vl", config)
    tensors = {
        name: tensor.clone() for name, tensor in initial.random_tensors(family, seed=1, dtype=torch.float32).items()
    }
    path = tmp_path / "base" / "model.safetensors"
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, path)
    assert run_init(recipe, out).model is not None
    model = family.build(dtype=torch.float32)
    digests = hub.load(model, str(tmp_path / "base"), family, dtype=torch.float32)
    assert digests.keys() == tensors.keys()
    for name, parameter in hub.parameters_by_hub_name(model, family).items():
        assert torch.equal(parameter, tensors[name])
    save_file(load_file(path) | {"model.layers.0.other": torch.ones(6)}, path)  # what no version saved stays an error
    with pytest.raises(ModelError, match=r"extra model\.layers\.0\.other"):
        hub.load(model, str(tmp_path / "base"), family, dtype=torch.float32)


def test_every_family_is_here() -> None:
    assert set(MODULES) == set(builders.names())

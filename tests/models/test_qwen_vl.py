"""Qwen-VL: its parts against references (transformers has no such class), and what only this family has."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from tests.data.builders import a_sample, a_video, an_image, says
from tests.models.builders import Built, inputs_of
from tests.models.configs.qwen_vl import config
from trainer.data.encode import encode
from trainer.data.layout import Drop, Fit, fit_sample, layout
from trainer.data.pieces import Shown
from trainer.data.sample import Box, Image, Object, Objects, Video
from trainer.errors import ModelError, RecipeError
from trainer.models.family import load_family
from trainer.models.qwen_vl import POS_EMBED, QwenVL
from trainer.models.qwen_vl_model import PARTS as parts
from trainer.models.qwen_vl_port_model import ntk_alpha
from trainer.models.qwen_vl_vision_model import Resampler, VisionTransformer, VisualAttentionBlock, plan_of, sin_cos_2d
from trainer.step.attention import segments_of

PUBLISHED = json.loads((Path(__file__).parent / "published" / "qwen_vl.json").read_text(encoding="utf-8"))
START = 290
FAMILY = QwenVL.from_config(config())


def a_model(*, attention: str | None = None, **changes: Any) -> Any:
    """Random weights with which every part matters, outside training."""
    content: dict[str, Any] = config() | {"vocab_size": 300} | changes
    if content["visual"] is None:
        del content["visual"]
    else:
        content["visual"] = content["visual"] | {"image_start_id": START}
    torch.manual_seed(3)
    model = parts.build(content, dtype=torch.float32, attn_implementation=attention)
    return drawn(model).eval()


@torch.no_grad()
def drawn(model: Any) -> Any:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            continue
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[0] / parameter.numel()) ** 0.5)
        elif "ln_" in name and name.endswith("weight"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


# ---------------------------------------------------------------- names


def test_names_and_shapes_are_the_published_ones() -> None:
    family = load_family("qwen_vl", PUBLISHED["config"])
    with torch.device("meta"):
        model = family.build(dtype=torch.bfloat16)
    want: dict[str, tuple[int, ...]] = {}
    for name, shape in PUBLISHED["tensors"].items():
        layers = next((count for prefix, count in PUBLISHED["layers"].items() if name.startswith(f"{prefix}.*")), 1)
        want |= {name.replace("*", str(number)): tuple(shape) for number in range(layers)}
    assert {family.hub_name(name): tuple(p.shape) for name, p in model.named_parameters()} == want
    assert len(want) == 3 + 32 * 8 + 18 + 48 * 12
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(9.6e9, rel=0.01), "the paper's table 1: 9.6B"
    assert not set(model.state_dict()) - set(want), "no buffer is stored beside them"


def test_groups_are_those_of_the_published_fine_tuning_and_sin_cos_is_constant() -> None:
    groups = {name.replace("*", "0"): FAMILY.group_of(name.replace("*", "0")) for name in PUBLISHED["tensors"]}
    assert {name for name, group in groups.items() if group == "merger"} == {n for n in groups if ".attn_pool." in n}
    assert groups["transformer.visual.proj"] == groups["transformer.visual.ln_post.weight"] == "vision"
    assert [name for name in groups if FAMILY.constant(name)] == [POS_EMBED]
    with pytest.raises(ModelError, match="no module group"):
        FAMILY.group_of("transformer.h_other.weight")


def test_the_published_config_keeps_its_sizes_and_loses_what_names_code() -> None:
    exported = load_family("qwen_vl", PUBLISHED["config"]).export_config()
    assert exported["visual"]["width"] == 1664 and exported["seq_length"] == 2048
    assert not {"auto_map", "torch_dtype", "fp16"} & set(exported)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model_type": "qwen2"}, ModelError, "another model"),
        ({"visual": None}, ModelError, "without a vision tower"),
        ({"visual": {"n_queries": 200}}, ModelError, "square"),
    ],
)
def test_a_config_that_is_no_qwen_vl_is_refused(change: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        QwenVL.from_config(config() | change)


def test_temporal_ids_are_refused() -> None:
    with pytest.raises(RecipeError, match="no temporal positions"):
        load_family("qwen_vl", config(), tokens_per_second=2)


# ---------------------------------------------------------------- vision tower


def to_open_clip(block: VisualAttentionBlock, heads: int) -> dict[str, Tensor]:
    """The key map: in_proj.weight -> in_proj_weight, rows from (head, q k v, width) to (q k v, head, width); the rest
    has the same names."""
    found = {}
    for name, tensor in block.state_dict().items():
        if name.startswith("attn.in_proj."):
            tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            name = name.replace("in_proj.", "in_proj_")
        found[name] = tensor
    return found


def test_a_tower_block_is_open_clips_after_the_key_map() -> None:
    from open_clip.transformer import ResidualAttentionBlock

    width, heads, pictures, side = 64, 4, 3, 5
    ours = drawn(VisualAttentionBlock(width, heads, 4.9231))
    theirs = ResidualAttentionBlock(width, heads, 4.9231, norm_layer=partial(nn.LayerNorm, eps=1e-6), batch_first=True)
    theirs.load_state_dict(to_open_clip(ours, heads))
    x = torch.randn(pictures, side * side, width)
    want = theirs(x).flatten(0, 1)
    assert (ours(x.flatten(0, 1), ((pictures, side),)) - want).abs().max() < 1e-5  # measured 0 (same operations)
    theirs.load_state_dict(to_open_clip(ours, 1))  # control: rows taken as OpenCLIP has them
    assert (theirs(x).flatten(0, 1) - want).abs().max() > 0.1


@pytest.mark.parametrize("side", [8, 16, 32])
def test_positions_are_resized_bicubically(side: int) -> None:
    visual = drawn(VisionTransformer(config()["visual"]))
    plan = plan_of(torch.tensor([[1, side, side]]), 16, "cpu")
    pixels = torch.randn(side * side, 588)
    table = visual.positional_embedding.view(1, 16, 16, -1).permute(0, 3, 1, 2)
    resized = interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
    x = visual.conv1(pixels.view(-1, 3, 14, 14)).flatten(1) + resized.permute(0, 2, 3, 1).flatten(0, 2)
    want = visual.transformer(visual.ln_pre(x), plan.shapes)
    assert (visual.encode(pixels, plan) - want).abs().max() < 2e-5
    assert (plan.tower[0] is None) == (side == 16), "the table itself at its own size"


def sin_cos(position: float, width: int) -> list[float]:
    frequencies = [10000.0 ** (-i / (width // 2)) for i in range(width // 2)]
    return [math.sin(position * f) for f in frequencies] + [math.cos(position * f) for f in frequencies]


def test_two_dimensional_sines_put_the_column_first() -> None:
    found = sin_cos_2d(32, 3)
    for row, column in product(range(3), range(3)):
        want = torch.tensor(sin_cos(column, 16) + sin_cos(row, 16))
        assert torch.allclose(found[3 * row + column], want, atol=1e-6)


@pytest.mark.parametrize("side", [4, 7, 16])
def test_the_adapter_is_torchs_attention_with_positions_on_queries_and_keys(side: int) -> None:
    ours = drawn(Resampler(16, 256, 64))  # two heads of 128
    theirs = nn.MultiheadAttention(256, 2, batch_first=True)
    theirs.load_state_dict(ours.attn.state_dict())
    plan = plan_of(torch.tensor([[1, side, side]] * 2), 16, "cpu")
    x = torch.randn(2, side * side, 64)
    values = ours.ln_kv(ours.kv_proj(x))
    table = ours.pos_embed.view(1, 4, 4, 256).permute(0, 3, 1, 2)
    resized = (
        interpolate(table, size=(side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)
    )
    queries = (ours.ln_q(ours.query) + ours.pos_embed).expand(2, -1, -1)
    want = theirs(queries, values + resized, values)[0].flatten(0, 1)
    got = ours(x.flatten(0, 1), plan)
    assert (got - want).abs().max() < 2e-5
    without = theirs(queries, values, values)[0].flatten(0, 1)  # control
    assert (got - without).abs().max() > 1e-2


def test_pictures_of_several_sizes_in_one_call_are_those_alone_in_their_order() -> None:
    visual = drawn(VisionTransformer(config()["visual"]))
    sides = [8, 4, 8, 6, 4]
    grids = torch.tensor([[1, side, side] for side in sides])
    pixels = torch.randn(sum(side * side for side in sides), 588)
    got, features = visual(pixels, plan_of(grids, 16, "cpu")), visual.patch_features(pixels, plan_of(grids, 16, "cpu"))
    at = 0
    for number, side in enumerate(sides):
        own, alone = slice(at, at + side * side), plan_of(grids[number : number + 1], 16, "cpu")
        assert (got[16 * number : 16 * (number + 1)] - visual(pixels[own], alone)).abs().max() < 1e-5
        assert (features[own] - visual.patch_features(pixels[own], alone)).abs().max() < 1e-5
        at += side * side


def test_what_is_no_square_picture_is_refused() -> None:
    for row in ([1, 4, 6], [2, 4, 4]):
        with pytest.raises(ValueError, match="square pictures"):
            plan_of(torch.tensor([row]), 16, "cpu")


# ---------------------------------------------------------------- language model


def as_qwen2(model: Any, *, base: float = 10000.0) -> Qwen2ForCausalLM:
    """The same weights as transformers' Qwen2: c_attn split in three, w2 is the gate and w1 the other half."""
    own = model.config
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=own.vocab_size, hidden_size=own.hidden_size, intermediate_size=own.intermediate_size // 2,
            num_hidden_layers=own.num_hidden_layers, num_attention_heads=own.num_attention_heads,
            num_key_value_heads=own.num_attention_heads, rms_norm_eps=own.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": base}, tie_word_embeddings=False,
        )
    )  # fmt: skip
    renamed = {"wte": "embed_tokens", "ln_f": "norm", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "visual" in name:
            continue
        name = name.replace("transformer.h.", "model.layers.").replace("transformer.", "model.")
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "c_attn" in name:
            for part, letter in zip(tensor.chunk(3), "qkv", strict=True):
                found[name.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part
            continue
        for old, new in {"attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj"}.items():
            name = name.replace(old, new)
        found[name.replace("mlp.c_proj", "mlp.down_proj")] = tensor
    theirs.load_state_dict(found)
    return theirs.eval()


def test_the_language_model_is_transformers_qwen2_once_its_matrices_are_split() -> None:
    ours = a_model(visual=None)
    ids = torch.randint(0, 280, (2, 50))
    got, want = ours(ids).logits, as_qwen2(ours)(ids).logits
    assert 0.3 < want.std() < 10
    assert (got - want).abs().max() < 1e-4 * want.std()


def test_beyond_the_trained_length_the_base_is_widened_and_queries_are_scaled() -> None:
    """40 tokens of a model trained on 16: alpha is 2^ceil(log2(40 / 16) + 1) - 1 = 7."""
    ids = torch.randint(0, 280, (1, 40))
    ours = a_model(visual=None, seq_length=16, use_logn_attn=False)
    base = 10000 * 7 ** (12 / 10)
    want = as_qwen2(ours, base=base)(ids).logits
    assert (ours(ids).logits - want).abs().max() < 1e-4 * want.std()
    assert (as_qwen2(ours)(ids).logits - want).abs().max() > 0.01, "control: the base of training"
    scaled = a_model(visual=None, seq_length=16, use_dynamic_ntk=False)
    plain = as_qwen2(scaled)(ids).logits
    got = scaled(ids).logits
    assert (got[:, :16] - plain[:, :16]).abs().max() < 1e-4 < (got[:, 20:] - plain[:, 20:]).abs().max()


def test_alpha_changes_exactly_at_each_doubling() -> None:
    lengths = torch.tensor([1, 2047, 2048, 2049, 4096, 4097, 8192, 8193])
    want = [max(2 ** math.ceil(math.log2(n / 2048) + 1) - 1, 1) for n in lengths.tolist()]
    assert ntk_alpha(lengths, 2048).tolist() == want == [1, 1, 1, 3, 3, 7, 7, 15]


def in_a_pack(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """Hidden states of samples side by side, as the trainer runs them."""
    starts = np.cumsum([0, *(len(row) for row in rows)])
    table = np.array([[starts[i], len(row), i, -1] for i, row in enumerate(rows)], np.int32)
    places = torch.cat([torch.arange(len(row)) for row in rows]).expand(4, -1)
    embeddings = parts.embed_tokens(model, torch.cat(rows))
    hidden = parts.run_language(model, embeddings, places, segments_of(table), (), torch.zeros(0, dtype=torch.long))
    return list(hidden.split([len(row) for row in rows]))


def test_a_pack_goes_by_the_length_of_each_sample_and_training_by_none() -> None:
    changes = {"visual": None, "seq_length": 16}
    packed, alone = a_model(attention="segments", **changes), a_model(**changes)
    rows = [torch.randint(0, 280, (length,)) for length in (12, 40, 14, 24)]
    with torch.no_grad():
        for got, row in zip(in_a_pack(packed, rows), rows, strict=True):
            assert (got - alone.transformer(row[None]).last_hidden_state[0]).abs().max() < 1e-5
        plain = as_qwen2(alone).model
        packed.train()
        for got, row in zip(in_a_pack(packed, rows), rows, strict=True):
            assert (got - plain(row[None]).last_hidden_state[0]).abs().max() < 1e-5
        beyond = in_a_pack(packed.eval(), rows)[1]
        assert (beyond - plain(rows[1][None]).last_hidden_state[0]).abs().max() > 1e-2, "control: the rules are on"


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("seq_length", [2048, 20])
def test_with_and_without_a_cache_come_the_same_tokens(seq_length: int) -> None:
    """The second model has left its trained length before it answers, and doubles it on the way."""
    model = a_model(seq_length=seq_length)
    ids = torch.randint(0, 280, (1, 30))
    ids[0, 5], ids[0, 6:22], ids[0, 22] = START, START + 2, START + 1
    asked = {"pixel_values": torch.randn(1, 3, 112, 112), "max_new_tokens": 40, "do_sample": False}
    asked |= {"no_repeat_ngram_size": 1, "return_dict_in_generate": True, "output_logits": True}
    cached, plain = (model.generate(ids, use_cache=on, **asked) for on in (True, False))
    assert cached.sequences.shape == (1, 70)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    errors = [float((got - want).abs().max()) for got, want in zip(cached.logits, plain.logits, strict=True)]
    assert max(errors) < 2e-5  # measured 2.4e-6
    asked["pixel_values"] = -asked["pixel_values"]
    other = model.generate(ids, **asked)
    assert float((other.logits[0] - cached.logits[0]).abs().max()) > 1e-2, "control: another picture"


def test_prompts_padded_on_the_left_are_answered_as_alone() -> None:
    model = a_model(visual=None, seq_length=16)
    rows = [torch.randint(0, 280, (length,)) for length in (6, 25)]
    asked = {"max_new_tokens": 12, "do_sample": False}
    padded = torch.stack([nn.functional.pad(row, (25 - len(row), 0)) for row in rows])
    mask = torch.tensor([[0] * (25 - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(padded, attention_mask=mask, pad_token_id=0, **asked)
    for row, answer in zip(rows, found, strict=True):
        assert answer[25:].tolist() == model.generate(row[None], **asked)[0, len(row) :].tolist()


def test_places_and_pictures_must_agree() -> None:
    ids = torch.full((1, 20), START + 2)
    with pytest.raises(ValueError, match="20 tokens <imgpad> for 1 pictures, which fill 16"):
        a_model()(ids, pixel_values=torch.zeros(1, 3, 112, 112))


# ---------------------------------------------------------------- the whole path


@pytest.fixture(scope="module")
def qwen(build: Callable[[str], Built]) -> Built:
    """This family as the rules have it; `built` would be every family."""
    return build("qwen_vl")


def test_raw_files_through_the_exported_processor_and_model_give_the_logits_of_a_pack(qwen: Built) -> None:
    for name, found in qwen.encoded.items():
        inputs = inputs_of(qwen, qwen.samples[name][0])
        assert inputs["input_ids"][0].tolist() == found.ids.tolist()
        with torch.no_grad():
            want = qwen.theirs(**inputs, use_cache=False).logits[0]
        got = qwen.logits(qwen.mine, qwen.batch(["short", name]))[-len(found.ids) :]
        assert (got - want).abs().max() < 1e-5  # measured at most 2.5e-6
        if name == "one":
            inputs["pixel_values"] = -inputs["pixel_values"]
            with torch.no_grad():
                other = qwen.theirs(**inputs, use_cache=False).logits[0]
            assert (got - other).abs().max() > 1e-2, "control: another picture"


def test_a_folder_is_opened_where_nothing_else_has_imported_the_port(qwen: Built) -> None:
    script = (
        "import sys; from trainer.after.opening import load_pretrained;"
        f"print(type(load_pretrained({qwen.export_uri!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["QWenLMHeadModel"], done.stderr[-2000:]


# ---------------------------------------------------------------- text and pictures


def test_the_chat_is_the_published_one(qwen: Built) -> None:
    """make_context, from_list_format (tokenization_qwen.py): the text around pictures and turns."""
    places = "<imgpad>" * 16
    want = {
        "two": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Picture 1: <img>{places}</img>\nandPicture 2: <img>{places}</img>\nWhat do they show?<|im_end|>\n"
        "<|im_start|>assistant\nA cat, and a rocket before its start.<|im_end|>\n",
        "short": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHello to you.<|im_end|>\n",
    }
    for name, text in want.items():
        assert qwen.tokenizer.decode(qwen.encoded[name].ids.tolist()) == text


# What preprocess() writes around system words and turns (finetune.py of QwenLM/Qwen-VL, Tongyi Qianwen licence, commit
# 0f31930594e1bcd27b3490a7d4a94b8e7ab5a8d9), and make_context() too (qwen_generation_utils.py of the copy that
# published/qwen_vl.json names); the words between are ours. Neither knows a tool: its turn is written as any other.
DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATS: dict[str, tuple[list[tuple[str, str]], str]] = {
    "two turns": (
        [("user", "Hi,  you\n"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")],
        f"{DEFAULT}<|im_start|>user\nHi,  you\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
    ),
    "own system and an empty answer": (
        [("system", "Be short."), ("user", "Hi"), ("assistant", ""), ("user", "So?"), ("assistant", "Yes")],
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    ),
    "tool": (
        [("user", "Go"), ("tool", "1"), ("assistant", "ok")],
        f"{DEFAULT}<|im_start|>user\nGo<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_the_published_scripts(qwen: Built, name: str) -> None:
    """As trained, and as the exported template writes it."""
    said, want = CHATS[name]
    sample = a_sample(*(says(role, text) for role, text in said))
    found = encode(sample, layout(sample, 0, Fit(), qwen.rules), [], qwen.rules)
    assert qwen.tokenizer.decode(found.ids.tolist()) == want
    messages = [{"role": role, "content": text} for role, text in said]
    assert render_jinja_template([messages], chat_template=qwen.processor.chat_template)[0] == [want]


def test_a_document_has_no_words_around_its_pictures() -> None:
    pieces = FAMILY.media_pieces(Shown("image", 0, 1, "document"))
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("special", "<img>"),
        ("image", ""),
        ("special", "</img>"),
    ]


@pytest.mark.parametrize(("pixels", "side"), [(50176, 16), (200704, 32), (200703, 31), (12544, 8), (1, 1)])
@pytest.mark.parametrize("size", [(640, 480), (30, 4000)])
def test_every_picture_is_the_square_of_the_budget(pixels: int, side: int, size: tuple[int, int]) -> None:
    grid = FAMILY.image_grid(*size, min_pixels=1, max_pixels=pixels)
    assert (grid.h, grid.w, grid.width) == (side, side, 14 * side)
    assert FAMILY.visual_tokens(grid) == 16 and FAMILY.patches(grid) == side * side
    assert load_family("qwen_vl", PUBLISHED["config"]).visual_tokens(grid) == 256


def test_a_video_is_dropped_and_counted(qwen: Built) -> None:
    sample = a_sample(
        says("user", Video(media=0), "What?"), says("assistant", "So."), files=(a_video(),), kinds=("video",)
    )
    found = fit_sample(sample, 0, qwen.rules)
    assert isinstance(found, Drop) and found.reason == "rendering" and "reads no video" in found.detail


def test_boxes_are_written_in_thousandths_between_the_published_tokens(qwen: Built) -> None:
    """Whatever square the picture becomes: (20, 30, 60, 45) of 80 x 60 is (250,500),(750,750)."""
    part = Objects(media=0, objects=(Object(at=Box(xyxy=(20, 30, 60, 45)), label="the cup"),))
    sample = a_sample(says("user", Image(media=0), "Where?"), says("assistant", part), files=(an_image(80, 60),))
    found = encode(sample, layout(sample, 0, Fit(), qwen.rules), [an_image(80, 60)], qwen.rules)
    assert qwen.tokenizer.decode(found.label_ids.tolist()) == (
        "<ref>the cup</ref><box>(250,500),(750,750)</box><|im_end|>"
    )

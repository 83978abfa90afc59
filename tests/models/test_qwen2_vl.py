"""Qwen2-VL: what only this family has. The rules of every family are in the other files here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.utils.chat_template_utils import render_jinja_template

from tests.data.builders import a_sample, a_tokenizer, an_image, says, some_rules
from tests.models.configs.qwen2_vl import config
from trainer.data.encode import encode
from trainer.data.layout import Fit, Span, layout
from trainer.data.pieces import Piece, Turn
from trainer.data.sample import Box, Object, Objects
from trainer.data.sample import Image as Picture
from trainer.errors import ModelError, RecipeError
from trainer.models import hub
from trainer.models.family import load_family
from trainer.models.qwen2_vl import Qwen2VL
from trainer.models.qwen2_vl_model import PARTS as parts
from trainer.models.released import CHAT_TEMPLATE

FAMILY = Qwen2VL.from_config(config())
PUBLISHED = (Path(__file__).parent / "published" / "qwen2_vl.jinja").read_text(encoding="utf-8")


def a_model(seed: int = 5, *, attention: str | None = "segments", **changes: Any) -> Any:
    torch.manual_seed(seed)
    content = config() | changes
    content["text_config"]["vocab_size"] = 64
    return Qwen2VL(content).build(dtype=torch.float32, attn_implementation=attention)


# ---------------------------------------------------------------- template

CHATS: dict[str, list[tuple[str, str]]] = {
    "two turns": [("user", "Hi,  you\n"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")],
    "own system": [("system", "Be short."), ("user", "Hi"), ("assistant", "Yes")],
    "pictures and a video": [("user", "<image>and<image>?"), ("assistant", "Two."), ("user", "<video>")],
    "tool and an empty answer": [("user", "Go"), ("tool", "1"), ("assistant", ""), ("user", "So?")],
}  # fmt: skip


def pieces_of(text: str) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for number, part in enumerate(text.replace("<video>", "<image>v").split("<image>")):
        kind = "video" if part.startswith("v") else "image"
        if number:
            marks = (Piece("special", "<|vision_start|>"), Piece(kind, media=0), Piece("special", "<|vision_end|>"))
            found += marks
        found.append(Piece("text", part.removeprefix("v") if number else part))
    return tuple(found)


def content_of(text: str) -> list[dict[str, str]]:
    pieces = [piece for piece in pieces_of(text) if piece.kind != "special"]
    return [{"type": piece.kind, **({"text": piece.text} if piece.kind == "text" else {})} for piece in pieces]


@pytest.mark.parametrize("open_turn", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_what_the_published_template_writes(name: str, open_turn: bool) -> None:
    turns = [Turn(role, pieces_of(text), role == "assistant") for role, text in CHATS[name]]
    messages = [{"role": role, "content": content_of(text)} for role, text in CHATS[name]]
    want = render_jinja_template([messages], chat_template=PUBLISHED, add_generation_prompt=open_turn)[0][0]
    found = FAMILY.template.conversation(turns, open_turn=open_turn)
    pads = {"image": FAMILY.markers.image_pad, "video": FAMILY.markers.video_pad}
    assert "".join(pads.get(piece.kind, piece.text) for piece in found) == want


def test_the_exported_template_is_the_published_one() -> None:
    assert PUBLISHED.split("-#}\n", 1)[1] == CHAT_TEMPLATE
    assert FAMILY.processor_files(some_rules().pixels)["chat_template.jinja"] == CHAT_TEMPLATE


# ---------------------------------------------------------------- pictures, tokens, positions


def test_a_picture_of_224_is_64_tokens_and_two_markers() -> None:
    data = an_image(224, 224)
    sample = a_sample(says("user", Picture(media=0), "?"), says("assistant", "x"), files=(data,))
    rules = some_rules(family=FAMILY)
    found = encode(sample, layout(sample, 0, Fit(), rules), [data], rules)
    names = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    counts = [found.ids.tolist().count(a_tokenizer().id(name)) for name in names]
    assert counts == [1, 64, 1] and found.grid_thw.tolist() == [[1, 16, 16]]


def test_an_image_is_two_equal_frames() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (56, 84, 3), np.uint8))
    grid = FAMILY.image_grid(84, 56, min_pixels=1, max_pixels=10**6)
    frames = FAMILY.image_patches(picture, grid).reshape(-1, 3, 2, 14, 14)
    assert len(frames) == 24 and (frames[:, :, 0] == frames[:, :, 1]).all()
    moving = np.stack([np.asarray(picture), 255 - np.asarray(picture)])
    frames = FAMILY.video_patches(moving, grid).reshape(-1, 3, 2, 14, 14)
    assert (frames[:, :, 0] == 255 - frames[:, :, 1]).all()


@pytest.mark.parametrize("num_frames", [4, 64, 240, 768])
def test_a_video_has_at_most_the_papers_16384_tokens(num_frames: int) -> None:
    """Section 2.1: 2 frames a second, the resolution of each chosen so that a video has at most 16384 tokens."""
    total = 16384 * 28 * 28
    bounds = {"min_pixels": 16 * 28 * 28, "max_pixels": 768 * 28 * 28, "total_pixels": total}
    grid = FAMILY.video_grid(num_frames, 1280, 720, **bounds)
    assert grid.t == num_frames // 2 and FAMILY.visual_tokens(grid) <= 16384
    if num_frames >= 64:
        assert FAMILY.visual_tokens(
            FAMILY.video_grid(num_frames, 1280, 720, **(bounds | {"total_pixels": 4 * total}))
        ) > (16384)


@pytest.mark.parametrize("seconds_per_grid", [0.05, 1.0, 4.0])
def test_temporal_ids_count_grid_rows_whatever_the_rate(seconds_per_grid: float) -> None:
    grid = FAMILY.video_grid(8, 84, 56, min_pixels=1, max_pixels=10**6, total_pixels=10**7)
    spans = [
        Span("text", 0, 3, (1, 2, 3)),
        Span("video", 0, 24, grid=grid, seconds_per_grid=seconds_per_grid),
        Span("text", 0, 2, (4, 5)),
    ]
    found = FAMILY.position_ids(spans)
    assert found[1].tolist() == [0, 1, 2, *(row + 3 for row in range(4) for _ in range(6)), 7, 8]
    assert found[2, 3:9].tolist() == [3, 3, 3, 4, 4, 4] and found[3, 3:9].tolist() == [3, 4, 5, 3, 4, 5]


def theirs(grid: Any, before: int, after: int) -> np.ndarray:
    """transformers' get_rope_index over text, one video and text: int64[3, L]."""
    tokens = FAMILY.visual_tokens(grid)
    kinds = torch.tensor([[0] * before + [2] * tokens + [0] * after])
    model = a_model(attention=None)
    index: Any = Qwen2VLModel.get_rope_index
    grids = torch.tensor([[grid.t, grid.h, grid.w]])
    rows, _ = index(model.model, torch.zeros_like(kinds), kinds, video_grid_thw=grids)
    return rows[:, 0].numpy()


def test_after_a_long_video_ids_differ_from_transformers_and_do_not_overlap() -> None:
    """Published rule: text goes on after the largest id of the video. transformers 5.23 goes on max(h, w) / 2 after its
    beginning, so that ids of 20 rows and of the text after them are the same."""
    for rows, equal in ((2, True), (3, True), (20, False)):
        grid = FAMILY.video_grid(2 * rows, 84, 56, min_pixels=1, max_pixels=10**6, total_pixels=10**8)
        assert (grid.t, grid.h // 2, grid.w // 2) == (rows, 2, 3)
        tokens = FAMILY.visual_tokens(grid)
        spans = [Span("text", 0, 4), Span("video", 0, tokens, grid=grid, seconds_per_grid=1.0), Span("text", 0, 5)]
        ours, other = FAMILY.position_ids(spans)[1:], theirs(grid, 4, 5)
        assert (ours[:, : 4 + tokens] == other[:, : 4 + tokens]).all()
        assert (ours == other).all() == equal
        assert ours[0, -5] == 4 + max(rows, 3) and other[0, -5] == 4 + 3
        in_video = set(ours[0, 4 : 4 + tokens].tolist())
        assert not in_video & set(ours[0, -5:].tolist())
        assert bool(in_video & set(other[0, -5:].tolist())) != equal


# ---------------------------------------------------------------- objects


def test_boxes_are_special_tokens_around_thousandths() -> None:
    data = an_image(120, 90)
    answer = Objects(media=0, objects=(Object(label="a cat", at=Box(xyxy=(12, 9, 60, 90))),))
    sample = a_sample(says("user", Picture(media=0), "Find"), says("assistant", answer), files=(data,))
    rules = some_rules(family=FAMILY)
    found = encode(sample, layout(sample, 0, Fit(), rules), [data], rules)
    want = "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,100),(500,1000)<|box_end|><|im_end|>"
    assert rules.tokenizer.decode(found.label_ids.tolist()) == want
    for name in FAMILY.special_tokens[3:7]:
        assert found.label_ids.tolist().count(rules.tokenizer.id(name)) == 1
    # negative control: the same words as text are no special tokens
    spelled = a_sample(says("user", Picture(media=0), "Find"), says("assistant", want[:-10]), files=(data,))
    ids = encode(spelled, layout(spelled, 0, Fit(), rules), [data], rules).label_ids.tolist()
    assert rules.tokenizer.id("<|box_start|>") not in ids


# ---------------------------------------------------------------- tower


@torch.no_grad()
def test_the_tower_attends_as_transformers_does() -> None:
    """Images of two sizes and a video in one call; error measured: 0 (features of standard deviation 0.57)."""
    mine, other = a_model(), a_model(attention=None)
    for parameter in mine.model.visual.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel()) ** -0.5)
    other.load_state_dict(mine.state_dict())
    grids = torch.tensor([[1, 4, 6], [3, 4, 4], [1, 2, 2], [1, 4, 6]])
    pixels = torch.randn(int(grids.prod(1).sum()), FAMILY.patch_width)
    (want,) = parts.see(other, pixels, grids)
    (got,) = parts.run_vision(mine, pixels, parts.plan_vision(mine, grids, "cpu"))
    assert got.shape == (25, 48) and (got - want).abs().max() < 5e-6
    # a picture sees itself alone, and a row of a video itself alone
    changed = pixels.clone()
    changed[24:40] += 1.0
    (moved,) = parts.run_vision(mine, changed, parts.plan_vision(mine, grids, "cpu"))
    differs = (moved - got).abs().amax(1) > 1e-4
    assert differs.tolist() == [False] * 6 + [True] * 4 + [False] * 15


# ---------------------------------------------------------------- names and sizes

RELEASED = {  # Qwen/Qwen2-VL-*-Instruct, config.json: hidden, intermediate, layers, heads, key-value heads, rows, tied
    "2b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}


def released(size: str) -> dict[str, Any]:
    """In the flat form of the released files, which transformers 4.45 wrote."""
    hidden, intermediate, layers, heads, kv, rows, tied = RELEASED[size]
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": hidden}
    sizes = {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": vision | sizes,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": rows, "tie_word_embeddings": tied,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "bos_token_id": 151643,
        "eos_token_id": 151645, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": layers,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "want"),
    # bytes of the released bf16 files (total_size of model.safetensors.index.json) / 2; 72B: the same arithmetic
    [("2b", 4_417_971_200 // 2), ("7b", 16_582_751_232 // 2), ("72b", 73_405_560_320)],
)
def test_released_configs_give_the_released_number_of_parameters(size: str, want: int) -> None:
    family = load_family("qwen2_vl", released(size))
    with torch.device("meta"):
        model = family.build(dtype=torch.bfloat16, attn_implementation="segments", init=False)
    groups: dict[str, int] = {"vision": 0, "merger": 0, "llm": 0}
    for name, parameter in model.named_parameters():
        groups[family.group_of(name)] += parameter.numel()
    assert sum(groups.values()) == want
    assert groups["vision"] == 32 * (12 * 1280**2 + 13 * 1280) + 1280 * FAMILY.patch_width
    rotary = model.config.text_config.rope_parameters
    assert rotary["mrope_section"] == [16, 24, 24] and rotary["rope_theta"] == 1e6
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == RELEASED[size][-1]
    shape = family.shape()
    linear = [layer for block in model.model.visual.blocks for layer in (*block.attn.children(), *block.mlp.children())]
    weights = sum(layer.weight.numel() for layer in linear if hasattr(layer, "weight"))
    assert shape.patch_weights == weights + 1280 * FAMILY.patch_width
    merger = sum(
        p.numel() for n, p in model.model.visual.merger.named_parameters() if n.endswith("weight") and p.ndim > 1
    )
    assert shape.merger_weights == merger / 4 and (shape.full_layers, shape.windowed_layers) == (32, 0)


NAMES = {  # names in the released files of 2024 -> those of transformers 5, by group
    "visual.patch_embed.proj.weight": ("model.visual.patch_embed.proj.weight", "vision"),
    "visual.blocks.1.norm1.bias": ("model.visual.blocks.1.norm1.bias", "vision"),
    "visual.blocks.0.attn.qkv.weight": ("model.visual.blocks.0.attn.qkv.weight", "vision"),
    "visual.blocks.0.mlp.fc1.bias": ("model.visual.blocks.0.mlp.fc1.bias", "vision"),
    "visual.merger.ln_q.weight": ("model.visual.merger.ln_q.weight", "merger"),
    "visual.merger.mlp.2.bias": ("model.visual.merger.mlp.2.bias", "merger"),
    "model.embed_tokens.weight": ("model.language_model.embed_tokens.weight", "llm"),
    "model.layers.1.self_attn.q_proj.bias": ("model.language_model.layers.1.self_attn.q_proj.bias", "llm"),
    "model.norm.weight": ("model.language_model.norm.weight", "llm"),
    "lm_head.weight": ("lm_head.weight", "llm"),
}


def test_names_of_both_layouts_go_to_the_same_group() -> None:
    known = dict(a_model().named_parameters())
    for old, (new, group) in NAMES.items():
        assert FAMILY.hub_name(new) == old == FAMILY.hub_name(old) and new in known
        assert FAMILY.model_name(old) == new == FAMILY.model_name(new)
        assert FAMILY.group_of(old) == FAMILY.group_of(new) == group
    with pytest.raises(ModelError, match="no module group"):
        FAMILY.group_of("audio.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_files_with_old_and_new_names_give_the_same_bits(tied: bool, tmp_path: Path) -> None:
    content: dict[str, Any] = config() | {"tie_word_embeddings": tied}
    content["text_config"] |= {"tie_word_embeddings": tied, "vocab_size": 64}
    family: Any = Qwen2VL(content)
    source = a_model(tie_word_embeddings=tied, text_config=content["text_config"])
    tensors = {name: parameter.detach() for name, parameter in source.named_parameters()}
    loaded = []
    for layout_name, rename in (("old", family.hub_name), ("new", family.model_name)):
        folder = tmp_path / layout_name
        folder.mkdir()
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        model = family.build(dtype=torch.float32, init=False)
        hub.load(model, str(folder), family, dtype=torch.float32)
        loaded.append(dict(model.named_parameters()))
    assert loaded[0].keys() == loaded[1].keys() == tensors.keys()
    assert ("lm_head.weight" in tensors) != tied
    for name, tensor in tensors.items():
        assert torch.equal(loaded[0][name], tensor) and torch.equal(loaded[1][name], tensor)


def test_another_models_config_and_a_rate_of_ids_are_refused() -> None:
    with pytest.raises(ModelError, match="another model"):
        Qwen2VL.from_config(config() | {"model_type": "qwen2_5_vl"})
    with pytest.raises(RecipeError, match=r"model\.tokens_per_second.*count grid rows"):
        Qwen2VL.from_config(config(), tokens_per_second=2)

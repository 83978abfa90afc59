"""LLaVA-1.5 (and what LLaVA-1.6 shares with it): templates, pixels, names, parts, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data.builders import a_sample, a_video, an_image, says, some_rules
from tests.models.configs import llava, llava_next
from trainer.after.scores import parse_boxes, parse_points
from trainer.before.init import import_warnings
from trainer.data.chat import MistralInstruct, Vicuna
from trainer.data.coordinates import Convention
from trainer.data.encode import encode
from trainer.data.layout import Drop, Fit, Fitted, fit_sample, layout
from trainer.data.objects import BracketObjects, Pen
from trainer.data.pieces import Piece, Turn
from trainer.data.sample import Box, Media, Object, Objects, Point, Sample, Span, Tools, Video
from trainer.data.sample import Image as Image_
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ModelError, RecipeError
from trainer.models import initial
from trainer.models.family import load_family
from trainer.models.tiles import CHAT_TEMPLATES, CLIP, CLIP_L, TEXT, TEXT_VOCAB
from trainer.recipe import Pixels

PICTURE = Piece("image", media=0)
PIXELS = Pixels()
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# Texts that get_prompt() gives for conv_vicuna_v1 in llava/conversation.py of haotian-liu/LLaVA (Apache-2.0), commit
# 053c284aee8995a0596fdda47b927a6d2a9b33cd, and for mistral_instruct (separator style LLAMA_2, separators "" and "</s>",
# no system text) in that of LLaVA-VL/LLaVA-NeXT (Apache-2.0), commit 7315dc19374bad832b9baf93f152c71eb1ec23de.
PUBLISHED = {
    "two turns": (
        [("user", [PICTURE, "What?"]), ("assistant", ["A cat."]), ("user", ["Why?"]), ("assistant", ["No."])],
        f"{SYSTEM}USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT: No.</s>",
        "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Why? [/INST] No. </s>",
    ),
    "pictures between words": (
        [("user", ["A", PICTURE, "B", PICTURE]), ("assistant", ["C"])],
        f"{SYSTEM}USER: <image>\n<image>\nAB ASSISTANT: C</s>",
        "[INST] <image>\n<image>\nAB [/INST] C </s>",
    ),
    "own system": (
        [("system", ["Be short."]), ("user", ["Hi"]), ("assistant", ["Yes"])],
        "Be short. USER: Hi ASSISTANT: Yes</s>",
        None,
    ),
}


def turns_of(said: list[Any]) -> list[Turn]:
    pieces = [
        (role, tuple(Piece("text", part, role == "assistant") if isinstance(part, str) else part for part in content))
        for role, content in said
    ]
    return [Turn(role, content, role == "assistant") for role, content in pieces]


def text_of(pieces: list[Piece]) -> str:
    return "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_conversation_has_the_published_templates_text(name: str) -> None:
    said, vicuna, mistral = PUBLISHED[name]
    assert text_of(Vicuna().conversation(turns_of(said))) == "<s>" + vicuna
    if mistral is None:
        with pytest.raises(ValueError, match="no words for a turn of 'system'"):
            MistralInstruct().conversation(turns_of(said))
    else:
        assert text_of(MistralInstruct().conversation(turns_of(said))) == "<s>" + mistral


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_exported_template_writes_the_same_text(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    said, *wants = PUBLISHED[name]
    content = [
        [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        for _, parts in said
    ]
    messages = [{"role": role, "content": parts} for (role, _), parts in zip(said, content, strict=True)]
    for template, want in zip(CHAT_TEMPLATES.values(), wants, strict=True):
        if want is not None:
            texts, _ = render_jinja_template(conversations=[messages], chat_template=template)
            assert texts == [want]


def test_the_space_before_an_answer_is_the_answers() -> None:
    turns = turns_of([("user", ["Q"]), ("assistant", ["A"])])
    for template, want in ((Vicuna(), " A</s>"), (MistralInstruct(), " A </s>")):
        whole = template.conversation(turns)
        assert "".join(piece.text for piece in whole if piece.target) == want
        asked = template.conversation(turns[:1], open_turn=True)
        assert text_of([*asked, *template.answer(turns[1:])]) == text_of(whole)
        assert not any(piece.target for piece in asked)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("user", "tool"), "no words for a turn of 'tool'"),
        (("user", "user"), "take turns, got two of 'user'"),
        (("assistant", "user"), "take turns"),
        (("user", "assistant", "system"), "no words for a turn of 'system' here"),
    ],
)
def test_other_roles_and_orders_have_no_words(roles: tuple[str, ...], message: str) -> None:
    turns = [Turn(role, (Piece("text", "x"),)) for role in roles]
    for template in (Vicuna(), MistralInstruct()):
        with pytest.raises(ValueError, match=message):
            template.conversation(turns)


# ---------------------------------------------------------------- objects


def written(kind: Any, *things: Object, size: tuple[int, int] = (300, 100), form: Any = "any") -> str:
    file = Media(digest="0" * 64, kind="image", suffix="png", size_bytes=1, width=size[0], height=size[1])
    pen = Pen(
        Sample(id="a", source="s", kind="grounding", messages=(), media=(file,)), 0, Convention(kind), lambda _: (1, 1)
    )
    return BracketObjects().write(Objects(media=0, objects=things, form=form), pen, True)[0].text


def test_boxes_are_in_brackets_with_two_decimals_on_the_padded_square_or_the_picture() -> None:
    box = Object(label="", at=Box(xyxy=(30, 0, 150, 100)))
    assert written("unit", box) == "[0.10, 0.00, 0.50, 1.00]"
    assert written("square", box) == "[0.10, 0.33, 0.50, 0.67]"
    named = Object(label="cat 2", at=Box(xyxy=(30, 0, 150, 100)))
    dot = Object(label="dot", at=Point(xy=(150, 50)))
    text = written("unit", named, dot, Object(label="fall", at=Span(start_s=1, end_s=2)))
    assert text == "cat 2: [0.10, 0.00, 0.50, 1.00]\ndot: [0.50, 0.50]\nfall: 1.0 seconds - 2.0 seconds"
    assert written("unit", box, form="plain") == "0.1, 0.0, 0.5, 1.0"


@pytest.mark.parametrize("kind", ["unit", "square"])
def test_scores_read_what_is_written(kind: Any) -> None:
    convention = Convention(kind)
    corners = (33.0, 12.0, 201.0, 96.0)
    (box,) = parse_boxes(written(kind, Object(label="cat 2", at=Box(xyxy=corners))))
    back = (
        *convention.to_original(*box[:2], (300, 100), (1, 1)),
        *convention.to_original(*box[2:], (300, 100), (1, 1)),
    )
    assert np.abs(np.subtract(back, corners)).max() <= 1.5  # half a hundredth of 300 pixels
    (point,) = parse_points(written(kind, Object(label="3 dots", at=Point(xy=(90, 40)))))
    assert np.abs(np.subtract(convention.to_original(*point, (300, 100), (1, 1)), (90, 40))).max() <= 1.5


@pytest.mark.parametrize("module", [llava, llava_next])
def test_a_screen_has_no_size_in_pixels_where_coordinates_are_shares_of_it(module: Any) -> None:
    rules = replace(some_rules(), family=load_family(module.FAMILY, module.config()))
    files = (an_image(90, 70),)
    said = (says("user", Tools(media=0, tool="computer_use"), Image_(media=0), "Go."), says("assistant", "Done."))
    found = fit_sample(a_sample(*said, files=files, kind="agent"), 0, rules)
    assert isinstance(found, Drop) and found.reason == "rendering" and "pixels of the screen" in found.detail
    others = some_rules(length=1024)
    assert isinstance(fit_sample(a_sample(*said, files=files, kind="agent"), 0, others), Fitted)


# ---------------------------------------------------------------- pixels


def a_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def pixel_values(family: Any, patches: np.ndarray) -> np.ndarray:
    """float[T, 3, side, side] as PackedModel and the torch side make them."""
    mean, std = (np.array(values, np.float32)[:, None] for values in (family.image_mean, family.image_std))
    x = (patches.reshape(len(patches), 3, -1).astype(np.float32) - 255 * mean) / (255 * std)
    n, p = family.side, family.patch_size
    return x.reshape(-1, n, n, 3, p, p).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, n * p, n * p)


SIZES = [(90, 70), (70, 90), (84, 84), (300, 17), (13, 200), (41, 43), (1, 50), (500, 333)]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_exported_processor(size: tuple[int, int]) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    family = load_family("llava", llava.config())
    settings = json.loads(family.processor_files(PIXELS)["preprocessor_config.json"])
    assert settings["do_pad"] is True
    picture = a_picture(*size)
    grid = family.image_grid(*size, min_pixels=1, max_pixels=10**9)
    ours = pixel_values(family, family.image_patches(picture, grid))
    theirs = LlavaImageProcessorPil(**settings)(images=[picture], return_tensors="np")["pixel_values"]
    assert np.abs(ours - theirs).max() < 1e-5
    if size[0] != size[1]:  # negative control: the released processor, which crops
        crops = LlavaImageProcessorPil(**settings | {"do_pad": False})(images=[picture], return_tensors="np")
        assert np.abs(ours - crops["pixel_values"]).max() > 0.1


def test_a_processor_that_crops_is_told_as_a_warning(tmp_path: Path) -> None:
    family = load_family("llava", llava.config())
    (told,) = family.import_warnings({"image_processor_type": "CLIPImageProcessor", "do_center_crop": True})
    assert "crops" in told and "do_pad" in told
    assert import_warnings(family, str(tmp_path)) == []
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_center_crop": True}))
    assert import_warnings(family, str(tmp_path)) == [told]
    assert family.import_warnings(json.loads(family.processor_files(PIXELS)["preprocessor_config.json"])) == []


@pytest.mark.parametrize("size", [(270, 3000), (1000, 3000), (3000, 40)])
def test_a_picture_too_long_to_be_padded_is_resized_first(size: tuple[int, int], monkeypatch) -> None:
    """Measured against the exported processor in levels of 255, noise and a smooth picture, a tile of 84 px: 0.10 to
    0.68 on average, at most 3.3 % of the values (edges) by more than 8, at most 41."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    family = load_family("llava", llava.config())
    settings = json.loads(family.processor_files(PIXELS)["preprocessor_config.json"])
    grid = family.image_grid(*size, min_pixels=1, max_pixels=10**9)
    levels = 255 * np.array(family.image_std)[:, None, None]
    for picture in (a_picture(*size), a_picture(6, 6).resize(size, Image.Resampling.BICUBIC)):
        theirs = LlavaImageProcessorPil(**settings)(images=[picture], return_tensors="np")["pixel_values"]
        padded = pixel_values(family, family.image_patches(picture, grid))
        assert np.abs(padded - theirs).max() < 1e-5
        with monkeypatch.context() as patch:
            patch.setattr("trainer.models.llava.MAX_PIXELS", max(size) ** 2 - 1)
            far = np.abs(pixel_values(family, family.image_patches(picture, grid)) - theirs) * levels
        assert 1 < far.max() < 50 and far.mean() < 0.8 and (far > 8).mean() < 0.04


@pytest.mark.parametrize("size", [(1080, 12000), (20000, 100)])
def test_a_long_picture_is_a_tile_like_any_other(size: tuple[int, int]) -> None:
    """Its square would have more pixels than a file may have."""
    family = load_family("llava", llava.config())
    grid = family.image_grid(*size, min_pixels=1, max_pixels=10**9)
    patches = family.image_patches(Image.new("RGB", size, (250, 0, 0)), grid)
    assert patches.shape == (family.patches(grid), family.patch_width)
    assert (patches.reshape(len(patches), 3, -1)[:, 0] == 250).mean() == pytest.approx(min(size) / max(size), abs=0.02)


# ---------------------------------------------------------------- configs, names, parts


def test_what_a_config_leaves_out_is_what_transformers_fills_in() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

    for stated, config in (
        (CLIP, CLIPVisionConfig()),
        (CLIP_L, LlavaConfig().vision_config),
        (TEXT["llama"] | {"vocab_size": TEXT_VOCAB}, LlamaConfig()),
        (TEXT["mistral"] | {"vocab_size": TEXT_VOCAB}, MistralConfig()),
    ):
        assert stated == {key: getattr(config, key) for key in stated}
    released = load_family(
        "llava", {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    )
    assert (released.patch_size, released.shape().full_layers) == (14, 23)  # type: ignore[attr-defined]
    grid = released.image_grid(640, 480, min_pixels=1, max_pixels=1)
    assert released.visual_tokens(grid) == released.patches(grid) == 576


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, "no such layer"),
        ({"vision_feature_layer": -9}, "no such layer"),
        ({"vision_feature_select_strategy": "full"}, "the class token is no feature"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "no such tower"),
        ({"text_config": {"model_type": "mistral", "sliding_window": None}}, "no such language model"),
        ({"model_type": "llava_next"}, "of another model"),
    ],
)
def test_configs_that_are_not_this_model_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_family("llava", llava.config() | change)


def test_settings_of_videos_are_refused_and_videos_dropped() -> None:
    with pytest.raises(RecipeError, match="reads no videos"):
        load_family("llava", llava.config(), tokens_per_second=2)
    family = load_family("llava", llava.config())
    sample = a_sample(
        says("user", Video(media=0), "What?"), says("assistant", "A"), files=(a_video(),), kinds=("video",)
    )
    found = fit_sample(sample, 0, replace(some_rules(), family=family))
    assert isinstance(found, Drop) and (found.reason, found.detail) == ("rendering", "llava reads no videos")


RELEASED = {
    "language_model.model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    "image_newline": "model.image_newline",
}


def test_old_and_new_names_mean_the_same_tensor() -> None:
    family = load_family("llava", llava.config())
    for old, new in RELEASED.items():
        assert family.hub_name(new) == family.hub_name(old) == old
        assert family.model_name(old) == family.model_name(new) == new
    between = "model.vision_tower.vision_model.pre_layrnorm.bias"  # transformers 4.52 to 4.57
    assert family.hub_name(between) == "vision_tower.vision_model.pre_layrnorm.bias"
    with pytest.raises(ModelError, match="no module group"):
        family.group_of("model.vision_model.head.weight")


def test_layers_above_the_features_and_the_last_norm_are_constant() -> None:
    family = load_family("llava", llava.config())
    names = [name for name, _ in family.build(dtype=torch.float32, init=False).named_parameters()]
    constant = {name for name in names if family.constant(name)}
    above = {name for name in names if "encoder.layers.2." in name or "post_layernorm" in name}
    assert constant == above and len(above) == 18
    last = load_family("llava", llava.config() | {"vision_feature_layer": -1})
    assert {name for name in names if last.constant(name)} == {name for name in names if "post_layernorm" in name}


def write(folder: Path, model: Any, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    return str(folder)


@pytest.mark.parametrize("module", [llava, llava_next])
def test_a_lone_language_model_and_a_whole_clip_assemble(tmp_path: Path, module: Any, capsys: Any) -> None:
    """Folders as published: LlamaForCausalLM without a row for <image>, CLIPModel with its text half."""
    from transformers import CLIPConfig, CLIPModel

    from trainer.models.family import parts_of

    config = module.config()
    config["text_config"]["vocab_size"] = 70
    family = load_family(module.FAMILY, config)
    shorter = json.loads(json.dumps(config))
    shorter["text_config"]["vocab_size"] = 64
    llm, _ = parts_of(family).language_model(load_family(module.FAMILY, shorter).export_config(), seed=3)
    saved = llm.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=small | {"vocab_size": 64}, vision_config=config["vision_config"]))
    inside = {
        "vision_model." + name.removeprefix("vision_model."): value
        for name, value in clip.vision_model.state_dict().items()
    }
    half = {name: value for name, value in clip.state_dict().items() if not name.startswith("vision_model.")}
    inside |= half | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    parts = initial.assemble(
        family,
        llm=write(tmp_path / "llm", llm, saved),
        vision=write(tmp_path / "clip", clip, inside),
        merger="random",
        seed=1,
    )
    for name, read in parts.tensors.items():
        group = family.group_of(name)
        if group == "vision":
            want = inside[name.removeprefix("vision_tower.")]
        elif group == "llm":
            want = saved[name.removeprefix("language_model.")]
        else:
            continue
        got = read()
        assert torch.equal(got[: len(want)], want), name
        if len(got) > len(want):
            assert torch.allclose(got[64:], want.mean(dim=0).expand(6, -1), atol=1e-6)
    assert capsys.readouterr().out.count("gets 6 rows for new tokens") == 2


def test_missing_rows_of_anything_else_are_an_error(tmp_path: Path) -> None:
    config = llava.config()
    config["text_config"]["vocab_size"] = 70
    family = load_family("llava", config)
    tensors = initial.random_tensors(family, seed=1, dtype=torch.float32)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 48)
    folder = write(tmp_path / "whole", family.build(dtype=torch.float32, init=False), tensors)
    with pytest.raises(ModelError, match="up_proj"):
        initial.assemble(family, llm=folder, vision="random", merger="random", seed=1)


# ---------------------------------------------------------------- tokenizers of Llama's kind


def a_llama_tokenizer(space: str) -> str:
    """tokenizer.json as the slow tokenizers of Vicuna and Mistral are converted: `normalizer` puts a space before every
    text between special tokens, `first` before the first alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    marked = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    inner.pre_tokenizer = marked  # for training alone
    alphabet = [chr(letter) for letter in range(33, 127)]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(
        [vicuna for _, vicuna, _ in PUBLISHED.values()],
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    content = json.loads(inner.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    inner = Tokenizer.from_str(json.dumps(content))
    if space == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = None  # type: ignore[assignment]
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return inner.to_str()


@pytest.mark.parametrize("space", ["normalizer", "first", "always"])
@pytest.mark.parametrize("module", [llava, llava_next])
def test_ids_are_transformers_with_a_llama_tokenizer(space: str, module: Any) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    content = a_llama_tokenizer(space)
    family = load_family(module.FAMILY, module.config())
    rules = replace(some_rules(), family=family, tokenizer=Tokenizer(content.encode()))
    data = an_image(90, 70)
    sample = a_sample(
        says("user", Image_(media=0), "What? \u4f60"), says("assistant", "A cat."), says("user", "Why?"),
        says("assistant", "No."), files=(data,),
    )  # fmt: skip
    found = layout(sample, 0, Fit(), rules)
    ours = encode(sample, found, [data], rules)
    text = text_of(family.template.conversation(turns_of(PUBLISHED["two turns"][0]))).removeprefix("<s>")
    text = text.replace("What?", "What? \u4f60").replace("<image>", "<image>" * found.num_visual_tokens)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(content), bos_token="<s>")
    assert ours.ids.tolist() == theirs(text)["input_ids"]
    plain = replace(rules, tokenizer=Tokenizer(content.encode()))
    plain.tokenizer._behind["token"] = plain.tokenizer._inner  # control: every text taken for the first
    same = encode(sample, layout(sample, 0, Fit(), plain), [data], plain).ids.tolist() == ours.ids.tolist()
    assert same == (space != "first")
    said = rules.tokenizer.decode(ours.label_ids.tolist())
    assert said.replace(" ", "") == "Acat.</s>No.</s>"


@pytest.mark.parametrize("space", ["normalizer", "first", "always"])
@pytest.mark.parametrize("module", [llava, llava_next])
def test_an_answer_behind_a_shared_prompt_has_the_ids_of_one_text(space: str, module: Any) -> None:
    family = load_family(module.FAMILY, module.config())
    rules = replace(some_rules(), family=family, tokenizer=Tokenizer(a_llama_tokenizer(space).encode()))
    data, asked = an_image(90, 70), says("user", Image_(media=0), "What? \u4f60")
    better, worse = says("assistant", "A cat."), says("assistant", "No.")
    pair = a_sample(asked, files=(data,), kind="preference", chosen=(better,), rejected=(worse,))
    ids, segments = ids_of(pair, rules, data)
    prompt, *answers = [ids[start : start + length] for start, length, *_ in segments]
    plain = replace(rules, tokenizer=Tokenizer(a_llama_tokenizer(space).encode()))
    plain.tokenizer._behind["text"] = plain.tokenizer._behind["token"]  # control: as if a token stood before the answer
    _, *spaced = [ids_of(pair, plain, data)[0][start : start + length] for start, length, *_ in segments]
    for answer, message, other in zip(answers, (better, worse), spaced, strict=True):
        assert prompt + answer == ids_of(a_sample(asked, message, files=(data,)), rules, data)[0]
        assert (other == answer) == (space != "normalizer")


def ids_of(sample: Sample, rules: Any, data: bytes) -> tuple[list[int], list[list[int]]]:
    found = encode(sample, layout(sample, 0, Fit(), rules), [data], rules)
    return found.ids.tolist(), found.segments.tolist()

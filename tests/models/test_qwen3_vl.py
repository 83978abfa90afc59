"""Qwen3-VL: what only this family has. The rules of every family are in the other files here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, Qwen3VLConfig
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from tests.models.builders import Built
from tests.models.configs.qwen3_vl import config
from trainer.after.endpoint import messages_of
from trainer.data import layout as layouts
from trainer.data.encode import encode
from trainer.data.layout import Drop, Fit, fit_sample, layout
from trainer.data.objects import Pen
from trainer.data.pieces import Piece, Shown, Turn
from trainer.data.sample import Box, Media, Message, Object, Objects, Sample, Text, Video
from trainer.data.video import Frames
from trainer.errors import ModelError, RecipeError
from trainer.models import hub
from trainer.models.qwen3_vl import CHAT_TEMPLATE, TEXT_DEFAULTS, VISION_DEFAULTS, Qwen3VL
from trainer.recipe import Pixels
from trainer.step.packed import place

FAMILY = Qwen3VL.from_config(config())


@pytest.fixture(scope="module")
def qwen3(build: Callable[[str], Built]) -> Built:
    return build("qwen3_vl")


# ---------------------------------------------------------------- template

PUBLISHED = (Path(__file__).parent / "published" / "qwen3_vl.jinja").read_text(encoding="utf-8")
PICTURE, CLIP = {"type": "image"}, {"type": "video"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "system": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": ""},
    ],
    "pictures": [
        {"role": "user", "content": [PICTURE, said("and"), PICTURE, said("?")]},
        {"role": "assistant", "content": [said("A cat.")]},
        {"role": "user", "content": [said("This?"), PICTURE]},
        {"role": "assistant", "content": [said("A cup.")]},
    ],
    "tools": [
        {"role": "user", "content": "Click"},
        {"role": "assistant", "content": '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>'},
        {"role": "tool", "content": "done"},
        {"role": "tool", "content": [PICTURE, said("and the screen")]},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "assistant\n<|im_end|>"},
    ],
    "a tool answers first": [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "2"}],
}


def rendered(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return render_jinja_template(conversations=[messages], chat_template=template, **more)[0][0]


def turns_of(messages: list[dict[str, Any]]) -> list[Turn]:
    found, media = [], 0
    for message in messages:
        pieces: list[Piece] = []
        parts = message["content"]
        for part in [said(parts)] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                pieces.append(Piece("text", part["text"]))
            else:
                kind: Any = part["type"]
                pieces += FAMILY.media_pieces(Shown(kind, media, media + 1, "chat"))
                media += 1
        found.append(Turn(message["role"], tuple(pieces), message["role"] == "assistant"))
    return found


def text_of(pieces: list[Piece]) -> str:
    pads = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    return "".join(pads.get(piece.kind, piece.text) for piece in pieces)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("open_turn", [False, True])
def test_a_conversation_is_what_the_published_template_writes(name: str, open_turn: bool) -> None:
    messages = CHATS[name]
    want = rendered(PUBLISHED, messages, add_generation_prompt=open_turn)
    assert text_of(FAMILY.template.conversation(turns_of(messages), open_turn=open_turn)) == want
    assert rendered(CHAT_TEMPLATE, messages, add_generation_prompt=open_turn) == want


@pytest.mark.parametrize("system", [None, "Be short."])
@pytest.mark.parametrize("content", ["", "I look."])
def test_the_exported_template_writes_tools_calls_and_numbers_as_the_published_one(
    system: str | None, content: str
) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    calls = [{"function": {"name": "look", "arguments": {"at": "é"}}}, {"name": "look", "arguments": '{"at": 1}'}]
    messages: list[dict[str, Any]] = [
        *([{"role": "system", "content": [said(system)]}] if system else []),
        {"role": "user", "content": [PICTURE, said("Look"), PICTURE]},
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "content": "seen"},
    ]
    for settings in ({}, {"add_vision_id": True}, {"tools": [tool]}):
        assert rendered(CHAT_TEMPLATE, messages, **settings) == rendered(PUBLISHED, messages, **settings)


def test_a_video_is_its_pad_alone_in_the_exported_template() -> None:
    """README: the published one puts markers around it, which processors before transformers 5 took away with it."""
    messages = [{"role": "user", "content": [CLIP, said("?"), CLIP]}]
    published = rendered(PUBLISHED, messages, add_vision_id=True)
    assert "<|vision_start|><|video_pad|><|vision_end|>" in published
    bare = published.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    assert rendered(CHAT_TEMPLATE, messages, add_vision_id=True) == bare


def test_targets_are_what_the_assistant_says_and_its_end() -> None:
    pieces = FAMILY.template.conversation(
        [
            Turn("user", (Piece("text", "assistant"),)),
            Turn("assistant", (Piece("text", "Yes", True),), True),
            Turn("tool", (Piece("text", "1"),)),
            Turn("assistant", (), True),
        ]
    )
    assert [piece.text for piece in pieces if piece.target] == ["Yes", "<|im_end|>", "<|im_end|>"]


PICTURES = (Piece("special", "<|vision_start|>"), Piece("image", media=0), Piece("special", "<|vision_end|>"))
WITHOUT_PLACE = {
    "a later system": [Turn("user", (Piece("text", "a"),)), Turn("system", (Piece("text", "b"),))],
    "a picture of the system": [Turn("system", PICTURES), Turn("user", (Piece("text", "a"),))],
    "a picture of the assistant": [Turn("user", (Piece("text", "a"),)), Turn("assistant", PICTURES)],
}


@pytest.mark.parametrize("name", WITHOUT_PLACE)
def test_what_the_published_template_leaves_out_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="template has"):
        FAMILY.template.conversation(WITHOUT_PLACE[name])


def test_an_answer_with_a_tools_reply_continues_the_conversation() -> None:
    question = [Turn("user", (Piece("text", "Q"),))]
    answer = [
        Turn("assistant", (Piece("text", "A"),)),
        Turn("tool", (Piece("text", "1"),)),
        Turn("assistant", (Piece("text", "B"),)),
    ]
    whole = text_of(FAMILY.template.conversation([*question, *answer]))
    parts = FAMILY.template.conversation(question, open_turn=True) + FAMILY.template.answer(answer)
    assert text_of(parts) + "\n" == whole


# ---------------------------------------------------------------- videos


def test_times_are_those_of_the_processor() -> None:
    rng = random.Random(5)
    differs = 0
    for _ in range(3000):
        fps = rng.choice([8, 12, 23.976, 24, 25, 29.97, 30, 60])
        numbers = sorted(rng.sample(range(2000), 4))
        want = Qwen3VLProcessor._calculate_timestamps(None, list(numbers), fps, 2)  # type: ignore[arg-type]
        told = FAMILY.media_pieces(Shown("video", 0, 1, "chat", times_of(numbers, fps)))
        assert [piece.text for piece in told if piece.kind == "text"] == [f"<{time:.1f} seconds>" for time in want]
        naive = [(a + b) / 2 / fps for a, b in (numbers[:2], numbers[2:])]
        differs += any(f"{time:.1f}" != f"{other:.1f}" for time, other in zip(naive, want, strict=True))
    assert differs > 0, "the order of the two divisions matters"


def times_of(numbers: list[int], fps: float) -> tuple[float, ...]:
    """The frame's own: of a video that shows these frames."""
    sample = SimpleNamespace(media=[SimpleNamespace(kind="video", fps=fps)])
    seen = layouts._Seen(sample, 0, Fit(), SimpleNamespace(family=FAMILY))  # type: ignore[arg-type]
    seen._known[0] = (FAMILY.image_grid(64, 64, min_pixels=1024, max_pixels=4096), Frames(tuple(numbers), 1.0))
    return seen.times(0)


def test_each_row_stands_between_markers_after_its_time() -> None:
    pieces = FAMILY.media_pieces(Shown("video", 3, 1, "chat", (0.25, 1.26)))
    assert [(piece.text or piece.kind, piece.row) for piece in pieces] == [
        ("<0.2 seconds>", -1), ("<|vision_start|>", -1), ("video", 0), ("<|vision_end|>", -1),
        ("<1.3 seconds>", -1), ("<|vision_start|>", -1), ("video", 1), ("<|vision_end|>", -1),
    ]  # fmt: skip
    assert {piece.media for piece in pieces if piece.kind == "video"} == {3}


def test_sizes_of_videos_are_those_of_the_processor() -> None:
    rng, processor = random.Random(3), Qwen3VLVideoProcessor(cap_pixels_per_frame=True)
    for _ in range(2000):
        low = rng.choice([4096, 131072])
        pixels = Pixels(video_min=low, video_max=rng.randrange(low + 1, 900_000), video_total=12_582_912)
        settings = json.loads(FAMILY.processor_files(pixels)["video_preprocessor_config.json"])
        processor.max_video_tokens, size = settings["max_video_tokens"], settings["size"]
        frames, width, height = 2 * rng.randrange(1, 200), rng.randrange(20, 2000), rng.randrange(20, 2000)
        grid = FAMILY.video_grid(
            frames, width, height,
            min_pixels=pixels.video_min, max_pixels=pixels.video_max, total_pixels=pixels.video_total,
        )  # fmt: skip
        want = processor.get_num_of_video_patches(frames, height, width, {"size": size})
        assert FAMILY.patches(grid) == want, (frames, width, height, pixels)
        assert (grid.width, grid.height) == (grid.w * 16, grid.h * 16)


def test_a_video_thinner_than_200_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect"):
        FAMILY.video_grid(4, 20_000, 40, min_pixels=4096, max_pixels=100_000, total_pixels=1_000_000)


def test_an_endpoint_sees_every_frame_of_a_video(qwen3: Built) -> None:
    sample, files = qwen3.samples["clip"]
    content = messages_of(sample, files, 0, qwen3.rules)[0]["content"]
    frames = [item for item in content if item["type"] == "image_url"]
    spans = [span for span in layout(sample, 0, Fit(), qwen3.rules).spans if span.grid is not None]
    assert len(frames) == sum(len(span.frames) for span in spans) == 4 and len(spans) == 2


def test_positions_of_rows_follow_the_text_between_them(qwen3: Built) -> None:
    """Text one id a token, a row of h x w as one picture: temporal ids do not grow with time."""
    found = qwen3.encoded["clip"].position_ids
    spans = layout(qwen3.samples["clip"][0], 0, Fit(), qwen3.rules).spans
    at, following = 0, 0
    for span in spans:
        ids = found[1:, at : at + span.num_tokens]
        assert ids.min() == following
        if span.grid is not None:
            assert (ids[0] == following).all() and span.grid.t == 1
            following += max(span.grid.h, span.grid.w) // 2
        else:
            following += span.num_tokens
        at += span.num_tokens


# ---------------------------------------------------------------- objects


def test_boxes_are_json_in_thousandths() -> None:
    media = Media(kind="image", digest="0" * 64, width=400, height=200, suffix="png", size_bytes=1)
    part = Objects(media=0, objects=(Object(at=Box(xyxy=(100, 50, 400, 200)), label="cat"),), form="json")
    sample = Sample(
        id="a", source="s", kind="grounding", media=(media,), messages=(Message(role="assistant", parts=(part,)),)
    )
    pen = Pen(sample, 0, FAMILY.coordinates, lambda _: (320, 160))
    text = text_of(FAMILY.objects.write(part, pen, True))
    assert text == '[{"bbox_2d":[250,250,1000,1000],"label":"cat"}]'


# ---------------------------------------------------------------- model


def test_every_merger_is_of_the_group_merger(qwen3: Built) -> None:
    names = [name for name, _ in qwen3.mine.model.named_parameters()]
    mergers = [name for name in names if FAMILY.group_of(name) == "merger"]
    assert {name.split(".norm")[0].split(".linear")[0] for name in mergers} == {
        "model.visual.merger", "model.visual.deepstack_merger_list.0", "model.visual.deepstack_merger_list.1",
    }  # fmt: skip
    assert FAMILY.group_of("model.visual.pos_embed.weight") == "vision"
    assert {FAMILY.group_of(name) for name in names} == {"vision", "merger", "llm"}


def old_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def test_the_older_layouts_names_import_bit_for_bit(qwen3: Built, tmp_path: Path) -> None:
    tensors = {name: read() for name, read in hub.load_tensors(qwen3.model_uri).items()}
    assert {name.rsplit(".layers", 1)[0] for name in tensors if ".layers." in name} == {"model.language_model"}
    save_file({old_name(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in map(old_name, tensors)} == {"visual", "model", "lm_head"}
    model = qwen3.family.build(dtype=torch.float32, init=False)
    digests = hub.load(model, str(tmp_path), qwen3.family, dtype=torch.float32)
    assert digests == {name: hub.tensor_digest(tensor) for name, tensor in tensors.items()}
    state = {qwen3.family.hub_name(name): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_without_pictures_every_parameter_gets_a_gradient(qwen3: Built) -> None:
    model = qwen3.a_model()
    loss, _ = model(place(qwen3.batch(["text"]), model, "cpu"))  # type: ignore[arg-type]
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_each_deepstack_output_moves_the_logits(qwen3: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of rule 1: leaving one out would be seen."""
    packed, batch = qwen3.mine, qwen3.batch(["short", "one"])
    whole = qwen3.logits(packed, batch)
    run = qwen3.parts.run_vision

    def without(which: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def run_without(*arguments: Any) -> tuple[torch.Tensor, ...]:
            return tuple(0 * out if at == which else out for at, out in enumerate(run(*arguments)))

        return run_without

    for which in (1, 2):
        monkeypatch.setattr(qwen3.parts, "run_vision", without(which))
        assert float((qwen3.logits(packed, batch) - whole).abs().max()) > 1e-2


@torch.no_grad()
def test_reading_with_a_cache_gives_the_packed_logits(qwen3: Built) -> None:
    """Prompt and answer in two reads, with transformers' own attention and masks."""
    family, parts, found = qwen3.family, qwen3.parts, qwen3.encoded["clip"]
    model = family.build(dtype=torch.float32, init=False).eval()
    hub.load(model, qwen3.model_uri, family, dtype=torch.float32)
    embeddings = parts.embed_tokens(model, torch.from_numpy(found.ids))
    pixels = qwen3.mine._pixel_values(torch.from_numpy(found.patches), torch.float32)
    pictures, *deeper = parts.see(model, pixels, torch.from_numpy(found.grid_thw))
    assert len(deeper) == 2
    index = torch.from_numpy(found.visual_index)
    embeddings = embeddings.index_copy(0, index, pictures)[None]
    positions, cache = torch.from_numpy(found.position_ids)[:, None], DynamicCache()
    cut = int(index[-1]) + 2
    first = parts.read(
        model,
        embeddings[:, :cut],
        positions[..., :cut],
        mask=None,
        cache=cache,
        deeper=tuple(deeper),
        visual_index=index,
    )
    second = parts.read(model, embeddings[:, cut:], positions[..., cut:], mask=None, cache=cache)
    logits = parts.head_of(model)(torch.cat([first, second], dim=1)[0])
    assert float((logits - qwen3.logits(qwen3.mine, qwen3.batch(["clip"]))).abs().max()) < 1e-5


# ---------------------------------------------------------------- configs


def changed(**values: Any) -> dict[str, Any]:
    content = config()
    for path, value in values.items():
        part, name = path.split("__")
        content[part][name] = value
    return content


@pytest.mark.parametrize(
    "content, said",
    [
        ({**config(), "model_type": "qwen2_5_vl"}, "another model"),
        (changed(text_config__head_dim=32), "sections"),
        (changed(text_config__rope_parameters={"mrope_section": [4, 2, 2], "mrope_interleaved": False}), "interleaved"),
        (changed(vision_config__deepstack_visual_indexes=[0, 3]), "DeepStack"),
        (changed(text_config__num_hidden_layers=1), "DeepStack"),
    ],
)
def test_a_config_that_transformers_would_misread_is_refused(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Qwen3VL.from_config(content)


def test_what_a_config_leaves_out_is_as_transformers_fills_it_in() -> None:
    filled, want = Qwen3VL.from_config({"model_type": "qwen3_vl"}), Qwen3VLConfig()
    for name, value in filled._text().items():
        if name in TEXT_DEFAULTS:
            assert getattr(want.text_config, name) == value
    for name, value in (VISION_DEFAULTS | filled.config["vision_config"]).items():
        assert getattr(want.vision_config, name) == value, name


def test_a_rate_of_temporal_ids_is_refused() -> None:
    with pytest.raises(RecipeError, match="as text"):
        Qwen3VL.from_config(config(), tokens_per_second=2)


def test_the_shallow_model_of_the_towers_training_is_a_config_of_the_family() -> None:
    assert Qwen3VL.from_config(FAMILY.with_one_layer()).config["text_config"]["num_hidden_layers"] == 2


def test_weights_of_products_are_counted_as_the_model_has_them(qwen3: Built) -> None:
    sizes = {"vision": 0, "merger": 0, "llm": 0}
    for name, parameter in qwen3.mine.model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name.replace("patch_embed", "") and "lm_head" not in name:
            sizes[FAMILY.group_of(name)] += parameter.numel()
    shape = qwen3.family.shape()
    assert shape.text_weights == sizes["llm"] and shape.patch_weights == sizes["vision"]
    assert shape.merger_weights == sizes["merger"] / 4
    assert shape.text_width == 64


def test_a_video_of_no_times_is_one_piece() -> None:
    """For endpoints, which take the frames themselves."""
    pieces = FAMILY.media_pieces(Shown("video", 0, 1, "chat"))
    assert [piece.kind for piece in pieces] == ["special", "video", "special"] and pieces[1].row == -1


def test_messages_with_a_later_system_are_dropped_by_reason(qwen3: Built) -> None:
    sample, _ = qwen3.samples["text"]
    late = Message(role="system", parts=(Text(text="Now be long."),))
    found = fit_sample(sample.model_copy(update={"messages": (*sample.messages, late)}), 0, qwen3.rules)
    assert isinstance(found, Drop) and found.reason == "rendering"


def test_a_video_twice_in_a_sample_is_written_twice(qwen3: Built) -> None:
    sample, files = qwen3.samples["clip"]
    question = sample.messages[0]
    twice = question.model_copy(update={"parts": (Video(media=0), *question.parts)})
    both = sample.model_copy(update={"messages": (twice, *sample.messages[1:])})
    found = encode(both, layout(both, 0, Fit(), qwen3.rules), files, qwen3.rules)
    once = qwen3.encoded["clip"]
    assert found.grid_thw.tolist() == 2 * once.grid_thw.tolist()
    assert (found.patches == np.concatenate([once.patches, once.patches])).all()

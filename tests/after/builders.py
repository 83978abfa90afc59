"""Small things to test with: a tokenizer, a model that fits in a megabyte, samples with drawn pictures."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import tokenizers
from PIL import Image as Pil
from tokenizers import decoders, models, pre_tokenizers

from trainer.data.layout import Rules
from trainer.data.media import digest_of
from trainer.data.sample import Image, Key, Media, Message, Sample, Text
from trainer.data.tokenizer import Tokenizer
from trainer.models.family import Family, load_family
from trainer.recipe import Pixels

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 70, 220), "white": (245, 245, 245)}
PIXELS = Pixels(
    image_min=3136, image_max=12544, video_min=3136, video_max=12544, video_total=50176, min_frames=4, max_frames=8
)


@functools.cache
def a_tokenizer() -> Tokenizer:
    """Bytes and the family's special tokens: no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    family = load_family("qwen2_5_vl", {"model_type": "qwen2_5_vl"})
    vocabulary = {
        token: number for number, token in enumerate([*family.special_tokens, *family.plain_tokens, *alphabet])
    }
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(family.special_tokens))
    return Tokenizer(inner.to_str().encode())


@functools.cache
def a_config(layers: int = 2) -> dict[str, Any]:
    """config.json of a small model whose ids fit a_tokenizer()."""
    tokenizer = a_tokenizer()
    ids = {
        "image_token_id": tokenizer.id("<|image_pad|>"),
        "video_token_id": tokenizer.id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.id("<|vision_end|>"),
    }
    text = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
        "tokens_per_second": 2,
    }
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
        "bos_token_id": tokenizer.id("<|endoftext|>"),
        "eos_token_id": tokenizer.id("<|im_end|>"),
        **ids,
    }


def a_family() -> Family:
    return load_family("qwen2_5_vl", a_config())


def some_rules(rendering: str = "chat", **changes: Any) -> Rules:
    given = {"pixels": PIXELS, "length": 512, "patch_budget": 1024, **changes}
    return Rules(a_family(), a_tokenizer(), rendering, **given)  # type: ignore[arg-type]


def a_picture(colour: str = "red", width: int = 84, height: int = 84, *, seed: int = 0) -> bytes:
    """PNG: a square of the colour somewhere on a noisy ground."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 140, (height, width, 3), dtype=np.uint8)
    side = height // 2
    y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    pixels[y : y + side, x : x + side] = COLOURS[colour]
    stream = io.BytesIO()
    Pil.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def some_media(data: bytes, width: int = 84, height: int = 84) -> Media:
    return Media(digest=digest_of(data), kind="image", suffix="png", size_bytes=len(data), width=width, height=height)


def a_question(name: str = "q", *, colour: str = "red", seed: int = 0, width: int = 84) -> tuple[Sample, list[bytes]]:
    """A chat about a picture, with the key, and the picture."""
    data = a_picture(colour, width=width, seed=seed)
    sample = Sample(
        id=name,
        source="instructions",
        kind="instruction",
        messages=(
            Message(role="user", parts=(Image(media=0), Text(text="Which colour?"))),
            Message(role="assistant", parts=(Text(text=colour),)),
        ),
        media=(some_media(data, width=width),),
        key=Key(task="colour", value=colour),
    )
    return sample, [data]


def a_caption(name: str, colour: str, *, seed: int = 0) -> tuple[Sample, list[bytes]]:
    """A picture and a sentence about it, without a speaker."""
    data = a_picture(colour, seed=seed)
    parts = (Image(media=0), Text(text=f"a {colour} square"))
    sample = Sample(
        id=name,
        source="captions",
        kind="caption",
        messages=(Message(role="document", parts=parts),),
        media=(some_media(data),),
    )
    return sample, [data]

"""Builders of small real things: a tokenizer, a family, samples with files, a prepared source."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import av
import numpy as np
import tokenizers
from PIL import Image as Picture
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainer.data.layout import REASONS, Drop, Rules, fit_sample
from trainer.data.media import digest_of, image_header
from trainer.data.mixture import SourceCounts
from trainer.data.order import id_hash
from trainer.data.sample import Image, Media, Message, Part, Sample, Text, Video
from trainer.data.shards import ShardWriter, Source
from trainer.data.tokenizer import Tokenizer
from trainer.data.video import video_header
from trainer.models.qwen2_5_vl import Qwen25VL
from trainer.recipe import Pixels

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "You are a helpful assistant. The picture shows a red cross on the top left.",
    "A page of a document with a table, two headings and one chart beside the text.",
    '[{"bbox_2d":[12,34,56,78],"label":"button"}] seconds system user assistant document',
] * 4


@cache
def tokenizer_json() -> str:
    """Byte-level BPE as Qwen's: NFC, its split pattern, its special tokens; 400 ids."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in Qwen25VL.special_tokens])
    inner.add_tokens([tokenizers.AddedToken(name, special=False) for name in Qwen25VL.plain_tokens])
    return inner.to_str()


@cache
def a_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json().encode())


def a_config(**vision: Any) -> dict[str, Any]:
    """A model that transformers can build in a moment."""
    token = a_tokenizer().id
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 512,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 48,
            "window_size": 56,
            "fullatt_block_indexes": [0],
            "tokens_per_second": 2,
            **vision,
        },
    }


def a_family(tokens_per_second: float | None = None) -> Qwen25VL:
    return Qwen25VL.from_config(a_config(), tokens_per_second=tokens_per_second)


PIXELS = Pixels(
    image_min=56 * 56,
    image_max=224 * 224,
    video_min=56 * 56,
    video_max=112 * 112,
    video_total=4 * 112 * 112,
    fps=[1.0, 2.0],
    min_frames=4,
    max_frames=8,
)


def some_rules(rendering: str = "chat", **more: Any) -> Rules:
    values = {"pixels": PIXELS, "length": 512, "patch_budget": 1024, "family": a_family(), **more}
    return Rules(tokenizer=a_tokenizer(), rendering=rendering, **values)  # type: ignore[arg-type]


# ---------------------------------------------------------------- files


def an_image(width: int = 90, height: int = 70, *, seed: int = 0, form: str = "PNG", **save: Any) -> bytes:
    """Smooth colours with edges: what resizing has to be right about."""
    rng = np.random.default_rng(seed)
    small = Picture.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    picture = small.resize((width, height), Picture.Resampling.NEAREST)
    return saved(picture, form, **save)


def saved(picture: Picture.Image, form: str = "PNG", **save: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, form, **save)
    return sink.getvalue()


def a_video(num_frames: int = 20, fps: int = 10, width: int = 64, height: int = 48) -> bytes:
    """Frame n is grey of level 10 * n: the pixels say which frame they are."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(num_frames):
            level = np.full((height, width, 3), 10 * number % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def media_of(data: bytes, kind: str = "image") -> Media:
    if kind == "image":
        found = image_header(data)
        more: dict[str, Any] = {}
    else:
        video = video_header(data)
        found, more = video, {"num_frames": video.num_frames, "fps": video.fps, "duration_s": video.duration_s}  # type: ignore[assignment]
    return Media(
        digest=digest_of(data),
        kind=kind,  # type: ignore[arg-type]
        suffix=found.suffix,
        size_bytes=len(data),
        width=found.width,
        height=found.height,
        origin=f"memory.{found.suffix}",
        **more,
    )


# ---------------------------------------------------------------- samples


def says(role: str, *parts: Part | str) -> Message:
    return Message(role=role, parts=tuple(Text(text=p) if isinstance(p, str) else p for p in parts))  # type: ignore[arg-type]


def a_sample(*messages: Message, files: tuple[bytes, ...] = (), kinds: tuple[str, ...] = (), **more: Any) -> Sample:
    kinds = kinds or ("image",) * len(files)
    media = tuple(media_of(data, kind) for data, kind in zip(files, kinds, strict=True))
    values = {"id": "1", "source": "some", "kind": "instruction", **more}
    return Sample(messages=messages, media=media, **values)


def a_caption(number: int = 0, **size: int) -> tuple[Sample, list[bytes]]:
    data = an_image(seed=number, **size)
    message = says("document", Image(media=0), f"The picture number {number} shows a red cross.")
    return a_sample(message, files=(data,), id=f"caption-{number}", kind="caption"), [data]


def a_text(number: int = 0, words: int = 20) -> tuple[Sample, list[bytes]]:
    text = " ".join(f"word{(number * 7 + word) % 50}" for word in range(words))
    return a_sample(says("document", text), id=f"text-{number}", kind="text"), []


def a_pair(number: int = 0) -> tuple[Sample, list[bytes]]:
    data = an_image(seed=number)
    sample = a_sample(
        says("user", Image(media=0), f"What is number {number}?"),
        files=(data,),
        id=f"pair-{number}",
        kind="preference",
        chosen=(says("assistant", "A red cross."),),
        rejected=(says("assistant", "Nothing at all, or a chart."),),
    )
    return sample, [data]


def a_clip(number: int = 0, num_frames: int = 20) -> tuple[Sample, list[bytes]]:
    data = a_video(num_frames)
    message = says("document", Video(media=0), f"Clip {number} gets brighter.")
    return a_sample(message, files=(data,), kinds=("video",), id=f"clip-{number}", kind="video"), [data]


def a_source(uri: str, samples: list[tuple[Sample, list[bytes]]], *, shard_bytes: int = 1 << 20) -> Source:
    writer = ShardWriter(uri, shard_bytes=shard_bytes)
    for sample, files in samples:
        writer.add(sample, files)
    writer.close()
    return Source.open(uri)


def counts_of(source: Source, rules: Rules, name: str, kind: str, *, variants: int = 2) -> SourceCounts:
    """Counts without column files: what pipelines/prepare/count.py stores, made anew."""
    places = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    fits = [(0, 0, 0)]
    found = np.zeros((5, len(places), variants), np.int32)
    for at, place in enumerate(places):
        for variant in range(variants):
            fitted = fit_sample(source.sample(*place), variant, rules)
            if isinstance(fitted, Drop):
                found[:, at, variant] = (0, 0, 0, -1, REASONS.index(fitted.reason))
                continue
            row = tuple(fitted.fit.row())
            fits += [] if row in fits else [row]
            laid = fitted.layout
            counts = (laid.num_tokens, laid.num_patches, laid.num_targets)
            found[:, at, variant] = (*counts, fits.index(row), -1)
    return SourceCounts(
        name=name,
        split="train",
        kind=kind,
        uri=name,
        digest=source.digest,
        rules_digest=rules.digest,
        shard=np.array([shard for shard, _ in places], np.int32),
        row=np.array([row for _, row in places], np.int32),
        id_hash=np.array([id_hash(name, source.sample_id(*place)) for place in places], np.uint64),
        tokens=found[0],
        patches=found[1],
        targets=found[2],
        fit=found[3],
        drop=found[4].astype(np.int8),
        fits=fits,
        reasons=REASONS,
    )

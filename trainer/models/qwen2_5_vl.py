"""Qwen2.5-VL: grids, positions and names (arXiv 2502.13923; released config.json; transformers 5.23).

Arithmetic only: the torch model is transformers' Qwen2_5_VLForConditionalGeneration, imported inside `build`.
Shapes are read from the config (intermediate 3420 in the released 3B and 7B, 3456 in 32B), never assumed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from trainer.data.coordinates import Convention
from trainer.errors import ModelError, RecipeError
from trainer.models.family import Grid, Group, Markers, Placed
from trainer.recipe import Pixels

MAX_ASPECT = 200
RELEASED_TOKENS_PER_SECOND = 2.0
"""In every released config.json; the class default of transformers is 4, the report's 40 ms is 25."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template that the released Qwen2.5-VL-Instruct models carry; render.py writes the same text."""


class Qwen25VL:
    name = "qwen2_5_vl"
    special_tokens = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    plain_tokens = ("<tool_call>", "</tool_call>")
    markers = Markers()
    default_system = "You are a helpful assistant."
    coordinates = Convention("absolute")
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: Mapping[str, Any], tokens_per_second: float | None = None):
        self.config: dict[str, Any] = copy.deepcopy(dict(config))
        vision = self.config.setdefault("vision_config", {})
        self.patch_size = int(vision.setdefault("patch_size", 14))
        self.merge_size = int(vision.setdefault("spatial_merge_size", 2))
        self.temporal_patch_size = int(vision.setdefault("temporal_patch_size", 2))
        if tokens_per_second is not None:
            vision["tokens_per_second"] = tokens_per_second
        self.tokens_per_second = float(vision.setdefault("tokens_per_second", RELEASED_TOKENS_PER_SECOND))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Qwen25VL:
        """Raises ModelError for the config of another model, RecipeError for a rate that cannot be exported."""
        if tokens_per_second is not None and tokens_per_second != int(tokens_per_second):
            raise RecipeError(
                [("model.tokens_per_second", f"{tokens_per_second} is not whole, which transformers' config demands")]
            )
        found = config.get("model_type")
        if found != cls.name:
            raise ModelError("the config is of another model", where="config.json", expected=cls.name, got=found)
        return cls(config, tokens_per_second)

    # ---------------------------------------------------------------- grids

    @cached_property
    def factor(self) -> int:
        """Sides are multiples of it: 28 for the released models."""
        return self.patch_size * self.merge_size

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid:
        """The size and patches of an image of `width` x `height` (after EXIF orientation). ValueError above 200:1."""
        width, height = smart_resize(width, height, self.factor, min_pixels, max_pixels)
        return Grid(1, height // self.patch_size, width // self.patch_size, width, height)

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid:
        """The size and patches of `num_frames` frames, an even number.

        `total_pixels` counts a pair of frames once, since a pair becomes one grid row (qwen-vl-utils, and transformers
        with cap_pixels_per_frame): 24576 * 28 * 28 is 24576 visual tokens. An even share below 1.05 * `min_pixels` is
        raised to that, as there.
        """
        share = total_pixels * self.temporal_patch_size // num_frames
        cap = max(min(max_pixels, share), int(min_pixels * 1.05))
        width, height = smart_resize(width, height, self.factor, min_pixels, cap)
        t = num_frames // self.temporal_patch_size
        return Grid(t, height // self.patch_size, width // self.patch_size, width, height)

    def visual_tokens(self, grid: Grid) -> int:
        """Tokens that the language model sees: patches after merging."""
        return grid.t * grid.h * grid.w // self.merge_size**2

    def patches(self, grid: Grid) -> int:
        return grid.t * grid.h * grid.w

    def patchify(self, frames: np.ndarray) -> np.ndarray:
        """uint8[T, H, W, 3] -> uint8[P, 3 * temporal * patch * patch], in the order that the vision tower expects:
        grid rows in merge blocks, then channel, frame, pixel. A last odd frame is repeated; an image is one frame."""
        tp, p, m = self.temporal_patch_size, self.patch_size, self.merge_size
        if pad := -len(frames) % tp:
            frames = np.concatenate([frames, np.repeat(frames[-1:], pad, axis=0)])
        t, height, width, channels = frames.shape
        gh, gw = height // p, width // p
        blocks = frames.reshape(t // tp, tp, gh // m, m, p, gw // m, m, p, channels)
        blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return np.ascontiguousarray(blocks).reshape(t // tp * gh * gw, channels * tp * p * p)

    # ---------------------------------------------------------------- positions

    def position_ids(self, spans: Sequence[Placed], *, start: int = 0, first: int = 0) -> np.ndarray:
        """int64[4, L] of one segment: row 0 counts tokens from `first`, rows 1-3 are the M-RoPE t, h, w from `start`.

        The published rule: what follows a vision span starts at its largest id + 1. transformers 5.23 advances by the
        larger side only, so ids of a long video overlap with the text after it; ours do not. Temporal ids stay float
        until the product with tokens_per_second is floored: cast earlier, ids collapse above 2 frames a second.
        A segment after a parent takes start = next_position(parent's ids) and first = the parent's length.
        """
        parts = []
        for span in spans:
            if span.grid is None:
                ids = np.broadcast_to(np.arange(start, start + span.num_tokens), (3, span.num_tokens))
            else:
                ids = self._vision_positions(span.grid, span.seconds_per_grid, video=span.kind == "video") + start
            parts.append(ids)
            start = int(ids.max(initial=start - 1)) + 1
        rope = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int64)
        count = np.arange(first, first + rope.shape[1])
        return np.concatenate([count[None], rope]).astype(np.int64)

    def _vision_positions(self, grid: Grid, seconds_per_grid: float, *, video: bool) -> np.ndarray:
        h, w = grid.h // self.merge_size, grid.w // self.merge_size
        interval = seconds_per_grid * self.tokens_per_second if video else 1.0
        # 1e-6: 3 * (1 / 3) style products land a rounding error below the integer that they mean
        t = np.floor(np.arange(grid.t) * interval + 1e-6).astype(np.int64)
        return np.stack(np.meshgrid(t, np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)

    # ---------------------------------------------------------------- names

    def group_of(self, parameter_name: str) -> Group:
        """The module group of a parameter, by its name in the torch model or in the hub layout."""
        hub = self.hub_name(parameter_name)
        if hub.startswith("visual.merger."):
            return "merger"
        if hub.startswith("visual."):
            return "vision"
        if hub.startswith(("model.", "lm_head.")):
            return "llm"
        raise ModelError("a parameter that belongs to no module group", where=parameter_name)

    def constant(self, parameter_name: str) -> str | None:
        """Why a parameter is never trained whatever the recipe says; None: every one of Qwen2.5-VL's can be."""
        return None

    def hub_name(self, parameter_name: str) -> str:
        """Name in released files: visual.*, model.layers.*, lm_head.*. A hub name is returned as it is."""
        for inside, hub in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if parameter_name.startswith(inside):
                return hub + parameter_name.removeprefix(inside)
        return parameter_name

    def model_name(self, hub_name: str) -> str:
        """Name in the torch model. A model name is returned as it is."""
        if hub_name.startswith(("model.visual.", "model.language_model.", "lm_head.")):
            return hub_name
        if hub_name.startswith("visual."):
            return "model." + hub_name
        if hub_name.startswith("model."):
            return "model.language_model." + hub_name.removeprefix("model.")
        return hub_name

    # ---------------------------------------------------------------- model and export

    def build(self, *, dtype: Any, attn_implementation: str | None = None, init: bool = True) -> Any:
        """The torch model in `dtype` with random weights (`init`), or with memory only."""
        from trainer.models.qwen2_5_vl_model import build

        return build(self.export_config(), dtype=dtype, attn_implementation=attn_implementation, init=init)

    def export_config(self) -> dict[str, Any]:
        """config.json for export: as read, with the tokens_per_second that was trained with."""
        config = copy.deepcopy(self.config)
        config["vision_config"]["tokens_per_second"] = int(self.tokens_per_second)
        return config

    def processor_files(self, pixels: Pixels) -> dict[str, str]:
        """Files that Hugging Face's processor needs beside the tokenizer: name -> content."""
        common = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "merge_size": self.merge_size,
            "patch_size": self.patch_size,
            "processor_class": "Qwen2_5_VLProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": self.temporal_patch_size,
        }
        image = common | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": pixels.image_min, "longest_edge": pixels.image_max},
        }
        video = common | {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": pixels.video_min, "longest_edge": pixels.video_max},
            "min_frames": pixels.min_frames,
            "max_frames": pixels.max_frames,
            "fps": pixels.fps[0],
            "do_sample_frames": True,
            # its budget is 90 % of max_video_tokens, ours is video_total: the same number of pixels a pair of frames
            "cap_pixels_per_frame": True,
            "max_video_tokens": math.ceil(pixels.video_total / self.factor**2 / 0.9),
        }
        return {
            "preprocessor_config.json": json.dumps(image, indent=2, sort_keys=True) + "\n",
            "video_preprocessor_config.json": json.dumps(video, indent=2, sort_keys=True) + "\n",
            "chat_template.jinja": CHAT_TEMPLATE,
        }

    def layout_facts(self) -> dict[str, Any]:
        """Everything of the family that token counts, positions and pixels depend on: part of the plan's digest."""
        return {
            "family": self.name,
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "tokens_per_second": self.tokens_per_second,
            "coordinates": self.coordinates.kind,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "default_system": self.default_system,
        }


def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of `factor` within the budgets, aspect kept: the rule of the released processor.

    Python's round() (half to even) is part of the rule. ValueError above an aspect of 200.
    """
    aspect = max(height, width) / max(min(height, width), 1)
    if aspect > MAX_ASPECT or min(height, width) < 1:
        raise ValueError(f"aspect ratio {aspect:.1f} of {width}x{height} is above {MAX_ASPECT}")
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return w, h


def next_position(position_ids: np.ndarray) -> int:
    """The M-RoPE id that follows int64[4, L] of a segment."""
    return int(position_ids[1:].max(initial=-1)) + 1

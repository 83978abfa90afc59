"""Names, tokens and files of the released Qwen2-VL and its successors: the same in Qwen2-VL and Qwen2.5-VL but for the
processor's class; Qwen3-VL overrides what is its own."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from trainer.data.chat import ChatML, ChatTemplate
from trainer.data.coordinates import Convention
from trainer.data.objects import ObjectStyle
from trainer.errors import ModelError
from trainer.models import fields
from trainer.models.family import Group, Markers, common_facts
from trainer.models.native import NativeResolution
from trainer.recipe import Pixels

SPECIAL_TOKENS = (
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
"""The template that the released Instruct models of both carry; ChatML writes the same text."""

TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
"""Of the language model of both."""


class Released(NativeResolution):
    """What is left to a family: its objects and coordinates, its rate of temporal ids, its shape."""

    text_defaults: ClassVar[Mapping[str, Any]] = TEXT_DEFAULTS
    vision_defaults: ClassVar[Mapping[str, Any]]
    """What transformers fills in where a config.json leaves it out; saving with transformers does leave it out."""

    name: str
    config: dict[str, Any]
    objects: ObjectStyle
    coordinates: Convention
    processor_class: str
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    plain_tokens: tuple[str, ...] = ()
    markers: Markers = Markers()
    template: ChatTemplate = ChatML()
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    part_prefixes: tuple[str, ...] = ("", "visual.", "model.", "visual.merger.")

    def _read_sizes(self, *, patch_size: int = 14) -> dict[str, Any]:
        """Patch sizes from the config, with the released ones filled in; gives vision_config.

        Raises:
            ModelError: a section that is no object, a size that is no number, layers with a sliding window.
        """
        vision = self.config["vision_config"] = fields.section(self.config, "vision_config")
        fields.section(self.config, "text_config")
        defaults = {"patch_size": patch_size, "spatial_merge_size": 2, "temporal_patch_size": 2}
        vision |= {name: value for name, value in defaults.items() if name not in vision}
        fields.check(vision, dict.fromkeys(defaults, int), "vision_config")
        self.patch_size, self.merge_size = vision["patch_size"], vision["spatial_merge_size"]
        self.temporal_patch_size = vision["temporal_patch_size"]
        text = self.text_config(self.config)
        if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
            raise ModelError(
                "a language model with a sliding window, which attention in packs does not have",
                where="use_sliding_window, layer_types",
                expected="false and full_attention, as in every released model",
                got=f"{text.get('use_sliding_window')}, {text.get('layer_types')}",
            )
        return vision

    def _text(self) -> dict[str, Any]:
        """The language model's config with transformers' defaults; ModelError for a size that is no number."""
        text = self.text_config(self.config)
        where = "" if text is self.config else "text_config"
        return fields.filled(text, self.text_defaults, where, nullable=("num_key_value_heads",))

    def _vision(self) -> dict[str, Any]:
        """The same of the tower."""
        return fields.filled(self.config["vision_config"], self.vision_defaults, "vision_config")

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
        """Why a parameter is never trained whatever the recipe says; None: every one can be."""
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

    # ---------------------------------------------------------------- configs

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """text_config as transformers 5 nests it, or the whole as released files have it."""
        nested = config.get("text_config")
        return nested if isinstance(nested, dict) else config

    def with_tokens(self, id_of: Callable[[str], int]) -> dict[str, Any]:
        """pad_token_id never stands where the language model reads it: that row of the embedding would get no gradient,
        and <|endoftext|> ends documents. generation_config.json says it, and a nested config at its top."""
        config = copy.deepcopy(self.config)
        for key in ("image_pad", "video_pad", "vision_start", "vision_end"):
            config[f"{key.removesuffix('_pad')}_token_id"] = id_of(f"<|{key}|>")
        text = self.text_config(config)
        for at in {id(config): config, id(text): text}.values():
            at["eos_token_id"] = id_of(self.markers.turn_end)
            at["bos_token_id"] = id_of(self.markers.eos)
        config["pad_token_id"] = id_of(self.markers.eos)
        text.pop("pad_token_id", None)
        return config

    def with_one_layer(self) -> dict[str, Any]:
        config = self.export_config()
        text = self.text_config(config)
        text["num_hidden_layers"] = 1
        text.pop("layer_types", None)
        return config

    def export_config(self) -> dict[str, Any]:
        """config.json for export: as read."""
        return copy.deepcopy(self.config)

    # ---------------------------------------------------------------- files

    def processor_files(self, pixels: Pixels) -> dict[str, str]:
        """Files that Hugging Face's processor needs beside the tokenizer: name -> content."""
        common = self.pixel_settings(
            image_mean=list(self.image_mean), image_std=list(self.image_std), processor_class=self.processor_class
        )
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

    def tokenizer_settings(self) -> dict[str, Any]:
        """By these names transformers' processor looks the tokens up."""
        return {
            "tokenizer_class": "Qwen2TokenizerFast",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": self.markers.turn_end,
            "pad_token": self.markers.eos,
            "image_token": self.markers.image_pad,
            "video_token": self.markers.video_pad,
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        }

    def layout_facts(self) -> dict[str, Any]:
        """Everything of the family that token counts, positions and pixels depend on: part of the plan's digest."""
        return {
            **common_facts(self),
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "tokens_per_second": self.tokens_per_second,
        }

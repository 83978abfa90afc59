"""Pictures at the size that CLIP was trained at, one or several tiles each: what LLaVA-1.5 and LLaVA-1.6 share.

A picture becomes square tiles of the tower's size, the tower's features of an inner layer (without the class token) go
through a projector of two layers, each patch is one token. The language model is Llama or Mistral with plain rotary
positions. arXiv 2310.03744 section 3; transformers 5.23 models.llava and models.llava_next.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from trainer.data.chat import ChatTemplate, Vicuna
from trainer.data.coordinates import Convention
from trainer.data.objects import BracketObjects
from trainer.data.pieces import Piece, Shown
from trainer.errors import DataError, ModelError, RecipeError
from trainer.flops import Shape
from trainer.models import fields
from trainer.models.family import Buildable, Grid, Group, Markers, Placed, common_facts, plain_positions
from trainer.recipe import Pixels

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"image_size": 336, "patch_size": 14}
"""The tower of a config.json that describes none."""
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP |= {"image_size": 224, "patch_size": 32}
"""What transformers fills into one that is described in part."""
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TEXT = {"llama": _LLAMA, "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8}}
"""The same of language models: released configs leave out what is a default."""
TEXT_VOCAB = 32000

_MACROS = (
    "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for item in content -%}"
    "{%- if item['type'] == 'text' -%}{{ item['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- macro pictures(content) -%}{%- if content is not string -%}{%- for item in content -%}"
    "{%- if item['type'] in ('image', 'image_url') -%}{{ '<image>\n' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
CHAT_TEMPLATES = {
    "vicuna_v1": _MACROS
    + "{%- if messages and messages[0]['role'] == 'system' -%}{{ words(messages[0]['content']) + ' ' }}"
    "{%- set turns = messages[1:] -%}{%- else -%}{{ '" + Vicuna().system.replace("'", "\\'") + " ' }}"
    "{%- set turns = messages -%}{%- endif -%}{%- for turn in turns -%}"
    "{%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('user and assistant take turns, after at most one system message') }}{%- endif -%}"
    "{%- if turn['role'] == 'user' -%}{{ 'USER: ' + pictures(turn['content']) + words(turn['content']) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + words(turn['content']) + '</s>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}",
    "mistral_instruct": _MACROS + "{%- for turn in messages -%}"
    "{%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('user and assistant take turns, and there is no system message') }}{%- endif -%}"
    "{%- if turn['role'] == 'user' -%}{{ '[INST] ' + pictures(turn['content']) + words(turn['content']) + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + words(turn['content']) + ' </s>' }}{%- endif -%}{%- endfor -%}",
}
"""For export, the texts that the classes of data/chat.py write; the tokenizer adds <s>."""
OTHER_TEMPLATES = {"<|im_start|>": "ChatML (llava-v1.6-34b)", "<|begin_of_text|>": "Llama 3 (llama3-llava-next-8b)"}
"""Tokens that only templates have which are not those of training here, and the releases with them."""


class Tiles(Buildable):
    """Half of a family: it needs the pictures' side (image_grid, image_patches, visual_tokens, grid_row) and
    image_settings."""

    name: ClassVar[str]
    model_type: ClassVar[str]
    processor_class: ClassVar[str]
    templates: ClassVar[Mapping[str, ChatTemplate]]
    """By the language model's type."""
    image_settings: Callable[[], dict[str, Any]]
    """preprocessor_config.json."""
    special_tokens = ("<s>", "</s>", "<image>")
    plain_tokens = ()
    markers = Markers(eos="</s>", turn_end="</s>", image_pad="<image>", video_pad="<image>", bos="<s>")
    objects = BracketObjects()
    coordinates: Convention
    merge_size = temporal_patch_size = 1
    tokens_per_second = 0.0
    """There are no videos."""
    assumed = ()
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    part_prefixes = ("", "language_model.", "vision_tower.", "multi_modal_projector.")

    def __init__(self, config: Mapping[str, Any]):
        self.config: dict[str, Any] = copy.deepcopy(dict(config))
        stated = fields.section(self.config, "vision_config")
        vision = fields.filled(stated, CLIP if stated else CLIP_L, "vision_config")
        self.config["vision_config"] = vision
        text = {"model_type": "llama"} | fields.section(self.config, "text_config")
        where = f"{self.name}: text_config.model_type"
        if text["model_type"] not in self.templates:
            raise ModelError(
                "no such language model", where=where, expected=sorted(self.templates), got=text["model_type"]
            )
        defaults, free = TEXT[text["model_type"]], ("num_key_value_heads",)
        self.config["text_config"] = fields.filled(text, defaults, "text_config", nullable=free)
        fields.filled(text, {"vocab_size": TEXT_VOCAB}, "text_config")
        if (found := vision.setdefault("model_type", "clip_vision_model")) != "clip_vision_model":
            raise ModelError("no such tower", where="vision_config.model_type", expected="clip_vision_model", got=found)
        if text["model_type"] == "mistral" and text.get("sliding_window", 4096) is not None:
            raise ModelError(
                "a language model with a sliding window",
                where="text_config.sliding_window",
                expected="null, as in Mistral-7B-Instruct-v0.2",
                got=text.get("sliding_window", "none stated, which is Mistral's 4096"),
            )
        self.template = self.templates[text["model_type"]]
        self.patch_size, self.tile = vision["patch_size"], vision["image_size"]
        if self.tile % self.patch_size:
            raise ModelError(
                "a tile that patches do not fill",
                where="vision_config.image_size",
                expected=f"a multiple of vision_config.patch_size {self.patch_size}",
                got=self.tile,
            )
        self.feature_layers = _feature_layers(self.config)
        self.config.setdefault("image_seq_length", self.side**2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Self:
        """Raises ModelError for the config of another model, RecipeError for a rate of temporal ids.

        ModelError too for sizes that are no numbers or do not fit each other.
        """
        if tokens_per_second is not None:
            raise RecipeError([("model.tokens_per_second", f"{cls.name} reads no videos: leave it out")])
        fields.check_model_type(config, cls.model_type)
        return cls(config)

    # ---------------------------------------------------------------- media

    @cached_property
    def side(self) -> int:
        """Patches of a tile's side: 24 for CLIP-L/14-336."""
        return self.tile // self.patch_size

    @cached_property
    def patch_width(self) -> int:
        return 3 * self.patch_size**2

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid:
        raise ValueError(f"{self.name} reads no videos")

    def video_patches(self, frames: np.ndarray, grid: Grid) -> np.ndarray:
        raise ValueError(f"{self.name} reads no videos")

    def patches(self, grid: Grid) -> int:
        return grid.t * grid.h * grid.w

    def patches_of(self, pixels: np.ndarray) -> np.ndarray:
        """uint8[H, W, 3], sides multiples of a tile's -> uint8[P, 3 * patch^2]: tile by tile, row by row, in each its
        patches row by row, in a patch channel by channel."""
        p, n = self.patch_size, self.side
        rows, columns = pixels.shape[0] // self.tile, pixels.shape[1] // self.tile
        blocks = pixels.reshape(rows, n, p, columns, n, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return np.ascontiguousarray(blocks).reshape(-1, self.patch_width)

    def media_pieces(self, shown: Shown) -> list[Piece]:
        """The picture alone: the chat template moves it to the front of its turn, with a line break after it."""
        if shown.kind == "video":
            raise ValueError(f"{self.name} reads no videos")
        return [Piece("image", media=shown.media)]

    def position_ids(self, spans: Sequence[Placed], *, start: int = 0, first: int = 0) -> np.ndarray:
        """int64[4, L] of one segment: every token has one position."""
        return plain_positions(spans, start=start, first=first)

    # ---------------------------------------------------------------- names

    def group_of(self, parameter_name: str) -> Group:
        """The module group of a parameter, by its name in the torch model or in the hub layout."""
        hub = self.hub_name(parameter_name)
        if hub.startswith("multi_modal_projector.") or hub == "image_newline":
            return "merger"
        if hub.startswith("vision_tower.vision_model."):
            return "vision"
        if hub.startswith(("language_model.model.", "language_model.lm_head.")):
            return "llm"
        raise ModelError("a parameter that belongs to no module group", where=parameter_name)

    def constant(self, parameter_name: str) -> str | None:
        """Why a parameter is never trained whatever the recipe says."""
        inside = self.hub_name(parameter_name).removeprefix("vision_tower.vision_model.")
        if inside.startswith("post_layernorm."):
            return "normalises the class token, which is not used"
        layer = re.match(r"encoder\.layers\.(\d+)\.", inside)
        if layer and int(layer.group(1)) >= self.feature_layers:
            return f"above the feature layer: features are those after {self.feature_layers} layers"
        return None

    def hub_name(self, parameter_name: str) -> str:
        """Name in released files: language_model.model.*, vision_tower.vision_model.*, multi_modal_projector.*. A hub
        name is returned as it is, one of transformers 5 (model.language_model.*, lm_head.*) in the released form."""
        name = parameter_name
        if name.startswith("lm_head."):
            return f"language_model.{name}"
        if name.startswith("model.language_model."):
            return "language_model.model." + name.removeprefix("model.language_model.")
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")):
            name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
        return name

    def model_name(self, hub_name: str) -> str:
        """Name in the torch model. A model name is returned as it is."""
        name = self.hub_name(hub_name)
        for hub, inside in (
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
            ("image_newline", "model.image_newline"),
        ):
            if name.startswith(hub):
                return inside + name.removeprefix(hub)
        return name

    # ---------------------------------------------------------------- model and export

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return config["text_config"]

    def with_tokens(self, id_of: Callable[[str], int]) -> dict[str, Any]:
        """pad_token_id stands outside text_config: inside it, that row of the embedding would get no gradient, and </s>
        is read between turns.

        ModelError for a tokenizer of another chat template: config.json says `llama` of them all.
        """
        for token, release in OTHER_TEMPLATES.items():
            if _has(id_of, token):
                raise ModelError(
                    f"a language model whose chat template {self.name} does not have",
                    where=f"the tokenizer, which has {token}",
                    expected=f"one of {self.template.name}",
                    got=f"that of {release}",
                    do="take a base of Vicuna, Llama 2 or Mistral",
                )
        config = copy.deepcopy(self.config)
        config.pop("image_token_id", None)
        config["image_token_index"] = id_of(self.markers.image_pad)
        config.setdefault("pad_token_id", id_of(self.markers.eos))
        config["text_config"] |= {"bos_token_id": id_of("<s>"), "eos_token_id": id_of(self.markers.eos)}
        return config

    def with_one_layer(self) -> dict[str, Any]:
        config = self.export_config()
        config["text_config"]["num_hidden_layers"] = 1
        return config

    def export_config(self) -> dict[str, Any]:
        return copy.deepcopy(self.config)

    def pixel_settings(self, **more: Any) -> dict[str, Any]:
        """What preprocessor_config.json says of both."""
        return {
            "crop_size": {"height": self.tile, "width": self.tile},
            "do_center_crop": True,  # after resizing, every tile has this size already
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "processor_class": self.processor_class,
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": self.tile},
            **more,
        }

    def processor_files(self, pixels: Pixels) -> dict[str, str]:
        """Files that Hugging Face's processor needs beside the tokenizer: name -> content. Budgets in pixels say
        nothing here: tiles have one size."""
        processor = {
            "image_token": self.markers.image_pad,
            "num_additional_image_tokens": 1,  # the class token, which "default" takes away again
            "patch_size": self.patch_size,
            "processor_class": self.processor_class,
            "vision_feature_select_strategy": "default",
        }
        return {
            "preprocessor_config.json": json.dumps(self.image_settings(), indent=2, sort_keys=True) + "\n",
            "processor_config.json": json.dumps(processor, indent=2, sort_keys=True) + "\n",
            "chat_template.jinja": CHAT_TEMPLATES[self.template.name],
        }

    def import_warnings(self, processor: Mapping[str, Any]) -> list[str]:
        return []

    def unused(self, stored_name: str) -> bool:
        """The text half of a whole CLIP, and buffers that older versions saved."""
        own = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
        return stored_name.startswith(own) or stored_name.endswith((".position_ids", ".rotary_emb.inv_freq"))

    def tokenizer_settings(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "bos_token": self.markers.bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": self.markers.eos,
            "pad_token": self.markers.eos,
            "image_token": self.markers.image_pad,
        }

    def shape(self) -> Shape:
        text, vision = self.config["text_config"], self.config["vision_config"]
        c, width = vision["hidden_size"], text["hidden_size"]
        return Shape(
            text_weights=Shape.decoder_weights(text),
            text_layers=text["num_hidden_layers"],
            text_width=text["num_attention_heads"] * (text.get("head_dim") or width // text["num_attention_heads"]),
            hidden_size=width,
            vocab_size=text.get("vocab_size", TEXT_VOCAB),
            patch_weights=c * self.patch_width
            + self.feature_layers * (4 * c * c + 2 * c * vision["intermediate_size"]),
            merger_weights=c * width + width * width,
            vision_width=c,
            full_layers=self.feature_layers,
        )

    def layout_facts(self) -> dict[str, Any]:
        """Everything of the family that token counts, positions and pixels depend on: part of the plan's digest."""
        return {
            **common_facts(self),
            "tile": self.tile,
        }


def _has(id_of: Callable[[str], int], token: str) -> bool:
    try:
        id_of(token)
    except DataError:
        return False
    return True


def _feature_layers(config: Mapping[str, Any]) -> int:
    """How many layers of the tower run: features are the hidden state after them (vision_feature_layer, -2 in every
    released config; the first hidden state is the embedding's).

    Raises:
        ModelError: several layers, one that the tower lacks, or features with the class token.
    """
    depth, layer = config["vision_config"]["num_hidden_layers"], config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise ModelError("no such layer", where="vision_feature_layer", expected=f"one of {depth}, as -2", got=layer)
    if (strategy := config.get("vision_feature_select_strategy", "default")) != "default":
        where = "vision_feature_select_strategy"
        raise ModelError("the class token is no feature", where=where, expected="default", got=strategy)
    return layer if layer >= 0 else depth + 1 + layer

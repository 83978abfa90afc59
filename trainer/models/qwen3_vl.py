"""Qwen3-VL, dense: grids, timestamps, template and names (arXiv 2511.21631; released config.json; transformers 5.23).

Arithmetic only: the torch model is transformers' Qwen3VLForConditionalGeneration, imported inside `build`. What it does
otherwise than Qwen2.5-VL: patches of 16 pixels, a learned grid of positions in the tower, DeepStack (outputs of earlier
layers of the tower have mergers of their own and are added after the first layers of the language model), times of a
video as text before each row of its grid, coordinates in thousandths, no default system message.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.chat import ChatML
from trainer.data.coordinates import Convention
from trainer.data.objects import JsonObjects
from trainer.data.pieces import Piece, Shown, Turn
from trainer.errors import ModelError, RecipeError
from trainer.flops import Shape
from trainer.models import fields
from trainer.models.family import AspectError, Grid, Group
from trainer.models.native import MAX_ASPECT
from trainer.models.released import Released
from trainer.recipe import Pixels

VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 3584,
    "deepstack_visual_indexes": (8, 16, 24),
}
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}
"""What transformers fills in where a config.json leaves it out."""
MROPE_SECTION = (24, 20, 20)

CHAT_TEMPLATE = (
    "{%- set image_count = namespace(value=0) %}{%- set video_count = namespace(value=0) %}"
    "{%- macro shown(item) %}{%- if item.type == 'image' or 'image' in item or 'image_url' in item %}"
    "{%- set image_count.value = image_count.value + 1 %}"
    "{%- if add_vision_id %}{{- 'Picture ' ~ image_count.value ~ ': ' }}{%- endif %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif item.type == 'video' or 'video' in item %}{%- set video_count.value = video_count.value + 1 %}"
    "{%- if add_vision_id %}{{- 'Video ' ~ video_count.value ~ ': ' }}{%- endif %}{{- '<|video_pad|>' }}"
    "{%- elif 'text' in item %}{{- item.text }}{%- endif %}{%- endmacro %}"
    "{%- macro seen(content) %}{%- if content is string %}{{- content }}"
    "{%- else %}{%- for item in content %}{{- shown(item) }}{%- endfor %}{%- endif %}{%- endmacro %}"
    "{%- macro said(content) %}{%- if content is string %}{{- content }}{%- else %}"
    "{%- for item in content if 'text' in item %}{{- item.text }}{%- endfor %}{%- endif %}{%- endmacro %}"
    "{%- set has_system = messages[0].role == 'system' %}"
    "{%- if tools or has_system %}{{- '<|im_start|>system\\n' }}"
    "{%- if has_system %}{{- said(messages[0].content) }}{%- endif %}"
    "{%- if tools %}{%- if has_system %}{{- '\\n\\n' }}{%- endif %}"
    "{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}"
    "{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\\n</tool_call>' }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\\n' ~ seen(message.content) ~ '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' ~ said(message.content) }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}"
    '{%- set call = call.function or call %}{{- \'<tool_call>\\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
    "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' ~ seen(message.content) ~ '\\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Writes what the template of the released Instruct models writes, but for a video: <|video_pad|> alone (README)."""


@dataclass(frozen=True)
class Qwen3ChatML(ChatML):
    """ChatML in which what a tool answers is said by the user, between tags; the system speaks first or not at all.

    The published template leaves out a later system message, and pictures of system and assistant, in silence; here
    each is a ValueError.
    """

    system: str | None = None
    name: str = "qwen3"

    def conversation(self, turns: Sequence[Turn], *, open_turn: bool = False) -> list[Piece]:
        opening, rest = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ((), turns)
        return super().conversation([*map(_spoken, opening), *_answered(rest)], open_turn=open_turn)

    def answer(self, turns: Sequence[Turn]) -> list[Piece]:
        return super().answer([_spoken(turns[0]), *_answered(turns[1:])])


def _answered(turns: Sequence[Turn]) -> list[Turn]:
    """Turns after the system's, consecutive answers of tools as one turn of the user."""
    found: list[Turn] = []
    after_tool = False
    for turn in turns:
        if turn.role == "system":
            raise ValueError("Qwen3-VL's template has a place for the system at the beginning only")
        if turn.role == "tool":
            said = (Piece("text", "<tool_response>\n"), *turn.content, Piece("text", "\n</tool_response>"))
            if after_tool:
                said = (*found.pop().content, Piece("text", "\n"), *said)
            found.append(Turn("user", said))
        else:
            found.append(turn if turn.role == "user" else _spoken(turn))
        after_tool = turn.role == "tool"
    return found


def _spoken(turn: Turn) -> Turn:
    if any(piece.kind in ("image", "video") for piece in turn.content):
        raise ValueError(f"Qwen3-VL's template has no place for pictures of the {turn.role}")
    return turn


class Qwen3VL(Released):
    name = model_type = "qwen3_vl"
    plain_tokens = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    template = Qwen3ChatML()
    objects = JsonObjects()
    coordinates = Convention("thousand")
    processor_class = "Qwen3VLProcessor"
    text_defaults, vision_defaults = TEXT_DEFAULTS, VISION_DEFAULTS
    image_mean = image_std = (0.5, 0.5, 0.5)
    part_prefixes = ("", "visual.", "model.")
    frames_to_both_ends = True
    tokens_per_second = 0.0
    """There is no absolute time in its ids: each row of a video's grid stands alone, its time before it as text."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = copy.deepcopy(dict(config))
        self._read_sizes(patch_size=16)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Qwen3VL:
        """Raises ModelError for the config of another model or one that transformers would misread, RecipeError for a
        rate of temporal ids."""
        if tokens_per_second is not None:
            raise RecipeError([("model.tokens_per_second", "Qwen3-VL writes times as text, not as ids: leave it out")])
        fields.check_model_type(config, cls.model_type)
        flat = [name for name in ("hidden_size", "num_hidden_layers") if name in config]
        if flat and not config.get("text_config"):
            raise ModelError(
                "the language model's fields stand at the top of config.json, where transformers does not look",
                where=", ".join(flat),
                expected="text_config, as in every released Qwen3-VL",
                do="move the language model's fields into text_config",
            )
        family = cls(config)
        family._check()
        family.shape()
        return family

    def _check(self) -> None:
        """transformers runs all of these without a word: M-RoPE is always interleaved there, frequencies beyond the
        sections count as temporal, DeepStack outputs beyond the last layer are computed and dropped."""
        text, vision = self._text(), self._vision()
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        section, half = tuple(rope.get("mrope_section", MROPE_SECTION)), text["head_dim"] // 2
        if sum(section) != half:
            raise ModelError(
                "M-RoPE's sections do not fill a head",
                where="text_config.rope_parameters.mrope_section",
                expected=f"{half} frequencies, half of head_dim",
                got=list(section),
            )
        if not rope.get("mrope_interleaved", True):
            raise ModelError(
                "Qwen3-VL's M-RoPE is interleaved", where="text_config.rope_parameters.mrope_interleaved", got=False
            )
        taken = tuple(vision["deepstack_visual_indexes"])
        if len(taken) > text["num_hidden_layers"] or any(not 0 <= layer < vision["depth"] for layer in taken):
            raise ModelError(
                "DeepStack takes layers that are not there",
                where="vision_config.deepstack_visual_indexes",
                expected=f"at most {text['num_hidden_layers']} layers below {vision['depth']}",
                got=list(taken),
            )

    # ---------------------------------------------------------------- media

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid:
        """The size and patches of `num_frames` frames, an even number, as transformers' Qwen3VLVideoProcessor has them
        with cap_pixels_per_frame: a frame has at most `max_pixels` in whole tokens, and its even share of
        `total_pixels`, which counts a pair of frames once; `min_pixels` is of all frames together."""
        cap = min(max_pixels // self.factor**2 * self.factor**2, total_pixels * self.temporal_patch_size // num_frames)
        most = num_frames * max(cap, int(min_pixels * 1.05))
        width, height = resize_volume(num_frames, width, height, self.factor, min_pixels, most)
        t = num_frames // self.temporal_patch_size
        return Grid(t, height // self.patch_size, width // self.patch_size, width, height)

    def media_pieces(self, shown: Shown) -> list[Piece]:
        """An image as in Qwen2-VL. A video row by row, each with its time before it: "<0.3 seconds>" and the row's
        frames between <|vision_start|> and <|vision_end|>; as one piece where no times are given."""
        if shown.kind == "image" or not shown.times:
            return super().media_pieces(shown)
        start, end = Piece("special", "<|vision_start|>"), Piece("special", "<|vision_end|>")
        return [
            piece
            for row, seconds in enumerate(shown.times)
            for piece in (
                Piece("text", f"<{seconds:.1f} seconds>"),
                start,
                Piece("video", "", False, shown.media, row),
                end,
            )
        ]

    # ---------------------------------------------------------------- names

    def group_of(self, parameter_name: str) -> Group:
        """The module group of a parameter, by its name in the torch model or in either hub layout."""
        name = self.model_name(parameter_name)
        if name.startswith(("model.visual.merger.", "model.visual.deepstack_merger_list.")):
            return "merger"
        if name.startswith("model.visual."):
            return "vision"
        if name.startswith(("model.language_model.", "lm_head.")):
            return "llm"
        raise ModelError("a parameter that belongs to no module group", where=parameter_name)

    def hub_name(self, parameter_name: str) -> str:
        """Released files have transformers 5's own names: model.visual.*, model.language_model.*, lm_head.*. Names of
        the older layout (visual.*, model.layers.*) become these."""
        return self.model_name(parameter_name)

    # ---------------------------------------------------------------- model and export

    def with_one_layer(self) -> dict[str, Any]:
        """config.json with as few layers of the language model as take DeepStack's outputs."""
        config = super().with_one_layer()
        self.text_config(config)["num_hidden_layers"] = max(len(self._vision()["deepstack_visual_indexes"]), 1)
        return config

    def processor_files(self, pixels: Pixels) -> dict[str, str]:
        """Files that Hugging Face's processor needs beside the tokenizer: name -> content."""
        files = super().processor_files(pixels)
        name = "video_preprocessor_config.json"
        video = json.loads(files[name]) | {
            "video_processor_type": "Qwen3VLVideoProcessor",
            # of all frames together, a pair counted twice
            "size": {
                "shortest_edge": pixels.video_min,
                "longest_edge": pixels.video_total * self.temporal_patch_size,
            },
            "max_video_tokens": pixels.video_max // self.factor**2,
        }
        files[name] = json.dumps(video, indent=2, sort_keys=True) + "\n"
        files["chat_template.jinja"] = CHAT_TEMPLATE
        return files

    def shape(self) -> Shape:
        text, vision = self._text(), self._vision()
        c, depth = vision["hidden_size"], vision["depth"]
        wide = c * self.merge_size**2
        mergers = 1 + len(vision["deepstack_visual_indexes"])
        return Shape(
            text_weights=Shape.decoder_weights(text),
            text_layers=text["num_hidden_layers"],
            text_width=text["num_attention_heads"] * text["head_dim"],
            hidden_size=text["hidden_size"],
            vocab_size=text["vocab_size"],
            patch_weights=c * self.patch_width + depth * (4 * c * c + 2 * c * vision["intermediate_size"]),
            merger_weights=mergers * (wide * wide + wide * vision["out_hidden_size"]) / self.merge_size**2,
            vision_width=c,
            full_layers=depth,
        )


def resize_volume(
    num_frames: int, width: int, height: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(width, height) in multiples of `factor`, aspect kept, frames x width x height within the budgets: the rule of
    transformers' Qwen3VLVideoProcessor. AspectError above an aspect of 200."""
    if min(width, height) < 1:
        raise AspectError(f"aspect ratio of {width}x{height} is undefined")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    if (aspect := max(height, width) / min(height, width)) > MAX_ASPECT:
        raise AspectError(f"aspect ratio {aspect:.1f} of {width}x{height} is above {MAX_ASPECT}")
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if num_frames * h * w > max_pixels:
        beta = math.sqrt((num_frames * height * width) / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif num_frames * h * w < min_pixels:
        beta = math.sqrt(min_pixels / (num_frames * height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return w, h

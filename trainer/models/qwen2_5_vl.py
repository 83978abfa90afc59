"""Qwen2.5-VL: grids, positions and names (arXiv 2502.13923; released config.json; transformers 5.23).

Arithmetic only: the torch model is transformers' Qwen2_5_VLForConditionalGeneration, imported inside `build`.
Shapes are read from the config (intermediate 3420 in the released 3B and 7B, 3456 in 32B), never assumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from trainer.data.coordinates import Convention
from trainer.data.objects import JsonObjects, ObjectStyle
from trainer.errors import ModelError, RecipeError
from trainer.flops import Shape
from trainer.models import fields
from trainer.models.released import Released

DEFAULT_TOKENS_PER_SECOND = 4
"""transformers' own, which saving leaves out of config.json; every released one says 2, the report's 40 ms is 25."""
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
"""What transformers fills in where a config.json leaves it out."""
ASSUMED_RATE = (
    f"config.json has no vision_config.tokens_per_second: {DEFAULT_TOKENS_PER_SECOND} is taken, as transformers does; "
    "the released models have 2 (model.tokens_per_second says it)"
)


class Qwen25VL(Released):
    name = model_type = "qwen2_5_vl"
    plain_tokens = ("<tool_call>", "</tool_call>")
    objects: ObjectStyle = JsonObjects()
    coordinates = Convention("absolute")
    processor_class = "Qwen2_5_VLProcessor"
    vision_defaults = VISION_DEFAULTS

    def __init__(self, config: Mapping[str, Any], tokens_per_second: float | None = None):
        self.config = copy.deepcopy(dict(config))
        vision = self._read_sizes()
        if tokens_per_second is not None:
            vision["tokens_per_second"] = tokens_per_second
        elif "tokens_per_second" not in vision:
            vision["tokens_per_second"] = DEFAULT_TOKENS_PER_SECOND
            self.assumed = (ASSUMED_RATE,)
        rate = vision["tokens_per_second"]
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not _is_whole(rate):
            raise ModelError(
                "a rate of temporal ids that transformers' config does not take",
                where="vision_config.tokens_per_second",
                expected="a whole number above 0",
                got=repr(rate),
                do="say model.tokens_per_second in the recipe",
            )
        self.tokens_per_second = float(rate)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Qwen25VL:
        """Raises ModelError for the config of another model, sizes that are no numbers or a rate in it that cannot be
        exported, RecipeError for such a rate in the recipe."""
        if tokens_per_second is not None and not _is_whole(tokens_per_second):
            raise RecipeError(
                [("model.tokens_per_second", f"{tokens_per_second} is not whole, which transformers' config demands")]
            )
        fields.check_model_type(config, cls.model_type)
        family = cls(config, tokens_per_second)
        family.shape()  # what is missing shows here, before a device is held
        return family

    def export_config(self) -> dict[str, Any]:
        """config.json for export: as read, with the tokens_per_second that was trained with."""
        config = super().export_config()
        config["vision_config"]["tokens_per_second"] = int(self.tokens_per_second)
        return config

    def shape(self) -> Shape:
        text, vision = self._text(), self._vision()
        c, depth = vision["hidden_size"], vision["depth"]
        wide = c * self.merge_size**2
        full = len({layer for layer in vision["fullatt_block_indexes"] if layer < depth})
        return Shape(
            text_weights=Shape.decoder_weights(text),
            text_layers=text["num_hidden_layers"],
            text_width=text["hidden_size"],
            hidden_size=text["hidden_size"],
            vocab_size=text["vocab_size"],
            patch_weights=c * self.patch_width + depth * (4 * c * c + 3 * c * vision["intermediate_size"]),
            merger_weights=(wide * wide + wide * vision["out_hidden_size"]) / self.merge_size**2,
            vision_width=c,
            full_layers=full,
            windowed_layers=depth - full,
            window=vision["window_size"] // self.patch_size,
        )


def _is_whole(rate: float) -> bool:
    return math.isfinite(rate) and rate >= 1 and rate == int(rate)

"""Qwen2-VL: grids, positions and names (arXiv 2409.12191; released config.json; transformers 5.23).

Arithmetic only: the torch model is transformers' Qwen2VLForConditionalGeneration, imported inside `build`. What it does
otherwise than Qwen2.5-VL: every layer of the tower attends to the whole picture, LayerNorm and QuickGELU there,
temporal ids count the grid rows of a video whatever its rate, coordinates in thousandths between special tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from trainer.data.coordinates import Convention
from trainer.data.objects import ObjectStyle, TaggedObjects
from trainer.errors import RecipeError
from trainer.flops import Shape
from trainer.models import fields
from trainer.models.released import Released

VISION_DEFAULTS = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584}
"""What transformers fills in where a config.json leaves it out; `hidden_size` is the language model's."""


class Qwen2VL(Released):
    name = model_type = "qwen2_vl"
    objects: ObjectStyle = TaggedObjects()
    coordinates = Convention("thousand")
    processor_class = "Qwen2VLProcessor"
    vision_defaults = VISION_DEFAULTS
    tokens_per_second = 0.0
    """There is no absolute time in its ids."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = copy.deepcopy(dict(config))
        self._read_sizes()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Qwen2VL:
        """Raises ModelError for the config of another model or sizes that are no numbers, RecipeError for a rate of
        temporal ids."""
        if tokens_per_second is not None:
            raise RecipeError(
                [("model.tokens_per_second", "Qwen2-VL's temporal ids count grid rows, not time: leave it out")]
            )
        fields.check_model_type(config, cls.model_type)
        family = cls(config)
        family.shape()  # what is missing shows here, before a device is held
        return family

    def _ids_per_grid(self, seconds_per_grid: float) -> float:
        """One, whatever the rate (section 2.1: the temporal ID increments for each frame)."""
        return 1.0

    def shape(self) -> Shape:
        text, vision = self._text(), self._vision()
        c, depth = vision["embed_dim"], vision["depth"]
        wide = c * self.merge_size**2
        return Shape(
            text_weights=Shape.decoder_weights(text),
            text_layers=text["num_hidden_layers"],
            text_width=text["hidden_size"],
            hidden_size=text["hidden_size"],
            vocab_size=text["vocab_size"],
            patch_weights=int(c * self.patch_width + depth * (4 + 2 * vision["mlp_ratio"]) * c * c),
            merger_weights=(wide * wide + wide * vision["hidden_size"]) / self.merge_size**2,
            vision_width=c,
            full_layers=depth,
        )

"""What a model family provides: arithmetic and names, without torch.

A family is a class with one instance per model config. Planner, loader, trainer and export all ask the same instance,
so a count made from a header and a tensor made from pixels cannot disagree. What subclasses nn.Module is imported
inside `build`.

    family = load_family("qwen2_5_vl", config, tokens_per_second=2)
    grid = family.image_grid(640, 480, min_pixels=3136, max_pixels=50176)
    family.visual_tokens(grid), family.patches(grid)
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from trainer.data.coordinates import Convention
from trainer.errors import RecipeError

if TYPE_CHECKING:
    from trainer.recipe import Pixels

Group = Literal["vision", "merger", "llm"]


@dataclass(frozen=True)
class Grid:
    """Patches of one image or video, and the size in pixels that it is resized to."""

    t: int
    h: int
    w: int
    width: int
    height: int


@dataclass(frozen=True)
class Markers:
    """Token strings that rendering writes; never parsed out of a user's text."""

    im_start: str = "<|im_start|>"
    im_end: str = "<|im_end|>"
    eos: str = "<|endoftext|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    image_pad: str = "<|image_pad|>"
    video_pad: str = "<|video_pad|>"


class Placed(Protocol):
    """What positions need to know of a span of tokens (layout.Span has it)."""

    @property
    def kind(self) -> Literal["text", "image", "video"]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def grid(self) -> Grid | None: ...
    @property
    def seconds_per_grid(self) -> float: ...


class Family(Protocol):
    name: str
    config: dict[str, Any]
    """config.json as read, with what layout depends on filled in."""
    tokens_per_second: float
    special_tokens: tuple[str, ...]
    """In order of id, for a tokenizer trained on the corpus; never produced by a user's text."""
    plain_tokens: tuple[str, ...]
    """Added after them as whole tokens that are not special: text that spells one gives it, as in the released one."""
    markers: Markers
    default_system: str | None
    coordinates: Convention
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float]
    """Of pixels / 255, subtracted on the device."""
    image_std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None) -> Family: ...

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid: ...

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid: ...

    def visual_tokens(self, grid: Grid) -> int: ...

    def patches(self, grid: Grid) -> int: ...

    def patchify(self, frames: np.ndarray) -> np.ndarray: ...

    def position_ids(self, spans: Sequence[Placed], *, start: int = 0, first: int = 0) -> np.ndarray: ...

    def group_of(self, parameter_name: str) -> Group: ...

    def constant(self, parameter_name: str) -> str | None: ...

    def hub_name(self, parameter_name: str) -> str: ...

    def model_name(self, hub_name: str) -> str: ...

    def build(self, *, dtype: Any, attn_implementation: str | None = None, init: bool = True) -> Any: ...

    def export_config(self) -> dict[str, Any]: ...

    def processor_files(self, pixels: Pixels) -> dict[str, str]: ...

    def layout_facts(self) -> dict[str, Any]: ...


FAMILIES: dict[str, str] = {"qwen2_5_vl": "trainer.models.qwen2_5_vl:Qwen25VL"}
"""Family name -> module:class. A table and not imports: a family that a run does not use is not loaded."""


def load_family(name: str, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Family:
    """The family of a model config. `tokens_per_second` overrides the config's; raises RecipeError if unknown."""
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError([("family", f"no family {name!r}; known are {sorted(FAMILIES)}{hint}")])
    module, cls = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), cls).from_config(config, tokens_per_second=tokens_per_second)

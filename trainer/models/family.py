"""What a model family provides: arithmetic and names, without torch.

A family is a class with one instance per model config. Planner, loader, trainer and export all ask the same instance,
so a count made from a header and a tensor made from pixels cannot disagree. What subclasses nn.Module lies in the file
X_model.py beside X.py (Parts, below) and is imported inside `build`.

    family = load_family("qwen2_5_vl", config, tokens_per_second=2)
    grid = family.image_grid(640, 480, min_pixels=3136, max_pixels=50176)
    family.visual_tokens(grid), family.patches(grid)
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL.Image import Image

from trainer.data.chat import ChatTemplate
from trainer.data.coordinates import Convention
from trainer.data.objects import ObjectStyle
from trainer.data.pieces import Piece, Shown
from trainer.errors import RecipeError
from trainer.flops import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache

    from trainer.recipe import Pixels
    from trainer.step.attention import Segment
    from trainer.step.loss import Head

Group = Literal["vision", "merger", "llm"]


class AspectError(ValueError):
    """A picture or video too long or too thin for a family's grids; samples with one are dropped as `aspect`."""


@dataclass(frozen=True)
class Grid:
    """Patches of one image or video, and the size in pixels that it is resized to."""

    t: int
    h: int
    w: int
    width: int
    height: int
    source: tuple[int, int] = (0, 0)
    """Width and height of the original, where tokens or pixels depend on them besides the resized size."""


@dataclass(frozen=True)
class Markers:
    """Tokens that the frame itself writes or looks up; a chat template and a family write their own besides."""

    eos: str = "<|endoftext|>"
    """Ends a document; pads."""
    turn_end: str = "<|im_end|>"
    """Ends an answer: generation stops there."""
    image_pad: str = "<|image_pad|>"
    """Stands in each place that an image's features fill."""
    video_pad: str = "<|video_pad|>"
    bos: str | None = None
    """Begins a document."""


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
    model_type: str
    """Of config.json."""
    config: dict[str, Any]
    """config.json as read, with what layout depends on filled in."""
    tokens_per_second: float
    assumed: tuple[str, ...]
    """What was filled in for a config that leaves it out, where released models have something else: told."""
    special_tokens: tuple[str, ...]
    """In order of id, for a tokenizer trained on the corpus; never produced by a user's text."""
    plain_tokens: tuple[str, ...]
    """Added after them as whole tokens that are not special: text that spells one gives it, as in the released one."""
    markers: Markers
    template: ChatTemplate
    objects: ObjectStyle
    coordinates: Convention
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    patch_width: int
    """Values of one patch: channels x frames x patch_size^2."""
    grid_columns: int
    """Length of grid_row."""
    frames_to_both_ends: bool
    """A video's frames reach from its first to its last one, not over equal parts. Asked where videos are."""
    image_mean: tuple[float, float, float]
    """Of pixels / 255, subtracted on the device."""
    image_std: tuple[float, float, float]
    part_prefixes: tuple[str, ...]
    """What hub names of a lone language model, vision tower or merger may lack."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None) -> Family:
        """ModelError for the config of another model or one whose sizes are missing or no numbers, so that shape()
        never fails; RecipeError for a setting that the family does not have."""
        ...

    # ---- media: counts from headers, patches from pixels. AspectError: a ratio beyond it; ValueError: a kind of medium

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid: ...

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid: ...

    def grid_row(self, grid: Grid) -> tuple[int, ...]:
        """t, h, w with t * h * w patches, then what else the vision plan needs to know."""
        ...

    def visual_tokens(self, grid: Grid) -> int: ...

    def patches(self, grid: Grid) -> int: ...

    def image_patches(self, picture: Image, grid: Grid) -> np.ndarray:
        """uint8[patches, patch_width] of an upright RGB picture; one of another size than the grid was made for is
        resized to it."""
        ...

    def video_patches(self, frames: np.ndarray, grid: Grid) -> np.ndarray:
        """The same of uint8[T, grid.height, grid.width, 3]."""
        ...

    # ---- text

    def media_pieces(self, shown: Shown) -> list[Piece]:
        """A medium with the tokens around it. ValueError: the family has no place for it."""
        ...

    def position_ids(self, spans: Sequence[Placed], *, start: int = 0, first: int = 0) -> np.ndarray:
        """int64[4, L] of one segment: row 0 counts tokens from `first`, rows 1-3 are the rotary ids from `start` (three
        equal rows where a token has one position)."""
        ...

    # ---- names

    def group_of(self, parameter_name: str) -> Group: ...

    def constant(self, parameter_name: str) -> str | None:
        """Why a parameter is never trained whatever the recipe says; None: it can be."""
        ...

    def hub_name(self, parameter_name: str) -> str: ...

    def model_name(self, hub_name: str) -> str: ...

    # ---- model and export

    def build(self, *, dtype: Any, attn_implementation: str | None = None, init: bool = True) -> Any: ...

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of a config.json that describes the language model; may be the whole."""
        ...

    def with_tokens(self, id_of: Callable[[str], int]) -> dict[str, Any]:
        """config.json with the ids that a tokenizer gives to the family's tokens."""
        ...

    def with_one_layer(self) -> dict[str, Any]:
        """config.json with one layer of the language model: for a vision tower trained alone."""
        ...

    def export_config(self) -> dict[str, Any]: ...

    def processor_files(self, pixels: Pixels) -> dict[str, str]:
        """Files that Hugging Face's processor needs beside the tokenizer: name -> content."""
        ...

    def tokenizer_settings(self) -> dict[str, Any]:
        """What of tokenizer_config.json follows from the family."""
        ...

    def import_warnings(self, processor: Mapping[str, Any]) -> list[str]:
        """What a released model's preprocessor_config.json does otherwise than training here; its chat template is
        compared for every family (templates.py)."""
        ...

    def unused(self, stored_name: str) -> bool:
        """Whether a tensor of a released model or part has no place in the model: the text half of CLIP, saved
        buffers."""
        ...

    def shape(self) -> Shape: ...

    def layout_facts(self) -> dict[str, Any]:
        """Everything of the family that token counts, positions and pixels depend on: part of the plan's digest."""
        ...


class Parts(Protocol):
    """What PARTS of the module X_model.py beside a family's file X.py has (common_model.py).

    Shapes: L tokens, P patches, M media, G grid columns, N visual tokens, C hidden width, D vision width, B rows.
    `plan` is whatever plan_vision returns: what host and device would otherwise wait for each other to derive.
    """

    def build(
        self, config: Mapping[str, Any], *, dtype: Any, attn_implementation: str | None = None, init: bool = True
    ) -> Any:
        """attn_implementation "segments" is the trainer's; None transformers' default, for generation and export."""
        ...

    def exact_buffers(self, model: nn.Module) -> None:
        """Compute again, in fp32, every buffer that a cast of the whole model rounds."""
        ...

    def dummy_grid(self, model: nn.Module) -> tuple[int, ...]:
        """The grid row of the smallest picture, which keeps ranks in step where a pack has none."""
        ...

    def plan_vision(self, model: nn.Module, grids: Tensor, device: Any) -> Any:
        """From int64[M, G] on the host."""
        ...

    def run_vision(self, model: nn.Module, pixels: Tensor, plan: Any) -> tuple[Tensor, ...]:
        """Every output of the vision path that the language model may use: [N, C] first, then those of deeper layers.
        Every trainable parameter of tower and merger takes part in them, whatever the grids."""
        ...

    def tower(self, model: nn.Module, pixels: Tensor, plan: Any) -> Tensor:
        """Patch features before the merger [P, D], those of one medium together, media in order."""
        ...

    def embed_tokens(self, model: nn.Module, ids: Tensor) -> Tensor:
        """int64[L] -> [L, C]."""
        ...

    def run_language(
        self,
        model: nn.Module,
        embeddings: Tensor,
        position_ids: Tensor,
        segments: Sequence[Segment],
        deeper: tuple[Tensor, ...],
        visual_index: Tensor,
    ) -> Tensor:
        """[L, C] and int64[4, L] -> final hidden states [L, C]. `deeper` are run_vision's further outputs, for rows
        `visual_index`; empty where the pack has no picture."""
        ...

    def head_of(self, model: nn.Module) -> Head: ...

    def language_model(self, config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """A causal language model of the shape in a config.json, with random weights, as transformers has it alone;
        and its own config.json."""
        ...

    def see(self, model: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        """As run_vision, of a model with transformers' own attention: for generation."""
        ...

    def read(
        self,
        model: nn.Module,
        embeddings: Tensor,
        position_ids: Tensor,
        *,
        mask: Tensor | None,
        cache: Cache,
        deeper: tuple[Tensor, ...] = (),
        visual_index: Tensor | None = None,
    ) -> Tensor:
        """[B, L, C] and int64[4, B, L] -> hidden states [B, L, C], with a key-value cache: for generation."""
        ...


def plain_positions(spans: Sequence[Placed], *, start: int, first: int) -> np.ndarray:
    """int64[4, L] where every token has one position: Family.position_ids of a language model without M-RoPE."""
    count = np.arange(sum(span.num_tokens for span in spans), dtype=np.int64)
    return np.stack([count + first, *[count + start] * 3])


def common_facts(family: Any) -> dict[str, Any]:
    """What of Family.layout_facts every family has."""
    return {
        "family": family.name,
        "patch_size": family.patch_size,
        "coordinates": family.coordinates.kind,
        "image_mean": list(family.image_mean),
        "image_std": list(family.image_std),
        "template": family.template.name,
        "default_system": family.template.system,
        "objects": family.objects.name,
    }


FAMILIES: dict[str, str] = {
    "qwen_vl": "trainer.models.qwen_vl:QwenVL",
    "qwen2_vl": "trainer.models.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "trainer.models.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "trainer.models.qwen3_vl:Qwen3VL",
    "llava": "trainer.models.llava:Llava",
    "llava_next": "trainer.models.llava_next:LlavaNext",
}
"""Family name -> module:class. A table and not imports: a family that a run does not use is not loaded."""


def load_family(name: str, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> Family:
    """The family of a model config. `tokens_per_second` overrides the config's; raises RecipeError if unknown."""
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError([("family", f"no family {name!r}; known are {sorted(FAMILIES)}{hint}")])
    return class_of(name).from_config(config, tokens_per_second=tokens_per_second)


def class_of(name: str) -> type[Family]:
    """The class of a family of the table."""
    module, cls = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), cls)


def parts_of(family: Family) -> Parts:
    """The family's torch side."""
    return importlib.import_module(f"{type(family).__module__}_model").PARTS


class Buildable:
    """The same in every family."""

    export_config: Callable[[], dict[str, Any]]

    def build(self, *, dtype: Any, attn_implementation: str | None = None, init: bool = True) -> Any:
        """The torch model in `dtype` with random weights (`init`), or with memory only."""
        parts = parts_of(self)  # type: ignore[arg-type]
        return parts.build(self.export_config(), dtype=dtype, attn_implementation=attn_implementation, init=init)


def import_classes_of(model_type: str) -> None:
    """Import the torch side of every family with this model_type of config.json: one whose model transformers lacks
    registers its own with the Auto classes there."""
    for name in FAMILIES:
        if (cls := class_of(name)).model_type == model_type:
            importlib.import_module(f"{cls.__module__}_model")

"""What a rendered sample is made of, before it is tokenised: text, special tokens and media, in reading order.

Text is what somebody wrote: the name of a special token in it stays text. Special tokens are pieces of their own,
written by a chat template, a family or a style of writing objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.recipe import Rendering


@dataclass(frozen=True)
class Piece:
    kind: Literal["text", "special", "image", "video"]
    text: str = ""
    target: bool = False
    """The loss is taken over its tokens."""
    media: int = -1
    """Index in Sample.media."""
    row: int = -1
    """Of a video's grid, where each row stands on its own (timestamps between them); -1: the whole medium."""


@dataclass(frozen=True)
class Turn:
    """What one speaker says; with `target` the loss is taken over it and over the token that ends it."""

    role: str
    content: tuple[Piece, ...]
    target: bool = False


@dataclass(frozen=True)
class Shown:
    """A medium where it stands in the text."""

    kind: Literal["image", "video"]
    media: int
    number: int
    """From 1, among the sample's images or among its videos."""
    rendering: Rendering
    times: Sequence[float] = ()
    """Seconds of each row of a video's grid."""

"""Floating-point operations of a pack: what utilisation (MFU) is measured against. Without torch.

Counted: matrix products of forward and backward, attention per sample and not per pack (up to 44 % too many at 32k
otherwise), the vision tower with its windows. Left out: weight gradients of frozen parts, input gradients where nothing
before them is trained, recomputation, norms, embeddings look-up. A multiply-add is 2 operations.

    cost = Cost(family.shape(), train)
    cost.pack(segments, grids, num_targets)  -> Flops(vision, llm), forward and backward
    cost.forward(...)                        -> Flops(vision, llm)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.recipe import Train


@dataclass(frozen=True)
class Flops:
    vision: float
    """Tower and merger."""
    llm: float
    """Language model and head."""

    @property
    def total(self) -> float:
        return self.vision + self.llm

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.vision + other.vision, self.llm + other.llm)


@dataclass(frozen=True)
class Shape:
    """What of a model its work depends on; a family reads it off the config (Family.shape). Weights are those of matrix
    products; widths of attention are heads x head size."""

    text_weights: int
    """Of the language model's layers, without embedding and head."""
    text_layers: int
    text_width: int
    hidden_size: int
    vocab_size: int
    patch_weights: int
    """Of patch embedding and tower that each patch passes."""
    merger_weights: float
    """Of the merger, per patch."""
    vision_width: int
    full_layers: int
    """Of the tower: attention over a whole image or frame (a tile, where a picture is cut into tiles)."""
    picture_weights: int = 0
    """Of a merger with queries of its own, which each picture passes whatever its number of patches."""
    windowed_layers: int = 0
    window: int = 1
    """Side of a window in patches."""

    @staticmethod
    def decoder_weights(text: Mapping[str, Any]) -> int:
        """Products of a decoder with grouped queries and a gated MLP (Qwen2, Qwen3, Llama, Mistral)."""
        c, heads = text["hidden_size"], text["num_attention_heads"]
        size = text.get("head_dim") or c // heads
        kv = text.get("num_key_value_heads") or heads
        return text["num_hidden_layers"] * (
            2 * c * heads * size + 2 * c * kv * size + 3 * c * text["intermediate_size"]
        )


@dataclass(frozen=True)
class Cost:
    """The shape of one model and what of it is trained."""

    shape: Shape
    train: Train

    def _text_attention(self, table: Iterable[Sequence[int]]) -> float:
        """Causal: a segment of n tokens after s seen ones has n (n + 1) / 2 + n s pairs; two products a pair."""
        rows = [tuple(map(int, row)) for row in table]
        seen: list[int] = []
        pairs = 0.0
        for _, length, _, parent in rows:
            seen.append(seen[parent] + rows[parent][1] if parent >= 0 else 0)
            pairs += length * (length + 1) / 2 + length * seen[-1]
        return 4.0 * self.shape.text_width * pairs * self.shape.text_layers

    def _vision_attention(self, grids: Iterable[Sequence[int]]) -> float:
        shape = self.shape
        whole = windowed = 0.0
        for t, h, w in grids:
            whole += t * (h * w) ** 2
            windowed += t * _square_sum(h, shape.window) * _square_sum(w, shape.window)
        return 4.0 * shape.vision_width * (shape.full_layers * whole + shape.windowed_layers * windowed)

    def _merged(self, grids: Sequence[Sequence[int]]) -> float:
        """Products with the merger's weights."""
        num_patches = sum(t * h * w for t, h, w in grids)
        return 2.0 * (num_patches * self.shape.merger_weights + len(grids) * self.shape.picture_weights)

    def _language(self, num_tokens: int, num_targets: int) -> float:
        """Products with the language model's weights, the head on target rows only."""
        return 2.0 * (
            num_tokens * self.shape.text_weights + num_targets * self.shape.hidden_size * self.shape.vocab_size
        )

    # ------------------------------------------------------------ packs

    def pack(self, segments: Iterable[Sequence[int]], grids: Iterable[Sequence[int]], num_targets: int) -> Flops:
        """Forward and backward of one pack; padding (sample below 0) is no work that counts.

        Backward costs one forward for input gradients, where something at or before the part is trained, and one for
        weight gradients, where the part itself is; attention has no weights and costs two.
        """
        rows = list(segments)
        grids = [tuple(map(int, grid[:3])) for grid in grids]
        kept = [row for row in rows if int(row[2]) >= 0]
        num_tokens = sum(int(row[1]) for row in kept)
        num_patches = sum(t * h * w for t, h, w in grids)
        vision, merger, llm = self.train.vision, self.train.merger, self.train.llm
        before_llm = vision or merger or llm  # the embedding is the first thing that the language model trains
        tower = 2.0 * num_patches * self.shape.patch_weights * (1 + 2 * vision) + self._vision_attention(grids) * (
            1 + 2 * vision
        )
        merged = self._merged(grids) * (1 + (vision or merger) + merger)
        language = self._language(num_tokens, num_targets) * (1 + before_llm + llm)
        language += self._text_attention(_only(rows)) * (1 + 2 * before_llm)
        return Flops(tower + merged, language)

    def forward(self, segments: Iterable[Sequence[int]], grids: Iterable[Sequence[int]], num_targets: int) -> Flops:
        grids = [tuple(map(int, grid[:3])) for grid in grids]
        rows = list(segments)
        num_tokens = sum(int(row[1]) for row in rows if int(row[2]) >= 0)
        num_patches = sum(t * h * w for t, h, w in grids)
        return Flops(
            2.0 * num_patches * self.shape.patch_weights + self._merged(grids) + self._vision_attention(grids),
            self._language(num_tokens, num_targets) + self._text_attention(_only(rows)),
        )


def _only(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Real segments; padding comes last, so that indices of parents stay right."""
    return [row for row in rows if int(row[2]) >= 0]


def _square_sum(length: int, side: int) -> float:
    """Sum of squares of the pieces that windows of `side` cut `length` into."""
    return (length // side) * side**2 + (length % side) ** 2


PEAKS = (("B200", 2250e12), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12), ("A10G", 70e12))
"""Dense bf16 operations a second, from the vendor's data sheets, by part of the device's name."""


def peak_flops_per_s(device_name: str) -> float | None:
    """What utilisation is a share of; None for a device that is not in the table."""
    return next((peak for part, peak in PEAKS if part in device_name), None)

"""Floating-point operations of a pack: what utilisation (MFU) is measured against. Without torch.

Counted: matrix products of forward and backward, attention per sample and not per pack (up to 44 % too many at 32k
otherwise), the vision tower with its windows. Left out: weight gradients of frozen parts, input gradients where nothing
before them is trained, recomputation, norms, embeddings look-up. A multiply-add is 2 operations.

    cost = Cost.of(config, train)
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
class Cost:
    """Shapes of one model (Qwen2.5-VL's layout) and what of it is trained."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    train: Train

    @classmethod
    def of(cls, config: Mapping[str, Any], train: Train) -> Cost:
        """From config.json, nested or flat as the released ones are."""
        text = config.get("text_config")
        return cls(text if isinstance(text, Mapping) else config, config["vision_config"], train)

    # ------------------------------------------------------------ per unit, forward

    @property
    def per_token(self) -> float:
        """Products with the language model's weights, without the head."""
        c, layers = self.text["hidden_size"], self.text["num_hidden_layers"]
        heads = self.text["num_attention_heads"]
        share = (self.text.get("num_key_value_heads") or heads) / heads
        return layers * 2.0 * (2 * c * c + 2 * c * c * share + 3 * c * self.text["intermediate_size"])

    @property
    def per_target(self) -> float:
        return 2.0 * self.text["hidden_size"] * self.text["vocab_size"]

    @property
    def per_patch(self) -> float:
        """Patch embedding and the tower's blocks, without attention's two products."""
        c, v = self.vision["hidden_size"], self.vision
        pixels = v.get("in_channels", 3) * v.get("temporal_patch_size", 2) * v.get("patch_size", 14) ** 2
        return 2.0 * c * pixels + v["depth"] * 2.0 * (4 * c * c + 3 * c * v["intermediate_size"])

    @property
    def merger_per_patch(self) -> float:
        wide = self.vision["hidden_size"] * self._merge**2
        return 2.0 * (wide * wide + wide * self.vision["out_hidden_size"]) / self._merge**2

    @property
    def _merge(self) -> int:
        return self.vision.get("spatial_merge_size", 2)

    def _text_attention(self, table: Iterable[Sequence[int]]) -> float:
        """Causal: a segment of n tokens after s seen ones has n (n + 1) / 2 + n s pairs; two products a pair."""
        rows = [tuple(map(int, row)) for row in table]
        seen: list[int] = []
        pairs = 0.0
        for _, length, _, parent in rows:
            seen.append(seen[parent] + rows[parent][1] if parent >= 0 else 0)
            pairs += length * (length + 1) / 2 + length * seen[-1]
        return 4.0 * self.text["hidden_size"] * pairs * self.text["num_hidden_layers"]

    def _vision_attention(self, grids: Iterable[Sequence[int]]) -> float:
        depth, full = self.vision["depth"], len(self.vision.get("fullatt_block_indexes", range(self.vision["depth"])))
        side = self.vision.get("window_size", 112) // self.vision.get("patch_size", 14)
        whole = windowed = 0.0
        for t, h, w in grids:
            whole += t * (h * w) ** 2
            windowed += t * _square_sum(h, side) * _square_sum(w, side)
        return 4.0 * self.vision["hidden_size"] * (full * whole + (depth - full) * windowed)

    # ------------------------------------------------------------ packs

    def pack(self, segments: Iterable[Sequence[int]], grids: Iterable[Sequence[int]], num_targets: int) -> Flops:
        """Forward and backward of one pack; padding (sample below 0) is no work that counts.

        Backward costs one forward for input gradients, where something at or before the part is trained, and one for
        weight gradients, where the part itself is; attention has no weights and costs two.
        """
        rows = list(segments)
        grids = [tuple(map(int, grid)) for grid in grids]
        kept = [row for row in rows if int(row[2]) >= 0]
        num_tokens = sum(int(row[1]) for row in kept)
        num_patches = sum(t * h * w for t, h, w in grids)
        vision, merger, llm = self.train.vision, self.train.merger, self.train.llm
        before_llm = vision or merger or llm  # the embedding is the first thing that the language model trains
        tower = num_patches * self.per_patch * (1 + 2 * vision) + self._vision_attention(grids) * (1 + 2 * vision)
        merged = num_patches * self.merger_per_patch * (1 + (vision or merger) + merger)
        language = (num_tokens * self.per_token + num_targets * self.per_target) * (1 + before_llm + llm)
        language += self._text_attention(_only(rows)) * (1 + 2 * before_llm)
        return Flops(tower + merged, language)

    def forward(self, segments: Iterable[Sequence[int]], grids: Iterable[Sequence[int]], num_targets: int) -> Flops:
        grids = [tuple(map(int, grid)) for grid in grids]
        rows = list(segments)
        num_tokens = sum(int(row[1]) for row in rows if int(row[2]) >= 0)
        num_patches = sum(t * h * w for t, h, w in grids)
        return Flops(
            num_patches * (self.per_patch + self.merger_per_patch) + self._vision_attention(grids),
            num_tokens * self.per_token + num_targets * self.per_target + self._text_attention(_only(rows)),
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

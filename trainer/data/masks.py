"""Masks as COCO's uncompressed run lengths: column-major, the first run counts zeros. The form that a Sample keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def run_lengths(mask: np.ndarray) -> tuple[int, ...]:
    """bool[H, W] -> counts."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return tuple([0, *counts] if flat.size and flat[0] else counts)


def from_run_lengths(counts: Sequence[int], width: int, height: int) -> np.ndarray:
    """counts -> bool[height, width].

    Raises:
        ValueError: counts that are negative, or do not add up to width x height.
    """
    check_run_lengths(counts, width, height)
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, np.asarray(counts, np.int64))
    return flat.reshape(width, height).T


def check_run_lengths(counts: Sequence[int], width: int, height: int) -> None:
    """Before anything of their size is made; summed by Python, where counts of anyone cannot overflow.

    Raises:
        ValueError: counts that are negative, or do not add up to width x height.
    """
    if min(counts, default=0) < 0 or (total := sum(map(int, counts))) != width * height:
        got = f"{min(counts)} in one" if min(counts, default=0) < 0 else f"{total} of them"
        raise ValueError(f"run lengths of {width}x{height} pixels, got {got}")

"""How full the planner's packs are and how long it takes, on a mixture with the lengths of a vision-language corpus."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from trainer.data.packing import lower_bound, pack_windows

MIXTURE = (
    # share of the samples, median tokens, sigma of the log-normal, share of the tokens that is visual
    (0.50, 350, 0.5, 0.80),  # captions
    (0.20, 700, 0.9, 0.00),  # text
    (0.15, 900, 0.6, 0.60),  # instructions
    (0.10, 1800, 0.7, 0.75),  # pages, interleaved
    (0.05, 5000, 0.6, 0.95),  # videos
)
"""Ours: the spread of lengths that makes packing hard, not one corpus' statistics."""
PATCHES_PER_VISUAL_TOKEN = 4
LENGTHS = (8192, 32768)
WINDOW = 2000


def figures(quick: bool) -> dict[str, float]:
    samples = 20_000 if quick else 200_000
    found: dict[str, float] = {"samples": samples}
    for length in LENGTHS:
        tokens, patches = _mixture(samples, length)
        bound = lower_bound(tokens, length)
        for name, window in (("", samples), (f"_windows_of_{WINDOW}", WINDOW)):
            began = time.perf_counter()
            bins = _bins(tokens, patches, length, window)
            took = time.perf_counter() - began
            found |= {
                f"fill_{length}{name}": int(tokens.sum()) / (bins * length),
                f"bins_over_bound_{length}{name}": bins / bound,
                f"s_per_million_{length}{name}": took * 1e6 / samples,
            }
    return found


def _mixture(samples: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and patches a sample, int64[N] each, in seeded order; what is longer than a pack is cut to it."""
    random = np.random.default_rng(1234)
    kinds = random.choice(len(MIXTURE), samples, p=[share for share, *_ in MIXTURE])
    _, median, sigma, visual = np.array(MIXTURE)[kinds].T
    tokens = np.clip(random.lognormal(np.log(median), sigma), 16, length).astype(np.int64)
    return tokens, (tokens * visual).astype(np.int64) * PATCHES_PER_VISUAL_TOKEN


def _bins(tokens: np.ndarray, patches: np.ndarray, length: int, window: int) -> int:
    def windows() -> Iterator[np.ndarray]:
        for start in range(0, len(tokens), window):
            yield np.arange(start, min(start + window, len(tokens)))

    budget = PATCHES_PER_VISUAL_TOKEN * length
    return sum(map(len, pack_windows(windows(), tokens, patches, length=length, patch_budget=budget)))

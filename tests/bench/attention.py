"""Causal attention of a pack, forward and backward: a call a segment (trainer/step/attention.py) against one call with
a dense mask. Heads as in Qwen2.5-VL-3B."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer.step.attention import segment_attention, segments_of

SHARES = (0.30, 0.22, 0.16, 0.12, 0.09, 0.07, 0.04)
"""Of the pack, a sample each."""
HEADS, KEY_VALUE_HEADS, WIDTH = 16, 2, 128


def figures(quick: bool) -> dict[str, float]:
    length, rounds = (1024, 1) if quick else (8192, 3)
    table = _table(length)
    segments = segments_of(table)
    owner = torch.from_numpy(np.repeat(np.arange(len(table)), table[:, 1]))
    mask = (owner[:, None] == owner[None, :]).tril()
    generator = torch.Generator().manual_seed(1234)
    inputs = [
        torch.randn(1, heads, length, WIDTH, generator=generator, requires_grad=True)
        for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    ]
    module = nn.Module()

    def by_segment() -> Tensor:
        return segment_attention(module, *inputs, None, segments=segments)[0]

    def dense() -> Tensor:
        return scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    segments_s, ours = _timed(by_segment, inputs, rounds)
    dense_s, theirs = _timed(dense, inputs, rounds)
    return {
        "tokens": length,
        "samples": len(table),
        "threads": torch.get_num_threads(),
        "segments_s": segments_s,
        "dense_s": dense_s,
        "dense_over_segments": dense_s / segments_s,
        "largest_difference": max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)),
    }


def _table(length: int) -> np.ndarray:
    """int32[S, 4]: start, length, sample, parent."""
    stops = np.round(np.cumsum(SHARES) * length).astype(np.int32)
    starts = np.concatenate([[0], stops[:-1]])
    number = np.arange(len(SHARES))
    return np.stack([starts, stops - starts, number, np.full(len(SHARES), -1)], axis=1).astype(np.int32)


def _timed(attend: Callable[[], Tensor], inputs: list[Tensor], rounds: int) -> tuple[float, list[Tensor]]:
    """The fastest of `rounds` after one to warm up, and what it gave: output and gradients."""
    times, given = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        out = attend()
        gradients = torch.autograd.grad(out.square().mean() * out.shape[1], inputs)
        times.append(time.perf_counter() - began)
        given = [out.detach(), *gradients]
    return min(times[1:]), given

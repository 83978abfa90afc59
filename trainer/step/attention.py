"""Attention over a pack: every segment sees itself and its ancestors, never its neighbours.

`segments` is registered with transformers' attention and mask interfaces. It gets the segment table as a keyword
argument of the model's forward and runs one causal call of scaled_dot_product_attention a segment: PyTorch picks its
fused kernel (flash on CUDA) and no mask of L x L is ever made: a dense mask costs 7.7 times as much at 8k tokens.
Vision layers use the same idea without causality: segments of equal length (the windows) share one batched call.

Shapes: L tokens of a pack, P patches, H heads, K key-value heads, D head width, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

NAME = "segments"


@dataclass(frozen=True)
class Segment:
    start: int
    length: int
    seen: tuple[tuple[int, int], ...] = ()
    """(start, stop) of the ancestors' tokens, oldest first: what this segment sees besides itself."""


def segments_of(table: np.ndarray) -> tuple[Segment, ...]:
    """From int32[S, 4] (start, length, sample, parent) to what attention needs.

    Raises:
        ValueError: the segments are not consecutive from 0, or a parent does not come before its child.
    """
    rows = [[int(value) for value in row] for row in table]
    found: list[Segment] = []
    at = 0
    for index, (start, length, _, parent) in enumerate(rows):
        if start != at or length < 1:
            raise ValueError(f"segment {index} starts at {start} with {length} tokens, expected a start of {at}")
        if parent >= index:
            raise ValueError(f"segment {index} has parent {parent}, which does not come before it")
        at += length
        above = found[parent] if parent >= 0 else None
        seen = (*above.seen, (above.start, above.start + above.length)) if above else ()
        found.append(Segment(start, length, seen))
    return tuple(found)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, L, D], key and value [1, K, L, D] -> [1, L, H, D]."""
    if segments is None:
        raise ValueError("attention over a pack needs the segment table: call the model with segments=...")
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"a pack is one row without a mask, got batch {query.shape[0]}, mask {attention_mask is not None}"
        )
    if segments[-1].start + segments[-1].length != query.shape[2]:
        raise ValueError(f"the segments cover {segments[-1].start + segments[-1].length} of {query.shape[2]} tokens")
    grouped = query.shape[1] != key.shape[1]
    outs = []
    for segment in segments:
        own = slice(segment.start, segment.start + segment.length)
        keys, values, mask = key[:, :, own], value[:, :, own], None
        if segment.seen:
            keys = torch.cat([*(key[:, :, start:stop] for start, stop in segment.seen), keys], dim=2)
            values = torch.cat([*(value[:, :, start:stop] for start, stop in segment.seen), values], dim=2)
            mask = causal_lower_right(segment.length, keys.shape[2])
        outs.append(
            scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="segments"` known to transformers; no mask is built for it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, segment_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)


# ---------------------------------------------------------------- vision


@dataclass(frozen=True)
class Windows:
    """Equal-length blocks of a token sequence, sorted by length.

    `order` puts the tokens of blocks of one length next to each other, `back` undoes it (None: already so);
    `shapes` are (blocks, length) in that order.
    """

    shapes: tuple[tuple[int, int], ...]
    order: Tensor | None
    back: Tensor | None


def windows_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Windows:
    """Group consecutive blocks of these lengths by length."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    by_length = np.argsort(sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    shapes = tuple((int(count), int(size)) for size, count in zip(distinct, counts, strict=True))
    if all(a <= b for a, b in pairwise(by_length)):
        return Windows(shapes, None, None)
    order = np.concatenate([np.arange(int(starts[i]), int(starts[i] + sizes[i])) for i in by_length])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Windows(shapes, torch.from_numpy(order).to(device), torch.from_numpy(back).to(device))


class _Reorder(torch.autograd.Function):
    """x[order]; the gradient is g[back] instead of a scatter-add, which is slower and not deterministic on CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back], None, None


def window_attention(qkv: Tensor, windows: Windows, scale: float) -> Tensor:
    """Full attention inside each block: qkv [P, 3, H, D] -> [P, H, D]; one call per distinct length."""
    if windows.order is not None and windows.back is not None:
        qkv = _Reorder.apply(qkv, windows.order, windows.back)  # type: ignore[assignment]
    outs = []
    at = 0
    for blocks, length in windows.shapes:
        query, key, value = (
            qkv[at : at + blocks * length].view(blocks, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
        )  # [blocks, H, length, D]
        out = scaled_dot_product_attention(query, key, value, scale=scale)
        outs.append(out.transpose(1, 2).reshape(blocks * length, *qkv.shape[2:]))
        at += blocks * length
    joined = torch.cat(outs) if len(outs) > 1 else outs[0]
    if windows.order is not None and windows.back is not None:
        joined = _Reorder.apply(joined, windows.back, windows.order)  # type: ignore[assignment]
    return joined

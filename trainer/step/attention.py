"""Attention over a pack: every segment sees itself and its ancestors, never its neighbours.

`segments` is registered with transformers' attention and mask interfaces. It gets the segment table as a keyword
argument of the model's forward and runs one causal call of scaled_dot_product_attention a segment: PyTorch picks its
fused kernel (flash on CUDA) and no mask of L x L is ever made: a dense mask costs 7.7 times as much at 8k tokens.
Vision layers use the same idea without causality: segments of equal length (the windows) share one batched call.

Where the package flash-attn is installed, half precision on CUDA takes its kernel for sequences of unequal length
instead: one call for all segments. `chosen` says which it is and why; the trainer prints it at start.

What would make packed samples see each other without a word is an error here: no segment table, a mask, a cache that
holds other tokens; packed.py's place() refuses positions that do not restart.

Shapes: L tokens of a pack, P patches, H heads, K key-value heads, D head width, S segments, N keys of all segments.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{key.shape[2]} keys for {query.shape[2]} tokens: a key-value cache has no place in a pack, pass "
            "use_cache=False"
        )
    if (kernel := varlen_kernel(query.device.type, query.dtype)) is not None:
        return _varlen_segments(kernel, query, key, value, tuple(segments), scaling, dropout)[None], None
    grouped = query.shape[1] != key.shape[1]
    outs = []
    for segment in segments:
        own = slice(segment.start, segment.start + segment.length)
        keys, values, mask = key[:, :, own], value[:, :, own], None
        if segment.seen:
            keys, values = (torch.cat(_pieces(tensor, segment), dim=2) for tensor in (key, value))
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


def _pieces(tensor: Tensor, segment: Segment) -> list[Tensor]:
    """What a segment sees of [1, K, L, D]: its ancestors' tokens, then its own."""
    own = (segment.start, segment.start + segment.length)
    return [tensor[:, :, start:stop] for start, stop in (*segment.seen, own)]


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """transformers' mask interface. A mask of ones makes its own attention forget where samples end."""
    if attention_mask is not None:
        raise ValueError("a pack has no attention mask: what a token sees is said by the segment table")


def register() -> None:
    """Make `attn_implementation="segments"` known to transformers; no mask is built for it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, segment_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


# ---------------------------------------------------------------- flash-attention

Kernel = Callable[..., Tensor]
"""flash_attn_varlen_func(q [N, H, D], k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, ...). A causal
call aligns the last query with the last key from flash-attn 2.1 on, which is what an answer after its prompt needs."""
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str


def chosen(device: torch.device | str, dtype: torch.dtype) -> Choice:
    """What a model on this device and of this dtype attends with."""
    kind = torch.device(device).type
    if kind != "cuda":
        return Choice("sdpa", f"one call a segment: the device is {kind}, flash-attn needs CUDA")
    if dtype not in HALF:
        return Choice("sdpa", f"one call a segment: {str(dtype).removeprefix('torch.')} weights, flash-attn needs half")
    _, found = _flash_attn()
    if varlen_kernel(kind, dtype) is None:
        return Choice("sdpa", f"one call a segment, PyTorch's own fused kernel: flash-attn is {found}")
    return Choice("flash-attn", f"one call for all segments: flash-attn {found}, {dtype} on CUDA")


def varlen_kernel(kind: str, dtype: torch.dtype) -> Kernel | None:
    return _flash_attn()[0] if kind == "cuda" and dtype in HALF else None


@functools.cache
def _flash_attn() -> tuple[Kernel | None, str]:
    """(kernel, version or why there is none)."""
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        return None, "not installed" if isinstance(error, ModuleNotFoundError) else f"not usable ({error})"
    version = str(package.__version__)
    if tuple(map(int, version.split(".")[:2])) < (2, 1):
        return None, f"{version}, before 2.1"
    return package.flash_attn_varlen_func, version


def _lengths(segments: Sequence[Segment]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each segment: its own tokens, and all that it sees."""
    return tuple(s.length for s in segments), tuple(
        s.length + sum(stop - start for start, stop in s.seen) for s in segments
    )


@functools.lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32[S + 1]: where each sequence starts, and the end. Kept: every layer of a pack asks for the same; the first
    one's copy makes the host wait for nothing."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _varlen_segments(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """query [1, H, L, D], key and value [1, K, L, D] -> [L, H, D]: one call for all segments."""
    if any(segment.seen for segment in segments):
        key, value = (torch.cat([p for s in segments for p in _pieces(tensor, s)], dim=2) for tensor in (key, value))
    lengths, widths = _lengths(segments)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    starts = (_bounds(lengths, query.device), _bounds(widths, query.device))
    return kernel(
        query, key, value, *starts, max(lengths), max(widths), dropout_p=dropout, softmax_scale=scaling, causal=True
    )


# ---------------------------------------------------------------- vision


@dataclass(frozen=True)
class Windows:
    """Equal-length blocks of a token sequence, sorted by length.

    `order` puts the tokens of blocks of one length next to each other, `back` undoes it (None: already so);
    `shapes` are (blocks, length) in that order, `bounds` int32[blocks + 1] where each begins, and the end.
    """

    shapes: tuple[tuple[int, int], ...]
    order: Tensor | None
    back: Tensor | None
    bounds: Tensor


def windows_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Windows:
    """Group consecutive blocks of these lengths by length; the host does not wait for the copies to the device."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    by_length = np.argsort(sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    shapes = tuple((int(count), int(size)) for size, count in zip(distinct, counts, strict=True))
    bounds = torch.tensor([0, *accumulate(np.sort(sizes).tolist())], dtype=torch.int32).to(device, non_blocking=True)
    if all(a <= b for a, b in pairwise(by_length)):
        return Windows(shapes, None, None, bounds)
    order = np.concatenate([np.arange(int(starts[i]), int(starts[i] + sizes[i])) for i in by_length])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    on = {"device": device, "non_blocking": True}
    return Windows(shapes, torch.from_numpy(order).to(**on), torch.from_numpy(back).to(**on), bounds)


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
    if (kernel := varlen_kernel(qkv.device.type, qkv.dtype)) is not None:
        bounds, longest = windows.bounds, windows.shapes[-1][1]
        out = kernel(*qkv.unbind(1), bounds, bounds, longest, longest, softmax_scale=scale)
        return _put_back(out, windows)
    outs = []
    at = 0
    for blocks, length in windows.shapes:
        query, key, value = (
            qkv[at : at + blocks * length].view(blocks, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
        )  # [blocks, H, length, D]
        out = scaled_dot_product_attention(query, key, value, scale=scale)
        outs.append(out.transpose(1, 2).reshape(blocks * length, *qkv.shape[2:]))
        at += blocks * length
    return _put_back(torch.cat(outs) if len(outs) > 1 else outs[0], windows)


def _put_back(out: Tensor, windows: Windows) -> Tensor:
    if windows.order is None or windows.back is None:
        return out
    return _Reorder.apply(out, windows.back, windows.order)  # type: ignore[return-value]

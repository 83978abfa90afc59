"""Qwen-VL's vision tower and adapter: our port of what visual.py publishes, for many pictures in one call.

The tower is OpenCLIP's ViT without class token. It differs in its fused projection, whose rows lie head by head (query,
key, value of head 0, then of head 1, ...; OpenCLIP: all queries, all keys, all values), and in absolute positions that
are resized bicubically to the picture's grid. The adapter is one cross-attention from learned queries to the patches;
both carry 2-D sin-cos positions. Pictures of one size share one attention call; each module runs exactly once whatever
the sizes, so that ZeRO-3 gathers the same on every rank.

Shapes: P patches of all pictures, M pictures, D tower width, C adapter width, Q queries, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.models.qwen_vl import POOL_HEAD, QUERIES

POSITIONS = 256
"""Rows of the tower's position table: a constant of the published class, 16 x 16, which is 224 px at patch 14."""
EPS = 1e-6


@dataclass(frozen=True)
class VisionPlan:
    """What follows from the grids, computed on the host. Patches are put in order of their picture's size."""

    shapes: tuple[tuple[int, int], ...]
    """(pictures, patches along a side), from the smallest."""
    order: Tensor | None
    """int64[P]: patches by size; None: they are."""
    back: tuple[int, ...]
    """Place of each picture among those by size."""
    tower: tuple[Tensor | None, ...]
    """float32[side^2, POSITIONS] of each size: resizes the tower's positions; None: nothing to resize."""
    pool: tuple[Tensor | None, ...]
    """float32[side^2, Q]: the same for the adapter's."""

    def sizes(self) -> list[int]:
        """Patches of each picture, by size."""
        return [side * side for pictures, side in self.shapes for _ in range(pictures)]


def plan_of(grids: Tensor, num_queries: int, device: torch.device | str) -> VisionPlan:
    """From int64[M, 3] on the host: rows (1, side, side).

    Raises:
        ValueError: a picture that is not square, or a video.
    """
    rows = grids.tolist()
    if bad := [row for row in rows if row[0] != 1 or row[1] != row[2]]:
        raise ValueError(f"Qwen-VL takes square pictures, got patches {bad[0]}")
    sides = [row[1] for row in rows]
    by_size = sorted(range(len(sides)), key=lambda index: sides[index])
    back = [0] * len(sides)
    for place, index in enumerate(by_size):
        back[index] = place
    order = None
    if any(a > b for a, b in pairwise(by_size)):
        starts = [0]
        for side in sides:
            starts.append(starts[-1] + side * side)
        order = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in by_size]).to(device, non_blocking=True)
    distinct = sorted(set(sides))
    return VisionPlan(
        shapes=tuple((sides.count(side), side) for side in distinct),
        order=order,
        back=tuple(back),
        tower=tuple(_resizing(POSITIONS, side, str(device)) for side in distinct),
        pool=tuple(_resizing(num_queries, side, str(device)) for side in distinct),
    )


@lru_cache(maxsize=64)
def _resizing(rows: int, side: int, device: str) -> Tensor | None:
    """float32[side^2, rows]: bicubic interpolation of a square table as a matrix. It is linear in the table, and as a
    product its backward is deterministic on CUDA, which interpolate's is not."""
    source = math.isqrt(rows)
    if source == side:
        return None
    table = torch.eye(rows).view(1, rows, source, source)
    found = interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
    return found.view(rows, side * side).t().contiguous().to(device)


def _positions(table: Tensor, matrices: tuple[Tensor | None, ...], plan: VisionPlan) -> Tensor:
    """[rows, W] -> [P, W], in fp32 between, as published."""
    parts = []
    for (pictures, _), matrix in zip(plan.shapes, matrices, strict=True):
        one = table if matrix is None else (matrix @ table.float()).to(table.dtype)
        parts.append(one.expand(pictures, *one.shape).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class VisualAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """[P, D] -> [P, D]."""
        num_patches, width = x.shape
        qkv = self.in_proj(x).view(num_patches, self.heads, 3, width // self.heads)
        outs, at = [], 0
        for pictures, side in shapes:
            end = at + pictures * side * side
            part = qkv[at:end].view(pictures, side * side, *qkv.shape[1:])
            query, key, value = part.permute(3, 0, 2, 1, 4).unbind(0)
            out = scaled_dot_product_attention(query, key, value)
            outs.append(out.transpose(1, 2).reshape(end - at, width))
            at = end
        return self.out_proj(torch.cat(outs) if len(outs) > 1 else outs[0])


class VisualMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class VisualAttentionBlock(GradientCheckpointingLayer):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=EPS)
        self.ln_2 = nn.LayerNorm(width, eps=EPS)
        self.attn = VisualAttention(width, heads)
        self.mlp = VisualMLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        x = x + self.attn(self.ln_1(x), shapes)
        return x + self.mlp(self.ln_2(x))


class VisualTransformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.resblocks = nn.ModuleList(VisualAttentionBlock(width, heads, mlp_ratio) for _ in range(layers))

    def forward(self, x: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        for block in self.resblocks:
            x = block(x, shapes)
        return x


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with its names, for queries that every picture shares. Its own forward does not do: it
    reads out_proj's weight without calling out_proj, which ZeRO-3 would not have gathered."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """[Q, C], [P, C], [P, C] -> [M * Q, C]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            linear(x, weight, bias).unflatten(-1, (self.heads, -1))
            for x, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        query = query.transpose(0, 1)  # [H, Q, C / H]
        outs, at = [], 0
        for pictures, side in shapes:
            end = at + pictures * side * side
            key_part, value_part = (
                x[at:end].unflatten(0, (pictures, side * side)).transpose(1, 2) for x in (key, value)
            )
            out = scaled_dot_product_attention(query.expand(pictures, -1, -1, -1), key_part, value_part)
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
            at = end
        return self.out_proj(torch.cat(outs) if len(outs) > 1 else outs[0])


class Resampler(nn.Module):
    """The adapter."""

    def __init__(self, num_queries: int, width: int, tower_width: int):
        super().__init__()
        self.pos_embed = nn.Parameter(sin_cos_2d(width, math.isqrt(num_queries)), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.kv_proj = nn.Linear(tower_width, width, bias=False) if tower_width != width else nn.Identity()
        self.attn = CrossAttention(width, max(width // POOL_HEAD, 1))
        self.ln_q = nn.LayerNorm(width, eps=EPS)
        self.ln_kv = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor, plan: VisionPlan) -> Tensor:
        """[P, D] -> [M * Q, C], pictures by size."""
        x = self.ln_kv(self.kv_proj(x))
        keys = x + _positions(self.pos_embed, plan.pool, plan)
        return self.attn(self.ln_q(self.query) + self.pos_embed, keys, x, plan.shapes)


class VisionTransformer(nn.Module):
    """`transformer.visual` of the published weights; the arguments are config.json's section `visual`."""

    def __init__(self, visual: Mapping[str, Any]):
        super().__init__()
        width, out = visual["width"], visual["output_dim"]
        self.patch_size = visual["patch_size"]
        self.num_queries = visual.get("n_queries", QUERIES)
        self.conv1 = nn.Conv2d(3, width, kernel_size=self.patch_size, stride=self.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(POSITIONS, width))
        self.ln_pre = nn.LayerNorm(width, eps=EPS)
        self.transformer = VisualTransformer(width, visual["layers"], visual["heads"], visual["mlp_ratio"])
        self.attn_pool = Resampler(self.num_queries, out, width)
        self.ln_post = nn.LayerNorm(out, eps=EPS)
        self.proj = nn.Parameter(torch.zeros(out, out))

    def forward(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """[P, 3 * patch * patch] -> [M * Q, C]."""
        x = self.ln_post(self.attn_pool(self.encode(pixels, plan), plan)) @ self.proj
        return _in_order(x, [self.num_queries] * len(plan.back), plan.back)

    def encode(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """The tower: [P, 3 * patch * patch] -> [P, D], pictures by size."""
        if plan.order is not None:
            pixels = pixels[plan.order]
        x = self.conv1(pixels.view(-1, 3, self.patch_size, self.patch_size)).flatten(1)
        x = self.ln_pre(x + _positions(self.positional_embedding, plan.tower, plan))
        return self.transformer(x, plan.shapes)

    def patch_features(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """The tower's features with pictures in their own order."""
        return _in_order(self.encode(pixels, plan), plan.sizes(), plan.back)

    def pictures(self, pixel_values: Tensor) -> Tensor:
        """float[M, 3, side, side], as an image processor makes them -> [M * Q, C]."""
        p = self.patch_size
        num, _, height, width = pixel_values.shape
        patches = pixel_values.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * p * p)
        grids = torch.tensor([[1, height // p, width // p]]).expand(num, 3)
        return self(patches, plan_of(grids, self.num_queries, pixel_values.device))


def _in_order(x: Tensor, sizes: list[int], back: tuple[int, ...]) -> Tensor:
    """Rows of pictures by size -> in their own order; slices, since an index's backward adds up atomically on CUDA."""
    if back == tuple(range(len(back))):
        return x
    parts = x.split(sizes)
    return torch.cat([parts[place] for place in back])


def sin_cos_2d(width: int, side: int) -> Tensor:
    """float32[side^2, width]: the first half of a row encodes the column, the second the row, each as sines, then
    cosines, of frequencies 10000^(-i / (width / 4))."""
    if width % 4:
        raise ValueError(f"2-D sines and cosines need a width in multiples of 4, got {width}")
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()

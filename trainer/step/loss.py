"""Token log-probabilities from hidden states, in chunks of rows, inside the module that owns the head weight.

The logits of 32k tokens at a vocabulary of 152k take 10 GB in bf16: they are made a chunk at a time, only for rows that
have a target, and made again in backward. Doing it in the head's own forward lets ZeRO-3 gather the weight once.

Shapes: T target rows, C hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 26
"""Logits of one chunk, at most: 256 MiB in fp32."""


class _TokenLogp(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[ids], fp32[T]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, chunk: int) -> Tensor:
        logp = torch.empty(len(ids), dtype=torch.float32, device=hidden.device)
        for rows in range(0, len(ids), chunk):
            logits = (hidden[rows : rows + chunk] @ weight.t()).float()
            picked = logits.gather(1, ids[rows : rows + chunk, None])[:, 0]
            logp[rows : rows + chunk] = picked - torch.logsumexp(logits, dim=1)
        ctx.save_for_backward(hidden, weight, ids)
        ctx.chunk = chunk
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        hidden, weight, ids = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # Summed over chunks in fp32: in bf16 the sum over many chunks loses small contributions.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for rows in range(0, len(ids), ctx.chunk):
            part = hidden[rows : rows + ctx.chunk]
            grad_logits = torch.softmax((part @ weight.t()).float(), dim=1).neg_()
            grad_logits.scatter_add_(
                1, ids[rows : rows + ctx.chunk, None], torch.ones_like(part[:, :1], dtype=torch.float32)
            )
            grad_logits.mul_(grad[rows : rows + ctx.chunk, None])
            grad_logits = grad_logits.to(part.dtype)
            if grad_hidden is not None:
                grad_hidden[rows : rows + ctx.chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ part
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None


class Head(nn.Linear):
    """The language model's head: with ids, token log-probabilities; without, logits."""

    chunk_elements = CHUNK_ELEMENTS

    def forward(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """hidden [T, C], ids int64[T] -> fp32[T]; without ids [..., C] -> [..., V]."""
        if ids is None:
            return super().forward(hidden)
        chunk = max(1, self.chunk_elements // self.weight.shape[0])
        return _TokenLogp.apply(hidden, self.weight, ids, chunk)  # type: ignore[return-value]


def as_head(linear: nn.Linear) -> Head:
    """Give a bias-free head this forward; parameter and name stay."""
    if linear.bias is not None:
        raise ValueError("a head with a bias is not supported")
    linear.__class__ = Head
    return linear  # type: ignore[return-value]


def segment_sums(logp: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum token log-probabilities per segment: fp32[T], int64[T] -> fp32[S]."""
    return torch.zeros(num_segments, dtype=logp.dtype, device=logp.device).index_add(0, segment, logp)

"""Attention over packs on CUDA: flash-attention's kernel for unequal lengths and PyTorch's own are near fp32 on the CPU
and near each other, none waits for the device, none builds a square."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.cuda import GPU
from tests.models.builders import far
from tests.models.test_attention import LONG, TABLE, some_heads
from trainer.step import attention
from trainer.step.attention import Segment, segment_attention, segments_of, window_attention, windows_of

pytestmark = GPU
Kernel = Callable[[str], None]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """take("sdpa") or take("flash-attn"): what attention runs on from then on; skips where it is not installed."""
    installed, version = attention._flash_attn()

    def choose(kernel: str) -> None:
        if kernel == "flash-attn" and installed is None:
            pytest.skip(f"flash-attn is {version}")
        found = installed if kernel == "flash-attn" else None
        monkeypatch.setattr(attention, "varlen_kernel", lambda kind, dtype: found if kind == "cuda" else None)
        attention._bounds.cache_clear()

    return choose


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", ["sdpa", "flash-attn"])
def test_attention_on_cuda_never_waits_for_the_device(kernel: str, take: Kernel, no_waiting: None) -> None:
    """Forward and backward, and the copies before them, where PyTorch refuses whatever waits."""
    take(kernel)
    heads = [torch.randn(1, n, 23, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    segment_attention(torch.nn.Module(), *heads, None, segments=segments_of(TABLE))[0].sum().backward()
    qkv = torch.randn(23, 3, 4, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    window_attention(qkv, windows_of([4, 9, 4, 6], "cuda"), 0.25).sum().backward()
    with pytest.raises(RuntimeError, match="synchroniz"):  # negative control: the mode sees a copy that waits
        torch.tensor([0, 5, 14], device="cuda")


def passed(heads: list[torch.Tensor], segments: tuple[Segment, ...]) -> list[torch.Tensor]:
    """Output and gradients, fp32 on the CPU, of a loss that weighs every output."""
    leaves = [head.detach().requires_grad_() for head in heads]
    out = segment_attention(torch.nn.Module(), *leaves, None, segments=segments)[0]
    out.float().square().sum().backward()
    return [found.detach().float().cpu() for found in (out, *(leaf.grad for leaf in leaves)) if found is not None]


@pytest.mark.parametrize("kernel", ["sdpa", "flash-attn"])
def test_half_precision_on_cuda_is_near_fp32_on_cpu(kernel: str, take: Kernel) -> None:
    """Forward and gradients of a pack's segments, answers after a shared prompt among them."""
    take(kernel)
    segments = segments_of(TABLE)
    want, got = (passed(some_heads(**kind), segments) for kind in ({}, {"device": "cuda", "dtype": torch.bfloat16}))
    for mine, theirs in zip(got, want, strict=True):
        assert far(mine, theirs) < 2e-2


PACK = (4096, 1500, 900, 777, 500, 300, 119)  # 8,192 tokens in 7 samples, the last but one an answer to the one before
HEADS = (28, 4, 4)
"""Queries, keys and values of Qwen2.5-VL 7B; a head has 128, in the tower (16 heads) 80."""


def a_pack() -> tuple[Segment, ...]:
    starts = np.cumsum(PACK) - PACK
    rows = [[start, length, number, -1] for number, (start, length) in enumerate(zip(starts, PACK, strict=True))]
    rows[-2][3] = len(rows) - 3
    return segments_of(np.array(rows, np.int32))


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers in every dtype: rounded to bf16 first."""
    generator = torch.Generator("cuda").manual_seed(3)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16().to(dtype)


def test_flash_attn_over_a_pack_is_as_near_to_fp32_as_sdpa(take: Kernel) -> None:
    """Heads of the released 7B: what a pack costs in accuracy does not depend on which kernel runs."""
    take("flash-attn")
    segments, length = a_pack(), sum(PACK)
    shapes = [(1, heads, length, 128) for heads in HEADS]
    half = [drawn(*shape, dtype=torch.bfloat16) for shape in shapes]
    flash = passed(half, segments)
    take("sdpa")
    sdpa, exact = passed(half, segments), passed([drawn(*shape, dtype=torch.float32) for shape in shapes], segments)
    for name, mine, theirs, want in zip(("out", "query", "key", "value"), flash, sdpa, exact, strict=True):
        assert far(mine, want) < max(2e-3, 2 * far(theirs, want)), name
    alone = tuple(Segment(segment.start, segment.length) for segment in segments)
    assert far(passed(half, alone)[0], sdpa[0]) > 0.1, "negative control: without the prompt it is something else"


def test_flash_attn_over_windows_is_as_near_to_fp32_as_sdpa(take: Kernel) -> None:
    """Windows of 64 patches, cut ones at the edges, and a whole picture; heads of the released tower."""
    take("flash-attn")
    lengths = [64] * 20 + [32] * 4 + [16, 1024]
    windows, scale = windows_of(lengths, "cuda"), 80**-0.5
    half = drawn(sum(lengths), 3, 16, 80, dtype=torch.bfloat16)
    flash = window_attention(half, windows, scale)
    take("sdpa")
    sdpa, exact = window_attention(half, windows, scale), window_attention(half.float(), windows, scale)
    assert far(flash.float(), exact) < max(2e-3, 2 * far(sdpa.float(), exact))
    other = window_attention(half, windows_of([sum(lengths)], "cuda"), scale)
    assert far(other.float(), exact) > 0.1, "negative control: one window of all"


def grown_bytes(call: Callable[[], Any]) -> int:
    """By how much the call raises the device's allocated memory at its highest."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("kernel", ["sdpa", "flash-attn"])
def test_one_sample_of_32768_tokens_builds_no_square(kernel: str, take: Kernel) -> None:
    """With fewer keys than queries: of PyTorch's kernels not all take them, and the plain one builds the square."""
    take(kernel)
    heads = [drawn(1, count, LONG, 64, dtype=torch.bfloat16).requires_grad_() for count in (4, 2, 2)]

    def step() -> None:
        segment_attention(torch.nn.Module(), *heads, None, segments=(Segment(0, LONG),))[0].sum().backward()

    assert grown_bytes(step) < LONG * LONG * 0.5  # bytes; the square in bf16 has 2 a pair and head


def test_a_square_of_that_size_would_be_seen() -> None:
    """Negative control: one byte a pair of tokens, made and dropped."""
    assert grown_bytes(lambda: torch.ones(LONG, LONG, dtype=torch.bool, device="cuda").tril()) > LONG * LONG * 0.9

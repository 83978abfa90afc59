"""Rule 8: no L x L mask is ever built; what flash-attention's kernel is given. The kernel itself: tests/gpu."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.memory import peak_kb, resident_kb
from tests.models.builders import Built, far
from trainer.step import attention
from trainer.step.attention import Segment, chosen, segment_attention, segments_of, window_attention, windows_of
from trainer.step.packed import place

LONG = 32768
Note = Callable[..., None]


def peak_bytes(call: Callable[[], Any]) -> int:
    """By how much the call raises the process's memory at its highest (Linux: VmHWM, set back through clear_refs)."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("no /proc/self/clear_refs")

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed is given back, else it would hide what the call takes
    clear.write_text("5")
    before = resident_kb()
    call()
    return 1024 * (peak_kb() - before)


def a_long_pack(built: Built) -> Any:
    """32,768 tokens: every sample once, then text again and again, the last place padded."""
    names = list(built.encoded)
    used, more = sum(len(built.encoded[name].ids) for name in names), len(built.encoded["text"].ids)
    return built.batch([*names, *["text"] * ((LONG - used) // more)], length=LONG)


def test_32768_tokens_forward_and_backward_build_no_square(built: Built, note: Note) -> None:
    batch, model = a_long_pack(built), built.mine
    assert len(batch.ids) == LONG and len(batch.segments) > 100

    def step() -> None:
        model.zero_grad()
        model(place(batch, model, "cpu"))[0].backward()

    grown = peak_bytes(step)
    model.zero_grad(set_to_none=True)
    note(8, peak_mb_at_32768=round(grown / 1e6))
    assert grown < LONG * LONG * 0.9  # bytes of a mask of one byte


def test_one_sample_of_32768_tokens_builds_no_square() -> None:
    heads = [torch.randn(1, 1, LONG, 16, requires_grad=True) for _ in range(3)]
    segments = (Segment(0, LONG),)

    def step() -> None:
        segment_attention(torch.nn.Module(), *heads, None, segments=segments)[0].sum().backward()

    assert peak_bytes(step) < LONG * LONG * 0.1


def test_a_mask_of_that_size_would_be_seen() -> None:
    """Negative control: one byte a pair of tokens, made and dropped."""

    def dense() -> None:
        owner = torch.arange(LONG) // 4096
        mask = (owner[:, None] == owner[None, :]).tril()
        assert bool(mask[0, 0])

    assert peak_bytes(dense) > LONG * LONG * 0.9


# ---------------------------------------------------------------- the choice, and the kernel's arguments


def test_the_choice_and_its_reason() -> None:
    assert chosen("cpu", torch.bfloat16) == attention.Choice(
        "sdpa", "one call a segment: the device is cpu, flash-attn needs CUDA"
    )
    assert "fp32" in chosen("cuda", torch.float32).reason or "float32" in chosen("cuda", torch.float32).reason
    half = chosen("cuda", torch.bfloat16)
    installed = attention._flash_attn()[0] is not None
    assert half.name == ("flash-attn" if installed else "sdpa") and "flash-attn" in half.reason


def test_the_trainer_says_its_choice_at_start(built: Built, note: Note) -> None:
    choice = chosen("cpu", torch.float32)
    note(8, attention=choice.name)
    text = (Path(attention.__file__).parent / "inputs.py").read_text()
    assert "attention.chosen(device" in text


def by_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    *, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """flash_attn_varlen_func as documented: sequence by sequence, a causal mask that ends at the last key."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outs = []
    for row in range(len(cu_q) - 1):
        mine, theirs = slice(cu_q[row], cu_q[row + 1]), slice(cu_k[row], cu_k[row + 1])
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (q[mine], k[theirs], v[theirs]))
        rows, columns = query.shape[2], key.shape[2]
        assert rows <= max_q and columns <= max_k
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows) if causal else None
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True, dropout_p=dropout_p
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


TABLE = np.array([[0, 5, 0, -1], [5, 9, 1, -1], [14, 3, 1, 1], [17, 4, 1, 1], [21, 2, 2, -1]], np.int32)


def some_heads(**kind: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, heads, 23, 16, generator=generator).to(**kind).requires_grad_() for heads in (4, 2, 2)]


def test_the_kernels_arguments_mean_what_the_calls_by_segment_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers after a shared prompt among them; the kernel's documented meaning stands in for it."""
    segments, module = segments_of(TABLE), torch.nn.Module()
    want = segment_attention(module, *some_heads(), None, segments=segments)[0]
    qkv = torch.randn(23, 3, 4, 16, generator=torch.Generator().manual_seed(2))
    windows = windows_of([4, 9, 4, 6])
    want_windows = window_attention(qkv, windows, 0.25)
    monkeypatch.setattr(attention, "varlen_kernel", lambda kind, dtype: by_sequence)
    got = segment_attention(module, *some_heads(), None, segments=segments)[0]
    assert got.shape == want.shape and float((got - want).detach().abs().max()) < 1e-6
    assert float((window_attention(qkv, windows, 0.25) - want_windows).abs().max()) < 1e-6
    # negative control: without the ancestors' keys it is something else
    alone = tuple(replace(segment, seen=()) for segment in segments)
    other = segment_attention(module, *some_heads(), None, segments=alone)[0]
    assert far(other.detach(), want.detach()) > 1e-2


class Copies(TorchDispatchMode):
    """Copies from the host to another device, and whether each lets the host go on."""

    def __init__(self) -> None:
        super().__init__()
        self.free: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            self.free.append(bool((kwargs or {}).get("non_blocking")))
        return func(*args, **(kwargs or {}))


def test_what_a_pack_and_its_tower_attend_by_is_copied_without_waiting() -> None:
    """To the device `meta`, which takes the same calls as CUDA."""
    attention._bounds.cache_clear()
    with Copies() as copies:
        windows = windows_of([4, 9, 4, 6], "meta")
        attention._bounds((5, 9, 3), torch.device("meta"))
    assert copies.free == [True] * 4, "bounds, order and back of the windows; bounds of the pack"
    assert windows.bounds.shape == (5,) and windows.order is not None and windows.order.shape == (23,)
    with Copies() as copies:
        torch.arange(3).to("meta")
    assert copies.free == [False], "negative control: a copy that waits is seen"

"""Packs of every family on CUDA: isolated to the bit, near fp32 on the CPU, 32,768 tokens without a square."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.cuda import GPU
from tests.gpu.test_attention import grown_bytes
from tests.models.builders import Built
from tests.models.test_attention import LONG, a_long_pack
from trainer.data.encode import Encoded
from trainer.step.packed import PackedModel, place

pytestmark = GPU
FIRST, SECOND = "one", "two"


@pytest.fixture(autouse=True)
def _fp32_is_fp32() -> Iterator[None]:
    """Without TF32, which cuDNN takes by default for the tower's first convolution."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_cuda(built: Built, dtype: torch.dtype) -> PackedModel:
    """As a stage's start leaves it: weights rounded, rotary frequencies not."""
    model = built.a_model().to("cuda", dtype)
    model.exact_buffers()
    return model


def logits(built: Built, model: PackedModel, batch: Any, device: str = "cuda") -> torch.Tensor:
    with torch.no_grad():
        return built.parts.head_of(model.model)(model.hidden(place(batch, model, device))).float().cpu()


def another(found: Encoded) -> Encoded:
    """Of the same shape: other words, other pixels."""
    ids = (found.ids + 3) % 200
    ids[found.visual_index] = found.ids[found.visual_index]
    return replace(found, ids=ids, patches=np.ascontiguousarray(found.patches[::-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_neighbour_changes_no_bit(built: Built, dtype: torch.dtype) -> None:
    """The same kernels on the same shapes: what differs came from the neighbour."""
    model, length = on_cuda(built, dtype), len(built.encoded[SECOND].ids)
    batches = [built.batch([first, SECOND]) for first in (FIRST, another(built.encoded[FIRST]))]
    found = [logits(built, model, batch) for batch in batches]
    assert torch.equal(found[0][-length:], found[1][-length:])
    assert not torch.equal(found[0][:-length], found[1][:-length]), "negative control: the neighbour is another one"
    whole = torch.tensor([[0, len(batches[0].ids), 0, -1]], dtype=torch.int32)
    leaking = [logits(built, model, replace(batch, segments=whole))[-length:] for batch in batches]
    assert not torch.equal(*leaking), "negative control: without isolation it is seen"


def test_fp32_on_cuda_is_fp32_on_the_cpu(built: Built) -> None:
    """Logits of a pack; their standard deviation is about 1."""
    batch = built.batch([FIRST, SECOND, "text"])
    got, want = logits(built, on_cuda(built, torch.float32), batch), logits(built, built.mine, batch, "cpu")
    assert float((got - want).abs().max()) < 1e-4


def test_bf16_on_cuda_is_near_fp32_on_the_cpu(built: Built) -> None:
    batch = built.batch([FIRST, SECOND, "text"])
    got, want = logits(built, on_cuda(built, torch.bfloat16), batch), logits(built, built.mine, batch, "cpu")
    assert float((got - want).norm() / want.norm()) < 0.05


def test_32768_tokens_forward_and_backward_build_no_square(built: Built) -> None:
    batch, model = a_long_pack(built), on_cuda(built, torch.bfloat16)

    def step() -> None:
        model(place(batch, model, "cuda"))[0].backward()

    assert len(batch.ids) == LONG and grown_bytes(step) < LONG * LONG * 0.9  # bytes of a mask of one byte

"""Held-out losses per sample, and whether the pictures matter: the same samples with the right and with other media.

The loss of a sample is the mean over its target tokens (of a preference pair: of the chosen answer's). Samples are
packed for speed; a pack gives exactly what its samples give alone (tests/step).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.data.batch import pack_batch
from trainer.data.encode import Encoded
from trainer.models.family import Family, Parts, parts_of
from trainer.step.loss import segment_sums
from trainer.step.packed import PackedModel, place

NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Loss:
    nats: float
    """Mean negative log-likelihood per target token."""
    targets: int
    preferred: float | None = None
    """Of a pair: log-probability of the chosen answer less that of the rejected one."""


def packed_model(model: nn.Module, family: Family, *, blind: bool = False) -> PackedModel:
    """The trainer's forward over transformers' weights, which are shared, not copied.

    `blind` puts zeros in place of every visual feature: the negative control of `pictures_matter`.
    """
    dtype = next(model.parameters()).dtype
    own = family.build(dtype=dtype, attn_implementation="segments", init=False)
    own.load_state_dict(model.state_dict(), assign=True)
    own.tie_weights()
    own = own.to(next(model.parameters()).device)
    parts = parts_of(family)
    return PackedModel(own.eval(), _blind(parts) if blind else parts, mean=family.image_mean, std=family.image_std)


def _blind(parts: Parts) -> Parts:
    def run_vision(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(output) for output in parts.run_vision(*args))

    blind: Any = copy.copy(parts)
    blind.run_vision = run_vision
    return blind


@torch.inference_mode()
def sample_losses(
    model: PackedModel, samples: Sequence[Encoded], *, length: int, patch_budget: int, pad_id: int
) -> list[Loss]:
    """One Loss a sample, in order."""
    device = next(model.parameters()).device
    found: list[Loss | None] = [None] * len(samples)
    for members in packs_of(samples, length, patch_budget):
        chosen = [samples[index] for index in members]
        used = sum(len(sample.ids) for sample in chosen)
        names = [str(index) for index in members]
        width, columns = chosen[0].patches.shape[1], chosen[0].grid_thw.shape[1]
        batch = pack_batch(chosen, names, length=used, pad_id=pad_id, patch_width=width, grid_columns=columns, pack=-1)
        pack = place(batch, model, device)  # type: ignore[arg-type]
        logp = model.token_logp(pack)
        sums = segment_sums(logp.double(), pack.label_segment, len(pack.segments)).tolist()
        counts = torch.bincount(pack.label_segment, minlength=len(pack.segments)).tolist()
        at = 0
        for index, sample in zip(members, chosen, strict=True):
            rows = range(at, at + len(sample.segments))
            found[index] = _loss([sums[row] for row in rows], [counts[row] for row in rows], sample)
            at += len(sample.segments)
    return [loss for loss in found if loss is not None]


def _loss(sums: list[float], counts: list[int], sample: Encoded) -> Loss:
    if (sample.segments[:, 3] >= 0).any():  # prompt, chosen, rejected
        return Loss(-sums[1] / counts[1], counts[1], preferred=sums[1] - sums[2])
    return Loss(-sum(sums) / sum(counts), sum(counts))


def packs_of(samples: Sequence[Encoded], length: int, patch_budget: int) -> list[list[int]]:
    """Samples in order of size, so that a pack's segments are alike; a new pack where a budget would be exceeded."""
    packs: list[list[int]] = []
    tokens = patches = 0
    for index in sorted(range(len(samples)), key=lambda i: (len(samples[i].patches), len(samples[i].ids))):
        sample = samples[index]
        tokens, patches = tokens + len(sample.ids), patches + len(sample.patches)
        if not packs or tokens > length or patches > patch_budget:
            packs.append([])
            tokens, patches = len(sample.ids), len(sample.patches)
        packs[-1].append(index)
    return packs


# ---------------------------------------------------------------- do the pictures matter


def compare(right: Sequence[float], shuffled: Sequence[float], *, seed: int) -> dict[str, Any]:
    """{"right", "shuffled", "n", "ci95"}: means over samples, and the 95 % bootstrap interval of
    shuffled - right, paired by sample."""
    assert len(right) == len(shuffled) > 0
    difference = np.asarray(shuffled) - np.asarray(right)
    drawn = np.random.default_rng([seed, 95]).integers(0, len(difference), (NUM_RESAMPLES, len(difference)))
    low, high = np.quantile(difference[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "right": math.fsum(right) / len(right),
        "shuffled": math.fsum(shuffled) / len(shuffled),
        "n": len(right),
        "ci95": [float(low), float(high)],
    }


def pictures_matter(found: dict[str, Any]) -> bool:
    """The interval lies above 0: the right media help."""
    return found["ci95"][0] > 0

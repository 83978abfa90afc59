"""The same training in one process: torch's own AdamW and clipping, no DeepSpeed. What ZeRO-3 is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.models import freeze, hub
from trainer.models.family import Family, parts_of
from trainer.recipe import Stage
from trainer.step.optim import lr_factor, parameter_groups
from trainer.step.packed import PackedModel, place


def plain_training(
    family: Family, uri: str, stage: Stage, batches: Callable[[int], list[Any]]
) -> tuple[list[list[float]], PackedModel]:
    """([loss, gradient norm] of each step, the model afterwards) of the weights at `uri`; `batches` of a step are those
    of all ranks."""
    parts, num_steps = parts_of(family), stage.schedule.steps
    assert num_steps is not None
    model = family.build(dtype=torch.float32, attn_implementation="segments")
    hub.load(model, uri, family, dtype=torch.float32)
    packed = PackedModel(model, parts, mean=family.image_mean, std=family.image_std)
    names = [name for name, _ in model.named_parameters()]
    freeze.apply(model, freeze.freeze_plan(names, family, stage.train), family)
    groups = parameter_groups(model.named_parameters(), family.group_of, stage.optim)
    optimizer = torch.optim.AdamW(groups, betas=stage.optim.betas, eps=stage.optim.eps)
    figures = []
    for step in range(num_steps):
        optimizer.zero_grad()
        targets = sum(len(batch.label_ids) for batch in batches(step))
        total = torch.zeros(())
        for batch in batches(step):
            total = total + packed(place(batch, packed, "cpu"))[0] / targets
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], stage.optim.clip)
        factor = lr_factor(step, num_steps, stage.schedule)
        for group in optimizer.param_groups:
            group["lr"] = stage.optim.lr_of.get(group["group"], stage.optim.lr) * factor
        optimizer.step()
        figures.append([float(total.detach()), float(norm)])
    return figures, packed


def weights(uri: Path) -> dict[str, torch.Tensor]:
    """By hub name."""
    return {name: read() for name, read in hub.load_tensors(str(uri)).items()}


def largest_difference(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Relative L2, of the tensor that is off by most."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-3)) for name in want)

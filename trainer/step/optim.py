"""Parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from trainer.recipe import Optim, Schedule


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], group_of: Callable[[str], str], optim: Optim
) -> list[dict[str, Any]]:
    """Trained parameters by module group, decayed and not, in a fixed order; for torch.optim.AdamW.

    Weight decay is not applied to norms and biases. Under ZeRO-3 a parameter is flat: its own shape is `ds_shape`.
    """
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decayed = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            found.setdefault((group_of(name), decayed), []).append(parameter)
    return [
        {
            "params": found[group, decayed],
            "lr": optim.lr_of.get(group, optim.lr),  # type: ignore[call-overload]
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "group": group,
        }
        for group, decayed in sorted(found)
    ]


def lr_factor(step: int, num_steps: int, schedule: Schedule) -> float:
    """What learning rates are multiplied with in step `step` (the first is 0): linear warm-up, then cosine or constant.

    The warm-up starts above 0, so that the first step moves something; the last step has min_lr_ratio.
    """
    warmup = math.ceil(schedule.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - 1 - warmup)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(engine: Any, factor: float, optim: Optim) -> dict[str, float]:
    """Set the step's learning rates; {group: rate}."""
    rates = {}
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["group"]] = optim.lr_of.get(group["group"], optim.lr) * factor
    return rates

"""Slices: what this rank owns of every trainable parameter, in fp32, whatever sharding made it so.

A slice is (parameter name, start, stop) of the flattened parameter with three arrays: the fp32 master and Adam's two
moments. Nothing of DeepSpeed is in the stored format; this file is the one adapter, for ZeRO-3. Under ZeRO-3 rank r
of W owns [r * ceil(n / W), (r + 1) * ceil(n / W)) of the flat parameter; the tail of the last owner is padding and
is cut off.

    local(engine)    -> views of this rank's slices (nothing is copied)
    restored(engine) -> context in which the views may be overwritten; leaving it puts them to use
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a flattened parameter of `numel` elements."""

    name: str
    start: int
    stop: int
    numel: int
    tensors: dict[str, torch.Tensor]
    """STATES -> float32[stop - start], views into the optimizer's memory."""


def bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """What rank owns of a flat parameter under ZeRO-3; start == stop when nothing is left for it."""
    share = -(-numel // world_size)
    return min(numel, rank * share), min(numel, (rank + 1) * share)


def _trainable(engine: Any) -> Iterator[tuple[str, Any]]:
    """Names and parameters in the module's order; a tied parameter appears once, under its first name."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            if not hasattr(parameter, "ds_id"):
                raise AssertionError(f"{name} is not a ZeRO-3 parameter: stages 1 and 2 need another adapter")
            yield name, parameter


def create_optimizer_state(engine: Any) -> None:
    """Give every sub-group its moments and step counter, as the optimizer's first step would.

    Adam makes them lazily; a checkpoint can be read into them only once they exist, one step counter each.
    """
    optimizer = engine.optimizer.optimizer
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        state = optimizer.state[flat]
        for key in STATES[1:]:
            if key not in state:
                state[key] = torch.zeros_like(flat.data)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)


def local(engine: Any) -> list[Slice]:
    """This rank's slices of all trainable parameters, as views. Slices without elements are left out."""
    create_optimizer_state(engine)
    zero, found = engine.optimizer, []
    for name, parameter in _trainable(engine):
        group = parameter.ds_process_group
        start, stop = bounds(parameter.ds_numel, dist.get_rank(group), dist.get_world_size(group))
        if start == stop:
            continue
        tensors = {}
        for key in STATES:
            # The public safe_get_local_* copy to the accelerator when the state is offloaded; this view stays where
            # it is.
            view, _ = zero._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=True, optim_state_key=None if key == "master" else key
            )
            tensors[key] = view.detach()[: stop - start]
        found.append(Slice(name, start, stop, parameter.ds_numel, tensors))
    return found


@contextlib.contextmanager
def restored(engine: Any) -> Iterator[list[Slice]]:
    """Slices to write into; afterwards the parameters that the model computes with are made from the new masters.

    Every rank of the group enters and leaves: persistent parameters are gathered again.
    """
    yield local(engine)
    zero = engine.optimizer
    persistent = list(zero.persistent_parameters)
    if persistent:
        persistent[0].partition(persistent)
    with torch.no_grad():
        for _, parameter in _trainable(engine):
            view, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
            parameter.ds_tensor.copy_(view)
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                raise AssertionError("hpZ keeps a second copy of the weights that this adapter does not restore")
    if persistent:
        persistent[0].all_gather(persistent)


# ---------------------------------------------------------------- optimizer, scheduler, counters


def optimizer_facts(engine: Any) -> dict[str, Any]:
    """Adam's step count, the hyperparameters of every group and the accumulation, as JSON."""
    optimizer = engine.optimizer.optimizer
    create_optimizer_state(engine)
    counts = {int(optimizer.state[flat]["step"]) for flat in engine.optimizer.fp32_partitioned_groups_flat}
    if len(counts) > 1:
        raise AssertionError(f"sub-groups disagree about the number of optimizer steps: {sorted(counts)}")
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return {
        "step": counts.pop() if counts else 0,
        "groups": groups,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
    }


def restore_optimizer_facts(engine: Any, facts: dict[str, Any]) -> None:
    """Put back what optimizer_facts returned. Hyperparameters go to the group of the same place; micro-steps are
    counted anew from the accumulation of now, which another world size changes."""
    optimizer = engine.optimizer.optimizer
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        step = optimizer.state[flat]["step"]
        if torch.is_tensor(step):
            step.fill_(facts["step"])
        else:
            optimizer.state[flat]["step"] = facts["step"]
    for group, stored in zip(optimizer.param_groups, facts["groups"], strict=True):
        for key, value in stored.items():
            if torch.is_tensor(group.get(key)):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    engine.global_steps = facts["global_steps"]
    engine.global_samples = facts["global_samples"]
    engine.skipped_steps = facts["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _plain(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.item()
    return list(value) if isinstance(value, tuple) else value

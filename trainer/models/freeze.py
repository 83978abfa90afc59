"""What a stage trains, and the proof that the rest stayed as it was.

Every parameter is trained, frozen, or constant (never trained by the family's nature, with its reason). The proof:
  - every rank's part of every frozen and constant parameter has the same bytes after the last step as after loading
  - the bytes handed over have, tensor by tensor, the digests of the bytes that were read
  - the optimizer holds exactly the trained parameters, at the start and at the end
  - every trained parameter's fp32 master differs from the one it began with, and its gradients were not all zero:
    weight decay alone would move a parameter that nothing reaches

    plan = freeze_plan(names, family, train);  apply(model, plan)               # FreezeError: one without a group
    check_optimizer(plan, engine, hub_name)                                     # FreezeError
    frozen = frozen_digests(model, plan);  masters = master_digests(engine)     # before the first step, before resuming
    rows = prove(plan, ...)                                                     # after the last step; FreezeError
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import FreezeError, ModelError
from trainer.handover import FreezeRow
from trainer.models.family import Family
from trainer.recipe import GROUPS, Train

if TYPE_CHECKING:
    from torch import nn

State = Literal["frozen", "trained", "constant"]


@dataclass(frozen=True)
class Entry:
    group: str
    state: State
    reason: str = ""


FreezePlan = dict[str, Entry]
"""Hub name -> what happens to the parameter."""
HubName = Callable[[str], str]
"""Name of a parameter of the engine's module -> hub name."""


def freeze_plan(names: Iterable[str], family: Family, train: Train) -> FreezePlan:
    """By the model's parameter names. Constants of a frozen group stay constant: their reason is not the stage's.

    Raises:
        FreezeError: parameters that are in none of the recipe's groups; all are listed.
    """
    plan: FreezePlan = {}
    lost = []
    for name in names:
        try:
            group = family.group_of(name)
        except ModelError:
            group = None
        if group not in GROUPS:
            lost.append(name)
        elif reason := family.constant(name):
            plan[family.hub_name(name)] = Entry(group, "constant", reason)
        else:
            plan[family.hub_name(name)] = Entry(group, "trained" if getattr(train, group) else "frozen")
    if lost:
        raise FreezeError(
            "parameters that belong to no module group",
            where=_listed(lost),
            expected=f"one of {', '.join(GROUPS)} for each parameter of family {family.name}",
            got=f"{len(lost)} parameters of none",
            do="name their group in the family's group_of; one that is never trained has its reason in `constant`, too",
        )
    return plan


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def apply(model: nn.Module, plan: FreezePlan, family: Family) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plan[family.hub_name(name)].state == "trained")


def frozen_groups(plan: FreezePlan) -> frozenset[str]:
    """Groups in which nothing is trained: their files can be copied."""
    return frozenset(
        group for group in GROUPS if not any(e.group == group and e.state == "trained" for e in plan.values())
    )


# ---------------------------------------------------------------- digests in memory


def frozen_digests(model: nn.Module, plan: FreezePlan, family: Family) -> dict[str, str]:
    """sha256 of this rank's part of each frozen and constant parameter; no communication.

    Where the whole parameter lies gathered beside the parts (below ZeRO-3's persistence threshold, or still in use),
    the model computes with that copy: its piece has to equal the part.
    """
    found = {}
    for name, parameter in model.named_parameters():
        hub = family.hub_name(name)
        if plan[hub].state == "trained":
            continue
        digest = hashlib.sha256()
        part = getattr(parameter, "ds_tensor", None)
        _update(digest, parameter.data if part is None else part.data)
        if part is not None and parameter.numel() > 0 and not _same_piece(parameter):
            digest.update(b"the gathered copy differs")
        found[hub] = digest.hexdigest()
    return found


def _same_piece(parameter: Any) -> bool:
    """Whether this rank's piece of a gathered parameter has the bytes of its part."""
    import torch
    import torch.distributed as dist

    share = parameter.ds_tensor.numel()
    start = dist.get_rank() * share
    piece = parameter.data.view(-1)[start : start + share]
    return torch.equal(piece, parameter.ds_tensor.data[: piece.numel()])


def master_digests(engine: Any) -> dict[str, str]:
    """sha256 of this rank's fp32 masters, by parameter; no communication."""
    from trainer.state import slices

    found = {}
    for piece in slices.local(engine):
        digest = hashlib.sha256()
        _update(digest, piece.tensors["master"])
        found[piece.name] = digest.hexdigest()
    return found


def moved(engine: Any, before: Mapping[str, str], trained: Iterable[str], hub_name: HubName) -> dict[str, bool]:
    """Hub name of each of the `trained` -> whether, anywhere, its master changed and its gradients were not all zero.
    Every rank calls it."""
    import torch
    import torch.distributed as dist

    from trainer.state import slices

    now, names = master_digests(engine), sorted(trained)
    row_of = {name: row for row, name in enumerate(names)}
    table = torch.zeros(len(names), 2)
    for piece in slices.local(engine):
        if (row := row_of.get(hub_name(piece.name))) is not None:
            changed = now[piece.name] != before.get(piece.name)
            table[row] = torch.tensor([changed, bool(piece.tensors["exp_avg_sq"].count_nonzero())])
    table = table.to(engine.device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return {name: bool(row[0] and row[1]) for name, row in zip(names, table.tolist(), strict=True)}


def trained_names(plan: FreezePlan) -> list[str]:
    return sorted(name for name, entry in plan.items() if entry.state == "trained")


def check_optimizer(plan: FreezePlan, engine: Any, hub_name: HubName) -> None:
    """No communication.

    Raises:
        FreezeError: the optimizer lacks a trained parameter, holds another one, or a parameter asks for a gradient that
            it shall not have (or does not ask for one).
    """
    held = {id(parameter) for group in engine.optimizer.fp16_groups for parameter in group}
    for name, parameter in engine.module.named_parameters():
        hub = hub_name(name)
        wanted = plan[hub].state == "trained"
        if (id(parameter) in held) == wanted == parameter.requires_grad:
            continue
        raise FreezeError(
            "the optimizer does not hold what the stage trains",
            where=hub,
            expected=f"{plan[hub].state}: {'in' if wanted else 'not in'} the optimizer",
            got=f"{'in' if id(parameter) in held else 'not in'} the optimizer, requires_grad {parameter.requires_grad}",
            do="something changed requires_grad or the parameter groups after the freeze plan was applied",
        )


def _update(digest: Any, tensor: Any) -> None:
    import torch

    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    digest.update(memoryview(flat.numpy()))


# ---------------------------------------------------------------- proof


def prove(
    plan: FreezePlan,
    *,
    sizes: Mapping[str, int],
    read: Mapping[str, str],
    handed_over: Mapping[str, str],
    changed_in_memory: Iterable[str],
    moved: Mapping[str, bool],
) -> list[FreezeRow]:
    """The freeze table.

    Args:
        sizes: elements of each parameter.
        read, handed_over: digests of every tensor as the parent stored it and as this stage stored it.
        changed_in_memory: frozen or constant parameters whose bytes changed during training, on any rank.
        moved: of each trained parameter, whether it was trained in deed (`moved` above).

    Raises:
        FreezeError: a frozen or constant parameter changed, or a trained one did not move.
    """
    still = [name for name, entry in plan.items() if entry.state != "trained"]
    broken = sorted({*changed_in_memory, *(name for name in still if read.get(name) != handed_over.get(name))})
    if broken:
        raise FreezeError(
            "frozen parameters changed",
            where=", ".join(broken[:5]),
            expected=f"{len(still)} frozen parameters with the bytes they began with",
            got=f"{len(broken)} changed",
            do="nothing was handed over; something wrote to these parameters outside the optimizer",
        )
    asleep = [name for name in trained_names(plan) if not moved.get(name)]
    if asleep:
        groups = {plan[name].group for name in asleep}
        whole = sorted(groups - {plan[name].group for name in trained_names(plan) if moved.get(name)})
        raise FreezeError(
            "a trained group did not move" if whole else "trained parameters did not move",
            where=", ".join(whole) if whole else _listed(asleep),
            expected="masters that differ from those at the stage's start, gradients that are not all zero",
            got="the same masters or zero gradients on every rank",
            do="check that the stage's data has pictures, and the learning rate of the group",
        )
    return [row for group in GROUPS for row in _rows(plan, group, sizes, read, handed_over)]


def _rows(
    plan: FreezePlan, group: str, sizes: Mapping[str, int], read: Mapping[str, str], handed_over: Mapping[str, str]
) -> list[FreezeRow]:
    rows = []
    found: set[tuple[State, str]] = {(e.state, e.reason) for e in plan.values() if e.group == group}
    kinds = sorted(found, key=lambda kind: (kind[0] == "constant", kind))
    for state, reason in kinds:
        names = sorted(n for n, e in plan.items() if (e.group, e.state, e.reason) == (group, state, reason))
        rows.append(
            FreezeRow(
                group=group,
                trainable=state == "trained",
                parameters=sum(sizes[name] for name in names),
                digest_before=_together(names, read),
                digest_after=_together(names, handed_over),
                state=state,
                reason=reason,
            )
        )
    return rows


def _together(names: list[str], digests: Mapping[str, str]) -> str:
    outer = hashlib.sha256()
    for name in names:
        outer.update(f"{name} {digests[name]}\n".encode())
    return outer.hexdigest()

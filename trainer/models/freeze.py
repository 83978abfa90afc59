"""What a stage trains, and the proof that the rest stayed as it was.

Every parameter is trained, frozen, or constant (never trained by the family's nature, with its reason). The proof:
  - every rank's part of every frozen and constant parameter has the same bytes after the last step as after loading
  - the bytes handed over have, tensor by tensor, the digests of the bytes that were read
  - every trained group's fp32 masters differ from those it began with, and its gradients were not all zero: weight
    decay alone would move a group that nothing reaches

    plan = freeze_plan(names, family, train);  apply(model, plan)
    frozen = frozen_digests(model, plan);  masters = master_digests(engine)     # before the first step, before resuming
    rows = prove(plan, ...)                                                     # after the last step; FreezeError
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import FreezeError
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


def freeze_plan(names: Iterable[str], family: Family, train: Train) -> FreezePlan:
    """By the model's parameter names. Constants of a frozen group stay constant: their reason is not the stage's."""
    plan: FreezePlan = {}
    for name in names:
        group = family.group_of(name)
        if reason := family.constant(name):
            plan[family.hub_name(name)] = Entry(group, "constant", reason)
        else:
            plan[family.hub_name(name)] = Entry(group, "trained" if getattr(train, group) else "frozen")
    return plan


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


def moved(engine: Any, before: Mapping[str, str], group_of: Any) -> dict[str, bool]:
    """Group -> whether, anywhere, masters changed and gradients were not all zero. Every rank calls it."""
    import torch
    import torch.distributed as dist

    from trainer.state import slices

    now = master_digests(engine)
    changed = {group: [0.0, 0.0] for group in GROUPS}
    for piece in slices.local(engine):
        flags = changed[group_of(piece.name)]
        flags[0] = max(flags[0], float(now[piece.name] != before.get(piece.name)))
        flags[1] = max(flags[1], float(bool(piece.tensors["exp_avg_sq"].count_nonzero())))
    table = torch.tensor([changed[group] for group in GROUPS], device=engine.device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return {group: bool(row[0] and row[1]) for group, row in zip(GROUPS, table.tolist(), strict=True)}


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
    moved_groups: Mapping[str, bool],
) -> list[FreezeRow]:
    """The freeze table.

    Args:
        sizes: elements of each parameter.
        read, handed_over: digests of every tensor as the parent stored it and as this stage stored it.
        changed_in_memory: frozen or constant parameters whose bytes changed during training, on any rank.

    Raises:
        FreezeError: a frozen or constant parameter changed, or a trained group did not move.
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
    trained = sorted({entry.group for entry in plan.values() if entry.state == "trained"})
    if asleep := [group for group in trained if not moved_groups.get(group)]:
        raise FreezeError(
            "a trained group did not move",
            where=", ".join(asleep),
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

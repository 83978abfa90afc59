"""Ranks and groups: the only place that knows both.

A group is the ranks that work on one pack. With sequence parallelism of 1 every rank is a group of its own; lanes of
the plan belong to groups in contiguous blocks (trainer/data/plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UsageError


@dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    ranks_per_group: int = 1

    @property
    def num_groups(self) -> int:
        return self.world_size // self.ranks_per_group

    @property
    def group(self) -> int:
        return self.rank // self.ranks_per_group


def make_mesh(rank: int, world_size: int, sequence_parallel: int) -> Mesh:
    """
    Raises:
        UsageError: sequence parallelism above 1, which this version does not have.
    """
    if sequence_parallel != 1:
        raise UsageError(
            "sequence parallelism is not there yet",
            where="compute.sequence_parallel",
            expected=1,
            got=sequence_parallel,
            do="set compute.sequence_parallel to 1; a pack then has to fit one rank",
        )
    return Mesh(rank, world_size)

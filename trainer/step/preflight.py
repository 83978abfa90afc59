"""Before the first step: all ranks run the same thing on the same data. A difference found now costs a minute."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from trainer.errors import UsageError

PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def same_everywhere(facts: Mapping[str, Any]) -> None:
    """Compare facts (digests, versions, sizes) of all ranks.

    Raises:
        UsageError: on every rank, with the first fact that differs and the ranks that differ from rank 0.
    """
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(facts))
    for name in facts:
        odd = [rank for rank, other in enumerate(everyone) if other.get(name) != everyone[0].get(name)]
        if odd:
            raise UsageError(
                f"ranks differ in {name}",
                where=f"ranks {', '.join(map(str, odd[:8]))}",
                expected=f"{everyone[0].get(name)} (rank 0)",
                got=everyone[odd[0]].get(name),
                do="use the same image, recipe and output on every node",
            )

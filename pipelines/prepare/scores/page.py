"""A page of a score as it comes back from where it is drawn. Imports nothing of what draws it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Page:
    """One page of a score."""

    png: bytes
    ink: Box
    """Left, top, right, bottom in pixels of what is drawn; right and bottom are exclusive."""
    systems: tuple[int, ...]
    """Measures in each system, from the top."""


class Refused(NamedTuple):
    """Why a score is not drawn, as a BadRow has it."""

    reason: str
    expected: str
    got: str

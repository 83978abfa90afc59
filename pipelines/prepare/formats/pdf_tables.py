"""Tables that are drawn with rules: where rules close a grid, its cells are told by what divides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.prepare.formats.blocks import Box
from pipelines.prepare.formats.tables import Cell, cells_html

NEAR = 3.0
"""Pixels by which two rules may miss each other."""
COVERED = 0.6
"""Share of a cell's edge that a rule covers when it divides it from the next."""


class _HasCharacters(Protocol):
    chars: list[tuple[str, Box]]


@dataclass(frozen=True)
class Table:
    """`cells`: (top row, left column, rows, columns); `across` and `down`: where the columns and rows begin and end."""

    across: list[float]
    down: list[float]
    cells: list[tuple[int, int, int, int]]

    @property
    def box(self) -> Box:
        return self.across[0], self.down[0], self.across[-1], self.down[-1]

    def holds(self, box: Box) -> bool:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        return self.across[0] <= x <= self.across[-1] and self.down[0] <= y <= self.down[-1]

    def html(self, lines: Sequence[_HasCharacters]) -> str:
        """The table with the characters of its lines, each in the cell that its middle lies in."""
        texts: dict[tuple[int, int], str] = {}
        for line in lines:
            seen = set()
            for char, box in line.chars:
                owner = self._cell((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                gap = "" if owner in seen or owner not in texts else " "  # a cell's second line
                texts[owner] = texts.get(owner, "") + gap + char
                seen.add(owner)
        rows: list[list[Cell]] = [[] for _ in self.down[:-1]]
        for top, left, height, width in sorted(self.cells):
            rows[top].append(Cell(texts.get((top, left), ""), height, width))
        return cells_html(rows)

    def _cell(self, x: float, y: float) -> tuple[int, int]:
        row, column = _place(self.down, y), _place(self.across, x)
        for top, left, height, width in self.cells:
            if top <= row < top + height and left <= column < left + width:
                return top, left
        raise AssertionError((row, column, self.cells))


def _place(edges: Sequence[float], value: float) -> int:
    return max(0, min(sum(edge <= value for edge in edges[1:]), len(edges) - 2))


def tables_of(rules: Sequence[Box]) -> list[Table]:
    """Grids of at least two cells among the rules of a page (thin boxes); what closes no grid of rectangles is none."""
    found = []
    for group in _touching(rules):
        level = [rule for rule in group if rule[2] - rule[0] >= rule[3] - rule[1]]
        upright = [rule for rule in group if rule[2] - rule[0] < rule[3] - rule[1]]
        across = _edges((rule[0] + rule[2]) / 2 for rule in upright)
        down = _edges((rule[1] + rule[3]) / 2 for rule in level)
        if len(across) < 2 or len(down) < 2 or len(across) + len(down) < 5:
            continue
        cells = _cells(across, down, level, upright)
        if cells is not None and len(cells) > 1:
            found.append(Table(across, down, cells))
    return found


def _touching(rules: Sequence[Box]) -> list[list[Box]]:
    """Rules in groups that hang together."""
    groups: list[list[Box]] = []
    for rule in rules:
        near = [group for group in groups if any(_meet(rule, other) for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([rule, *(other for group in near for other in group)])
    return groups


def _meet(one: Box, other: Box) -> bool:
    return (
        one[0] - NEAR <= other[2]
        and other[0] - NEAR <= one[2]
        and one[1] - NEAR <= other[3]
        and other[1] - NEAR <= one[3]
    )


def _edges(values) -> list[float]:
    """Values in order, those that are near each other once."""
    found: list[float] = []
    for value in sorted(values):
        if not found or value - found[-1] > NEAR:
            found.append(value)
    return found


def _cells(
    across: list[float], down: list[float], level: list[Box], upright: list[Box]
) -> list[tuple[int, int, int, int]] | None:
    """Cells of a grid, merged where no rule divides them; None when a merged cell is no rectangle or the outer edge is
    open."""
    rows, columns = len(down) - 1, len(across) - 1

    def side(row: int, column: int) -> bool:  # of the cell's left edge
        return _covered([(r[1], r[3]) for r in upright if _near(r[0], r[2], across[column])], down[row], down[row + 1])

    def head(row: int, column: int) -> bool:  # of the cell's top edge
        return _covered(
            [(r[0], r[2]) for r in level if _near(r[1], r[3], down[row])], across[column], across[column + 1]
        )

    closed = all(side(row, edge) for row in range(rows) for edge in (0, columns))
    closed = closed and all(head(edge, column) for column in range(columns) for edge in (0, rows))
    if not closed:
        return None
    taken: set[tuple[int, int]] = set()
    found = []
    for row in range(rows):
        for column in range(columns):
            if (row, column) in taken:
                continue
            width = next((n for n in range(1, columns - column) if side(row, column + n)), columns - column)
            height = next((n for n in range(1, rows - row) if head(row + n, column)), rows - row)
            places = {(row + y, column + x) for y in range(height) for x in range(width)}
            inner = any((x > column and side(y, x)) or (y > row and head(y, x)) or (y, x) in taken for y, x in places)
            if inner:
                return None
            taken |= places
            found.append((row, column, height, width))
    return found


def _near(low: float, high: float, edge: float) -> bool:
    return abs((low + high) / 2 - edge) <= NEAR


def _covered(parts: Sequence[tuple[float, float]], start: float, end: float) -> bool:
    """Whether the parts cover most of start to end."""
    total, at = 0.0, start
    for low, high in sorted(parts):
        low, high = max(low, at), min(high, end)
        total += max(high - low, 0.0)
        at = max(at, high)
    return total >= COVERED * (end - start)

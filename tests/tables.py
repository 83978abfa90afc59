"""Tables that `make generated` writes into READMEs, each between two marks."""

from __future__ import annotations

from collections.abc import Sequence


def between(readme: str, marks: tuple[str, str], content: str, *, where: str) -> str:
    """The README with `content` between its marks; ValueError where it lacks them. `where`: the README's path."""
    begin, end = marks
    before, begun, rest = readme.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{where} lacks {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

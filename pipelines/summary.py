"""The last lines of a run: one row a stage, and where the report lies."""

from __future__ import annotations

from typing import Any

from pipelines.progress import told_s
from trainer import storage
from trainer.recipe import GROUPS, Recipe

COLUMNS = ("stage", "trained", "packing", "steps", "tokens", "fill", "loss first", "loss last", "wall")


def summary(recipe: Recipe, out: str, *, wall_s: float) -> str:
    """A table from OUT/run.json, which the report step has written from the StageResults."""
    run = storage.read_json(storage.join(out, "run.json"))
    rows = [COLUMNS, *(_row(stage, _wall_s(out, stage["name"])) for stage in run["stages"])]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"model   {storage.join(out, 'export')}",
            f"report  {storage.join(out, 'report.html')}",
            *(f"warning: {one['field']}: {one['message']}" for one in run.get("warnings", [])),
            f"recipe {recipe.name} finished in {told_s(wall_s)}",
        ]
    )


def _wall_s(out: str, stage: str) -> float | None:
    try:
        return storage.read_json(storage.join(out, stage, "result.json")).get("wall_s")
    except FileNotFoundError:
        return None


def _row(stage: dict[str, Any], wall_s: float | None) -> tuple[str, ...]:
    trained = [group for group in GROUPS if stage["freeze"].get(group) == "trained"]
    return (
        stage["name"],
        "+".join(trained),
        str(stage["packing_length"]),
        str(stage["steps"]),
        f"{stage['tokens']:,}",
        f"{stage['fill']:.1%}",
        _loss(stage["loss_first"]),
        _loss(stage["loss_last"]),
        told_s(wall_s) if wall_s else "",
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

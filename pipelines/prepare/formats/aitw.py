"""Android in the Wild (arXiv 2307.10088), a step a line, with the names of its TFRecords: {"episode_id" (or "ep_id"),
"step_id", "episode_length", "goal_info", "image": path, "results/action_type", "results/yx_touch", "results/yx_lift",
"results/type_action"}. Steps of an episode follow each other in the file. Coordinates are shares of the sides.

An episode with a bad step, a missing one, or steps out of order is one bad row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pipelines.prepare.formats import actions, agent
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, Row, field_of, guarded, json_entries
from trainer.recipe import Source


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        steps = entry["steps"]
        numbers = [int(field_of(step, "step_id")) for step in steps]
        length = int(steps[0].get("episode_length", len(steps)))
        if numbers != list(range(length)):
            raise BadRow("wrong-order", f"steps 0 to {length - 1} one after the other", numbers)
        episode = {
            "instruction": field_of(steps[0], "goal_info", "goal"),
            "tool": "mobile_use",
            "schema": True,
            "steps": [{**actions.aitw(step), "screenshot": field_of(step, "image", "screenshot")} for step in steps],
        }
        messages, media = agent.trajectory(episode, media_root)
        return Draft(where, str(field_of(steps[0], "episode_id", "ep_id")), messages, media, units="unit")

    yield from episodes(json_entries(path), ("episode_id", "ep_id"), one)


def episodes(
    entries: Iterable[tuple[str, Any]], names: Sequence[str], read_one: Callable[[dict, str], Draft]
) -> Iterator[Row]:
    """Rows of (where, value or Bad) that hold one step each: steps with the same value of one of `names` that follow
    each other are one entry {"steps": [...]}. A step that cannot be read is a Bad of its own, and ends the episode."""

    def owner(item: tuple[str, Any]) -> tuple[Any, str]:
        where, entry = item
        found = [entry[name] for name in names if entry.get(name) is not None] if isinstance(entry, dict) else []
        return (found[0], "") if found else (None, where)

    for known, group in groupby(entries, owner):
        lines = list(group)
        where, first = lines[0]
        if isinstance(first, Bad):
            yield first
        elif known[0] is None:
            got = f"fields {sorted(first)}" if isinstance(first, dict) else type(first).__name__
            yield Bad(where, f"an object with the field {' or '.join(names)}", got, "wrong-form")
        else:
            yield guarded(where, read_one, {"steps": [entry for _, entry in lines]})

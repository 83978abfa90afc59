"""Mind2Web (arXiv 2306.06070) with screenshots. Either an episode an entry: {"annotation_id", "confirmed_task",
"actions": [{"operation", "pos_candidates", "screenshot"}]}; or an action a line as Multimodal-Mind2Web has it, with
`annotation_id` and `confirmed_task` in every line and actions of one episode after each other. `operation` and the
candidates are objects or JSON text. The place of an action is the middle of its element's box (`bounding_box_rect`: x,
y, width, height in pixels of the page's screenshot): of the original target, else the first candidate that has a box.

Where actions have a `target_action_index`, it counts them from 0, and `action_reprs` has one word of each: an episode
that lacks one, or has them in another order, is one bad row. Multimodal-Mind2Web's Parquet, with the screenshots in
cells, is read as it is published (mind2web_table.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from pipelines.prepare.formats import actions, agent, mind2web_table
from pipelines.prepare.formats.aitw import episodes
from pipelines.prepare.formats.parquet import MIND2WEB
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import BadRow, Draft, Row, field_of, json_entries
from trainer.recipe import Source


def looks(peek: Peek) -> str | None:
    known = peek.all(*MIND2WEB) or set(peek.names) >= MIND2WEB
    return " and ".join(sorted(MIND2WEB)) if known else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        first = entry["steps"][0]
        listed = first["actions"] if "actions" in first else entry["steps"]
        if not listed:
            raise BadRow("wrong-form", "at least one action", "none")
        if "actions" in first and len(entry["steps"]) > 1:
            raise BadRow("duplicate-id", "an annotation_id of its own", f"{len(entry['steps'])} episodes with it")
        if (numbers := [action.get("target_action_index") for action in listed]) != [None] * len(listed):
            in_order = [str(number) for number in range(len(listed))]
            if [str(number) for number in numbers] != in_order:
                raise BadRow("wrong-order", f"actions 0 to {len(listed) - 1} one after the other", numbers)
        if (told := listed[0].get("action_reprs")) and len(told) != len(listed):
            raise BadRow("wrong-order", f"{len(told)} actions, as action_reprs says", len(listed))
        episode = {
            "instruction": field_of(first, "confirmed_task"),
            "tool": "computer_use",
            "schema": True,
            "steps": [_step(action) for action in listed],
        }
        messages, media = agent.trajectory(episode, media_root)
        return Draft(where, str(first["annotation_id"]), messages, media)

    table = path.lower().endswith(".parquet")
    yield from episodes(
        mind2web_table.entries(path, media_root) if table else json_entries(path), ("annotation_id",), one
    )


def _step(action: dict) -> dict:
    operation = _value(field_of(action, "operation"))
    name = operation.get("original_op") or field_of(operation, "op")  # op calls HOVER and ENTER clicks
    at = _middle([_value(item) for item in action.get("pos_candidates") or []])
    step = actions.mind2web(str(name).upper(), str(operation.get("value") or ""), at)
    return {**step, "screenshot": field_of(action, "screenshot")}


def _value(item: dict | str) -> dict:
    return json.loads(item) if isinstance(item, str) else item


def _middle(candidates: list[dict]) -> list[float] | None:
    for candidate in sorted(candidates, key=lambda item: not item.get("is_original_target")):
        rect = _value(candidate.get("attributes") or {}).get("bounding_box_rect")
        if not rect:
            continue
        left, top, width, height = map(float, rect.split(","))
        if width > 0 and height > 0 and left >= 0 and top >= 0:
            return [left + width / 2, top + height / 2]
    return None

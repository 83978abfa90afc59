"""Agent data, one a line. A trajectory: {"instruction", "tool": "computer_use" | "mobile_use", "schema": true | false,
"steps": [{"screenshot", "action", "coordinate", "coordinate2", "arguments", "thought", "then"}]}; the screenshot is
what was seen before the action, `then` lists further actions that follow without another look. `schema` puts the
tool's signature into a system message. UI grounding: {"instruction", "screenshot", "targets": [{"bbox", "label",
"role"}]}. Coordinates are pixels of the screenshot unless `coordinates` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    each,
    field_of,
    identity_of,
    message,
    resolve,
    text,
    units_of,
)
from trainer.data.render import ACTIONS
from trainer.recipe import Source

TOOLS = ("computer_use", "mobile_use")
POINTS = ("coordinate", "coordinate2")


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        make = _grounding if "targets" in entry else trajectory
        messages, media = make(entry, media_root)
        return Draft(where, identity_of(entry, where), messages, media, units=units_of(entry))

    yield from each(path, one)


def trajectory(entry: dict, root: str) -> tuple[list[dict], list[MediaRef]]:
    """Messages and media of a trajectory."""
    tool, steps = entry.get("tool", TOOLS[0]), field_of(entry, "steps")
    if tool not in TOOLS:
        raise BadRow("wrong-form", f"a tool of {', '.join(TOOLS)}", tool)
    if not steps:
        raise BadRow("wrong-form", "at least one step", "none")
    media = [MediaRef(resolve(root, field_of(step, "screenshot")), "image") for step in steps]
    messages = [message("system", {"part": "tools", "media": 0, "tool": tool})] if entry.get("schema") else []
    for number, step in enumerate(steps):
        asked = [text(field_of(entry, "instruction"))] if number == 0 else []
        messages.append(message("user" if number == 0 else "tool", {"part": "image", "media": number}, *asked))
        thought = [text(f"{step['thought']}\n")] if step.get("thought") else []
        calls = [_action(call, number, tool) for call in (step, *step.get("then", ()))]
        apart = [part for call in calls for part in (text("\n"), call)][1:]
        messages.append(message("assistant", *thought, *apart))
    return messages, media


def _action(step: dict, number: int, tool: str) -> dict:
    points = {name: [float(value) for value in step[name]] for name in POINTS if step.get(name)}
    if any(len(point) != 2 for point in points.values()):
        raise BadRow("wrong-form", "a coordinate of two numbers", points)
    name = field_of(step, "action")
    if name not in ACTIONS[tool]:
        raise BadRow("unmapped-action", f"an action of {tool}: {', '.join(ACTIONS[tool])}", repr(name))
    return {
        "part": "action",
        "media": number,
        "tool": tool,
        "action": name,
        "arguments": step.get("arguments", {}),
        "coordinates": points,
    }


def _grounding(entry: dict, root: str) -> tuple[list[dict], list[MediaRef]]:
    objects = []
    for target in entry["targets"]:
        left, top, right, bottom = map(float, field_of(target, "bbox"))
        found = {"label": str(field_of(target, "label")), "at": {"shape": "box", "xyxy": [left, top, right, bottom]}}
        if target.get("role"):
            found["role"] = target["role"]
        objects.append(found)
    if not objects:
        raise BadRow("no-objects", "at least one target", "none")
    question = message("user", {"part": "image", "media": 0}, text(field_of(entry, "instruction")))
    answer = message("assistant", {"part": "objects", "media": 0, "objects": objects, "form": "json"})
    return [question, answer], [MediaRef(resolve(root, field_of(entry, "screenshot")), "image")]

"""Agent trajectories and UI grounding (JSONL) on the committed screenshots of real pages (screenshots/make.py).

The split is by site: pages of a site share their frame (menu, buttons), so two pages of one site are not independent.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.sources import SourceFile, Split, sha256

SCREENS = Path(__file__).parents[1] / "screenshots"
HELD_OUT_SITE = "pydoc"
MANNERS = ("Click on {0}.", "Open {0}.", "Go to {0}.", "Press {0}.")


@cache
def recorded() -> dict:
    return json.loads((SCREENS / "screens.json").read_text())


def split_of(site: str) -> Split:
    return "held_out" if site == HELD_OUT_SITE else "train"


def screenshot_files(seed: int) -> list[SourceFile]:
    return [
        SourceFile(
            f"pipelines/prepare/screenshots/{screen['file']}",
            "screenshot",
            screen["site"],
            recorded()["licences"][screen["site"]],
            sha256((SCREENS / screen["file"]).read_bytes()),
            split_of(screen["site"]),
        )
        for screen in recorded()["screens"]
    ]


def write_agents(folder: Folder, split: Split, found: Ingredients) -> None:
    rng = folder.rng("agents", split)
    screens = recorded()["screens"]
    chosen = [number for number, screen in enumerate(screens) if split_of(screen["site"]) == split]
    path_of = {
        number: folder.media(f"agents/{screens[number]['file']}", (SCREENS / screens[number]["file"]).read_bytes())
        for number in chosen
    }
    rows = [walk_row(walk, screens, path_of) for walk in recorded()["walks"] if split_of(walk["site"]) == split]
    single = [(number, element) for number in chosen for element in screens[number]["elements"]]
    rng.shuffle(single)
    for place, (number, element) in enumerate(single[: folder.count(320 if split == "train" else 40, 8)]):
        make = _click_row if place % 3 else _point_row
        rows.append({"id": f"{split}-{place:04d}", **make(rng, path_of[number], element)})
    for place, row in enumerate(rows):
        row.setdefault("id", f"walk-{split}-{place:03d}")
    folder.jsonl("agents", split, rows)


def _centre(element: dict) -> list[float]:
    left, top, right, bottom = element["box"]
    return [(left + right) / 2, (top + bottom) / 2]


def _click_row(rng: random.Random, path: str, element: dict) -> dict:
    """One step: the instruction, the screenshot, a click on the element."""
    instruction = rng.choice(MANNERS).format(f"the {element['role']} {element['text']}")
    if element["role"] == "input":
        instruction = f"Click into the field {element['text']}."
    step = {"screenshot": path, "action": "left_click", "coordinate": _centre(element)}
    return {"instruction": instruction, "tool": "computer_use", "schema": False, "steps": [step]}


def _point_row(rng: random.Random, path: str, element: dict) -> dict:
    """UI grounding: where an element is."""
    target = {"bbox": element["box"], "label": element["text"], "role": element["role"]}
    return {
        "instruction": f"Where is the {element['role']} {element['text']}?",
        "screenshot": path,
        "targets": [target],
    }


def walk_row(walk: dict, screens: list[dict], path_of: dict[int, str]) -> dict:
    """A recorded walk with a screenshot before every action, and the tool's schema in the system message."""
    steps, named = [], []
    for step in walk["steps"]:
        row = {"screenshot": path_of[step["screen"]], "action": step["action"]}
        if step["action"] == "left_click":
            element = screens[step["screen"]]["elements"][step["element"]]
            row["coordinate"] = _centre(element)
            named.append(f"click on {element['text']}")
        elif step["action"] == "type":
            row["arguments"] = {"text": step["text"]}
            named.append(f"type {step['text']}")
        else:
            row["arguments"] = {"status": step["text"]}
        steps.append(row)
    instruction = ", then ".join(named) if named else "Stop at once"
    return {
        "instruction": f"{instruction[:1].upper()}{instruction[1:]}.",
        "tool": "computer_use",
        "schema": True,
        "steps": steps,
    }

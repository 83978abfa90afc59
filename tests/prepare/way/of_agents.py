"""Rows of agents: trajectories of phones, the web and desktops in one action space, and elements of screens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipelines.prepare.corpus.screens import SCREENS
from pipelines.prepare.formats.elements import CAPTION, GROUNDING
from tests.prepare.builders import a_picture, write_lines
from tests.prepare.test_agent_formats import (
    AITW,
    AITW_CALLS,
    ANDROID,
    ANDROID_CALLS,
    DESKTOP,
    DUMP,
    MIND2WEB,
    MIND2WEB_CALLS,
    PHONE,
    aitw_steps,
    android_episode,
    screens,
    web_action,
)
from tests.prepare.test_mind2web_table import rows_of, table
from tests.prepare.way import of_text
from tests.prepare.way.row import IMAGE, Row, action, box, objects, want

PHONE_TOOL, DESK_TOOL = "mobile_use", "computer_use"


def walk(query: str, tool: str, *steps: tuple, words: tuple[str, ...] = (), schema: bool = False) -> list:
    """Messages of a trajectory; a step is (calls...) after one look at the screen."""
    said: list[tuple[str, list[Any]]] = [("system", [("tools", 0, tool)])] if schema else []
    for number, calls in enumerate(steps):
        asked = [("image", number), query] if number == 0 else [("image", number)]
        said.append(("user" if number == 0 else "tool", asked))
        thought = [f"{words[number]}\n"] if number < len(words) and words[number] else []
        apart = [part for call in calls for part in ("\n", call)][1:]
        said.append(("assistant", [*thought, *apart]))
    return said


def steps_of(tool: str, listed: list[tuple]) -> list[tuple]:
    """Steps of walk() from (medium, action, arguments, coordinates) of every call: one step a medium."""
    return [
        tuple(action(tool, name, number, coordinates=where, **said) for _, name, said, where in calls)
        for number, calls in groupby(listed, key=itemgetter(0))
    ]


def at(x: float, y: float, *second: float) -> dict[str, tuple]:
    return {"coordinate": (x, y)} | ({"coordinate2": second} if second else {})


def seen(*names: str, size: tuple[int, int] = PHONE) -> list[str]:
    return [f"{name} {size[0]}x{size[1]}" for name in names]


# ---------------------------------------------------------------- trajectories

CLICK = {"screenshot": "red.png", "action": "left_click", "coordinate": [10, 20], "thought": "It is there."}
DRAG = {"screenshot": "blue.jpg", "action": "left_click_drag", "coordinate": [10, 20], "coordinate2": [90, 180],
        "then": [{"action": "type", "arguments": {"text": "x"}}]}  # fmt: skip
AGENT = {"id": "walk", "instruction": "Do it.", "steps": [CLICK, DRAG], "schema": True}
TARGET = {
    "id": "where",
    "instruction": "Where is it?",
    "screenshot": "red.png",
    "targets": [{"bbox": [6, 8, 30, 20], "label": "OK", "role": "button"}],
}


def android(folder: Path, listed: tuple, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_lines(folder / "episodes.jsonl", [android_episode(folder, *listed, **changes)])


def faulty_android(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wrong = [
        {"action_type": "double_tap", "x": 1, "y": 1},
        {"action_type": "scroll", "direction": "forward"},
        {"action_type": "click", "x": 5},
        {"action_type": "click", "x": 5, "y": 5000},
    ]
    rows = [android_episode(folder, one, episode_id=number) for number, one in enumerate(wrong)]
    rows.append(android_episode(folder, *ANDROID, episode_id="short", screenshots=["s0.png"]))
    return write_lines(folder / "episodes.jsonl", rows)


def aitw(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_lines(folder / "steps.jsonl", aitw_steps(folder, *AITW))


def faulty_aitw(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    steps = aitw_steps(folder, *AITW, episode="gap")
    unknown = aitw_steps(folder, {"results/action_type": 2}, episode="unknown")
    return write_lines(folder / "steps.jsonl", [steps[0], *steps[2:4], *unknown, "{", {"x": 1}])


def mind2web(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    screens(folder, 1, (300, 200))
    return write_lines(folder / "actions.jsonl", MIND2WEB)


def mind2web_parquet(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return table(folder / "train.parquet", rows_of("a1"))


def faulty_mind2web(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    screens(folder, 1, (300, 200))
    wrong = [web_action("COPY"), web_action("CLICK"), {**web_action("CLICK"), "operation": "{"}]
    rows = [{**action, "annotation_id": f"w{number}"} for number, action in enumerate(wrong)]
    return write_lines(folder / "actions.jsonl", rows)


def of_mind2web(name: str, good: Callable[[Path], Path], *files: str) -> Row:
    said = walk("Book a table", DESK_TOOL, *steps_of(DESK_TOOL, MIND2WEB_CALLS), schema=True)
    faults = {"no-target": 1, "unmapped-action": 1, "wrong-form": 1}
    return Row(name, "agent", "chat", good, [want("a1", said, *files)], faulty_mind2web, faults)


# ---------------------------------------------------------------- elements of screens


def screen(identity: str, of: str, caption: str, *elements: tuple, **more: Any) -> dict[str, Any]:
    said = [("user", [IMAGE, CAPTION]), ("assistant", [caption])]
    said += [("user", [GROUNDING]), ("assistant", [objects(*elements, form="json")])]
    return want(identity, said, of, **more)


def tree(folder: Path, content: str, size: tuple[int, int], name: str = "screen") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.xml").write_text(content)
    (folder / f"{name}.png").write_bytes(a_picture(*size))
    return folder / f"{name}.xml"


def alone(folder: Path, content: str) -> Path:
    """A tree without its screenshot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alone.xml").write_text(content)
    return folder / "alone.xml"


RECORDED = json.loads((SCREENS / "screens.json").read_text())


def recorded(folder: Path) -> Path:
    """The first four screens that a browser recorded, and the walk over them."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in RECORDED["screens"][:4]:
        shutil.copy(SCREENS / item["file"], folder)
    found = {"screens": RECORDED["screens"][:4], "walks": RECORDED["walks"][:1]}
    (folder / "screens.json").write_text(json.dumps(found))
    return folder / "screens.json"


def faulty_screens(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(a_picture(64, 48))
    item = {"role": "link", "text": "Home", "box": [1, 2, 30, 20]}
    good = {"file": "a.png", "width": 64, "height": 48, "elements": [item]}
    wrong = [{**good, "elements": []}, {**good, "elements": [{**item, "box": [1, 2]}]}, {**good, "file": "b.png"}]
    walks = [{"site": "x", "steps": [{"screen": 9, "action": "left_click", "element": 0}]}]
    (folder / "screens.json").write_text(json.dumps({"screens": wrong, "walks": walks}))
    return folder / "screens.json"


def recorded_screens() -> list[dict[str, Any]]:
    """Counted here from what the browser wrote, caption and boxes."""
    found = []
    for item in RECORDED["screens"][:4]:
        roles: dict[str, list[str]] = {}
        for element in item["elements"]:
            roles.setdefault(element["role"], []).append(element["text"])
        listed = "; ".join(
            f"{len(names)} {role}{'es' if role == 'checkbox' and len(names) > 1 else 's' if len(names) > 1 else ''}: "
            + ", ".join(f'"{name}"' for name in names)
            for role, names in roles.items()
        )
        boxes = [box(element["text"], *element["box"], role=element["role"]) for element in item["elements"]]
        found.append(screen(item["file"], f"{item['file']} 640x480", f"A screen with {listed}.", *boxes))
    return found


def recorded_walk() -> dict[str, Any]:
    steps = RECORDED["walks"][0]["steps"]
    calls, named, files = [], [], []
    for number, step in enumerate(steps):
        item = RECORDED["screens"][step["screen"]]
        files.append(f"{item['file']} 640x480")
        if step["action"] == "left_click":
            element = item["elements"][step["element"]]
            left, top, right, bottom = element["box"]
            named.append(f"click on {element['text']}")
            place = at((left + right) / 2, (top + bottom) / 2)
            calls.append((action(DESK_TOOL, "left_click", number, coordinates=place),))
        else:
            calls.append((action(DESK_TOOL, "terminate", number, status=step["text"]),))
    query = ", then ".join(named)
    said = walk(f"{query[:1].upper()}{query[1:]}.", DESK_TOOL, *calls, schema=True)
    return want("good/screens.json/walks[0]", said, *files)


BROKEN = "<hierarchy><node"
ROWS = [
    of_text.row(
        "agent",
        (AGENT, TARGET),
        [
            want(
                "walk",
                walk(
                    "Do it.",
                    DESK_TOOL,
                    (action(DESK_TOOL, "left_click", 0, coordinates=at(10, 20)),),
                    (
                        action(DESK_TOOL, "left_click_drag", 1, coordinates=at(10, 20, 90, 180)),
                        action(DESK_TOOL, "type", 1, text="x"),
                    ),
                    words=("It is there.",),
                    schema=True,
                ),
                "red.png 60x40",
                "blue.jpg 100x200",
            ),
            want(
                "where",
                [
                    ("user", [IMAGE, "Where is it?"]),
                    ("assistant", [objects(box("OK", 6, 8, 30, 20, role="button"), form="json")]),
                ],
                "red.png 60x40",
            ),
        ],
        kind="agent",
        quick=True,
    ),
    Row(
        "android_control",
        "agent",
        "chat",
        partial(android, listed=ANDROID),
        [
            want(
                "7",
                walk(
                    "Set an alarm",
                    PHONE_TOOL,
                    *steps_of(PHONE_TOOL, ANDROID_CALLS),
                    words=("Do it.",) * 7,
                    schema=True,
                ),
                *seen(*(f"s{number}.png" for number in range(8))),
            )
        ],
        faulty_android,
        {"unmapped-action": 2, "wrong-form": 2, "outside-picture": 1},
    ),
    Row(
        "aitw",
        "agent",
        "chat",
        aitw,
        [
            want(
                "e1",
                walk("Open the news", PHONE_TOOL, *steps_of(PHONE_TOOL, AITW_CALLS), schema=True),
                *seen(*(f"s{number}.png" for number in range(5))),
            )
        ],
        faulty_aitw,
        {"wrong-order": 1, "unmapped-action": 1, "bad-json": 1, "wrong-form": 1},
    ),
    of_mind2web("mind2web", mind2web, *seen(*["s0.png"] * 5, size=(300, 200))),
    of_mind2web("mind2web-table", mind2web_parquet, *(f"screenshot 300x{200 + number}" for number in range(5))),
    Row(
        "uiautomator",
        "agent",
        "chat",
        partial(tree, content=DUMP, size=PHONE),
        [
            screen(
                "good/screen.xml",
                "screen.png 270x600",
                'A screen with 1 text: "Alarms"; 3 buttons: "Add & edit", "7:30 Mon, Tue", "Below"; 1 input: "Name".',
                box("Alarms", 10, 20, 110, 50, role="text"),
                box("Add & edit", 220, 540, 260, 580, role="button"),
                box("7:30 Mon, Tue", 0, 100, 270, 160, role="button"),
                box("Name", 0, 250, 270, 280, role="input"),
                box("Below", 0, 590, 270, 600, role="button"),
            )
        ],
        partial(alone, content=DUMP),
        {"missing-media": 1},
    ),
    Row(
        "accessibility",
        "agent",
        "chat",
        partial(tree, content=DESKTOP, size=(1280, 800)),
        [
            screen(
                "good/screen.xml",
                "screen.png 1280x800",
                'A screen with 1 button: "Save"; 1 menu: "File"; 1 input: "report.txt".',
                box("Save", 40, 60, 160, 100, role="button"),
                box("File", 0, 0, 80, 40, role="menu"),
                box("report.txt", 40, 120, 440, 168, role="input"),
            )
        ],
        partial(tree, content=DESKTOP.replace("(60, 20)", "60x20"), size=(1280, 800)),
        {"wrong-form": 1},
    ),
    Row(
        "web_dom",
        "agent",
        "chat",
        recorded,
        [*recorded_screens(), recorded_walk()],
        faulty_screens,
        {"no-objects": 1, "wrong-form": 2, "missing-media": 1},
    ),
]

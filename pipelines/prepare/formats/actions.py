"""Actions of public agent data as actions of the one action space (computer_use, mobile_use; trainer/data/render.py).

| data | their action | ours |
| --- | --- | --- |
| AndroidControl | click, long_press (x, y) | click, long_press coordinate; a press of PRESS_S seconds |
| | input_text | type text |
| | scroll direction | swipe the other way through the middle of the screen (below) |
| | open_app | open text |
| | navigate_back, navigate_home, keyboard_enter | system_button Back, Home, Enter |
| | wait | wait of WAIT_S seconds: the data state no length |
| | status successful / complete, infeasible | terminate success, failure |
| | one screenshot more than actions | terminate success on it: every episode was carried out to its end |
| AITW | DUAL_POINT (4), ends within 0.04 of the start | click where it was touched |
| | DUAL_POINT (4), longer | swipe from touch to lift |
| | TYPE (3) | type text |
| | PRESS_BACK (5), PRESS_HOME (6), PRESS_ENTER (7) | system_button Back, Home, Enter |
| | STATUS_TASK_COMPLETE (10), STATUS_TASK_IMPOSSIBLE (11) | terminate success, failure |
| Mind2Web | CLICK | left_click on the middle of the element |
| | HOVER | mouse_move there |
| | TYPE value | left_click there, then type text |
| | SELECT value | left_click there, type text, key enter: how the list of a <select> is chosen from by keyboard |
| | ENTER | key enter |

Anything else is a bad row `unmapped-action` with the action's name: never a guess.

A scroll states only where to: "down" shows what lies below, so the finger goes up. It is written from SWIPE of the side
beyond the middle to SWIPE before it. That place is ours; the data have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipelines.prepare.formats.rows import BadRow, field_of

PRESS_S = 2
WAIT_S = 2
SWIPE = 0.25
TAP_DISTANCE = 0.04
"""Of the sides: a shorter gesture is a tap (AITW's own action_matching.py)."""
SCROLLS = {"down": (0, 1), "up": (0, -1), "right": (1, 0), "left": (-1, 0)}
BUTTONS = {"navigate_back": "Back", "navigate_home": "Home", "keyboard_enter": "Enter"}
STATUS = {"successful": "success", "complete": "success", "success": "success", "infeasible": "failure"}
AITW_BUTTONS = {5: "Back", 6: "Home", 7: "Enter"}
AITW_STATUS = {10: "success", 11: "failure"}


def unmapped(data: str, name: object) -> BadRow:
    return BadRow("unmapped-action", f"an action of {data} that pipelines/prepare/formats/actions.py maps", repr(name))


def android_control(action: dict, size: tuple[int, int]) -> dict:
    """One AndroidControl action as a step of agent.py, without its screenshot. `size`: of the screenshot, in pixels."""
    name = field_of(action, "action_type")
    if name in ("click", "long_press"):
        step = {"action": name, "coordinate": [field_of(action, "x"), field_of(action, "y")]}
        return step if name == "click" else {**step, "arguments": {"time": PRESS_S}}
    if name == "scroll":
        direction = field_of(action, "direction")
        if direction not in SCROLLS:
            raise unmapped("AndroidControl", f"scroll {direction}")
        start, end = _swipe(SCROLLS[direction], size)
        return {"action": "swipe", "coordinate": start, "coordinate2": end}
    if name == "input_text":
        return {"action": "type", "arguments": {"text": str(field_of(action, "text"))}}
    if name == "open_app":
        return {"action": "open", "arguments": {"text": str(field_of(action, "app_name"))}}
    if name in BUTTONS:
        return {"action": "system_button", "arguments": {"button": BUTTONS[name]}}
    if name == "wait":
        return {"action": "wait", "arguments": {"time": WAIT_S}}
    if name == "status" and action.get("goal_status") in STATUS:
        return terminate(STATUS[action["goal_status"]])
    raise unmapped("AndroidControl", name if name != "status" else f"status {action.get('goal_status')}")


def terminate(status: str) -> dict:
    return {"action": "terminate", "arguments": {"status": status}}


def _swipe(towards: tuple[int, int], size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Start and end of the finger that scrolls towards: it moves the other way."""
    start = [size[axis] * (0.5 + SWIPE * towards[axis]) for axis in (0, 1)]
    return start, [size[axis] * (0.5 - SWIPE * towards[axis]) for axis in (0, 1)]


def aitw(row: dict) -> dict:
    """One AITW step; coordinates are shares of the sides. Points are stored as (y, x)."""
    kind = field_of(row, "results/action_type", "action_type")
    if kind == 4:
        touch = _xy(field_of(row, "results/yx_touch", "touch_yx"))
        lift = _xy(field_of(row, "results/yx_lift", "lift_yx"))
        if math.dist(touch, lift) <= TAP_DISTANCE:
            return {"action": "click", "coordinate": touch}
        return {"action": "swipe", "coordinate": touch, "coordinate2": lift}
    if kind == 3:
        return {"action": "type", "arguments": {"text": str(field_of(row, "results/type_action", "type_text"))}}
    if kind in AITW_BUTTONS:
        return {"action": "system_button", "arguments": {"button": AITW_BUTTONS[kind]}}
    if kind in AITW_STATUS:
        return terminate(AITW_STATUS[kind])
    raise unmapped("AITW", kind)


def _xy(yx: Sequence[float]) -> list[float]:
    if len(yx) != 2:
        raise BadRow("wrong-form", "a point of two numbers (y, x)", yx)
    return [float(yx[1]), float(yx[0])]


def mind2web(name: str, value: str, at: list[float] | None) -> dict:
    """One Mind2Web operation on the element whose middle is `at`; what belongs to one operation is one step."""
    if name == "ENTER":
        return ENTER
    if name not in ("CLICK", "HOVER", "TYPE", "SELECT"):
        raise unmapped("Mind2Web", name)
    if at is None:
        raise BadRow("no-target", f"an element with a box for {name}", "none of its candidates has one")
    if name == "HOVER":
        return {"action": "mouse_move", "coordinate": at}
    click: dict = {"action": "left_click", "coordinate": at}
    if name == "CLICK":
        return click
    if not value:
        raise BadRow("wrong-form", f"a value for {name}", repr(value))
    typed = {"action": "type", "arguments": {"text": value}}
    return {**click, "then": [typed] if name == "TYPE" else [typed, ENTER]}


ENTER = {"action": "key", "arguments": {"keys": ["enter"]}}

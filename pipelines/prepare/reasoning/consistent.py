"""Does a reasoning speak of the step's action? Rules on English words; what they cannot tell passes.

| looked at | inconsistent where |
| --- | --- |
| kind of action | it plans another kind (scroll, type, tap, wait ...) and no word of it belongs to the step's own |
| text typed, app opened, answer | it quotes texts, and none of them is the call's |
| direction of a swipe or scroll | it names directions, and none of them is the step's |
| system button, key | it names buttons to press, and none of them is the step's |
| how a task ends | success is told as failure, or failure as success |

A place is not looked at: whether "Search" is what lies below the finger only a model can see (`min_agreement`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.data.sample import Action

POINT, WRITE, MOVE, BUTTON, OPEN, WAIT, END = "point", "write", "move", "button", "open", "wait", "end"
KIND_OF = {
    **dict.fromkeys(("left_click", "click", "right_click", "middle_click", "double_click", "triple_click"), POINT),
    **dict.fromkeys(("long_press", "mouse_move"), POINT),
    "type": WRITE,
    **dict.fromkeys(("scroll", "hscroll", "swipe", "left_click_drag"), MOVE),
    **dict.fromkeys(("key", "system_button"), BUTTON),
    "open": OPEN,
    "wait": WAIT,
    **dict.fromkeys(("terminate", "answer"), END),
}
PLANS = {
    POINT: r"(?:(?:double|right|left|long)[- ]?)?(?:click|tap)(?:s|ed|ping|ing)?|hover(?:s|ing)?",
    WRITE: r"typ(?:e|es|ing)|fill(?:ing)? (?:in|out)",
    MOVE: r"scroll(?:s|ing)?|swip(?:e|es|ing)|drag(?:s|ging)?",
    WAIT: r"wait(?:s|ing)?",
}
"""Words that plan one kind of action and no other."""
OWN = {
    POINT: rf"{PLANS[POINT]}|press\w*|select\w*|choos\w*|pick\w*|hit|open\w*|check\w*|tick\w*|toggl\w*|touch\w*|"
    r"hold\w*|expand\w*|clos\w*|dismiss\w*|add\w*|submit\w*|confirm\w*|go(?:ing)? to|visit\w*|focus\w*|switch\w*|"
    r"point\w*|mov\w*",
    WRITE: rf"{PLANS[WRITE]}|enter\w*|input\w*|writ\w*|fill\w*|search(?:ing)? for|put\w*|set\w*",
    MOVE: rf"{PLANS[MOVE]}|mov\w*|slid\w*|further|more|reveal\w*|pull\w*|look\w*",
    BUTTON: r"press\w*|go(?:ing)? back|return\w*|back|home|enter|keys?|submit\w*|confirm\w*|shortcut|hit|leav\w*|"
    r"us(?:e|ing)|start\w*",
    OPEN: r"open\w*|launch\w*|start\w*|switch\w*|app",
    WAIT: rf"{PLANS[WAIT]}|load\w*|paus\w*|until|finish\w*",
    END: r"done|finish\w*|complet\w*|achiev\w*|task|answer\w*|stop\w*|end\w*|impossible|cannot|unable|fail\w*|"
    r"success\w*|fulfil\w*|report\w*|conclud\w*",
}
QUOTED = re.compile(r"[\"“”«»]([^\"“”«»]{1,200})[\"“”«»]|(?<!\w)['‘]([^'’‘]{1,200})['’](?!\w)")
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}
BUTTONS = re.compile(r"\b(?:press|pressing|hit|hitting|use|using|tap|tapping)\s+(?:the\s+)?(back|home|enter|menu)\b")
SAYS = {
    "type": r"typ(?:e|es|ing)|enter\w*|input\w*|writ\w*",
    "open": r"open\w*|launch\w*|start\w*",
    "answer": r"answer\w*|reply\w*",
}
"""Words that what is quoted right after them is the call's."""
DIRECTIONS = re.compile(
    r"\b(scroll|swip|drag)\w*(?:\s+(?!(?:up|down|left|right)\b)\w+){0,3}\s+(up|down|left|right)"
    r"(?=\s*$|\s*[.,;:!]|\s+(?:to|by|in|on|until|so|for|and|a|the|more|further|once|again|through|over)\b)"
)
"""`the left button` is no direction: a word of place or the end of a clause has to follow."""
GIVEN_UP = re.compile(r"\b(?:impossible|cannot|can't|unable|infeasible|not possible|fails?|failed)\b")
DONE = re.compile(r"\b(?:done|complete[ds]?|finished|achieved|succe\w+|fulfilled|accomplished)\b")


def contradiction(text: str, actions: Sequence[Action]) -> str | None:
    """What in the text speaks against the step's actions, for people; None where nothing does. Of an action of another
    space than computer_use and mobile_use nothing is known."""
    said, actions = text.casefold(), [action for action in actions if action.action in KIND_OF]
    if not actions:
        return None
    checks = [_kind(said, actions)]
    for action in actions:
        if action.action in ("type", "open", "answer"):
            checks.append(_quoted(text, str(action.arguments.get("text", "")), actions))
        elif KIND_OF[action.action] == MOVE:
            checks.append(_direction(said, action))
        elif action.action == "system_button" and len(actions) == 1:
            checks.append(_button(said, str(action.arguments.get("button", ""))))
        elif action.action == "terminate":
            checks.append(_end(said, str(action.arguments.get("status", ""))))
    return next((told for told in checks if told), None)


def _kind(said: str, actions: Sequence[Action]) -> str | None:
    own = {KIND_OF[action.action] for action in actions}
    if any(_has(OWN[kind], said) for kind in own):
        return None
    planned = [kind for kind, words in PLANS.items() if kind not in own and _has(words, said)]
    return f"words of {', '.join(planned)}, none of {', '.join(sorted(own))}" if planned else None


def _has(words: str, said: str) -> bool:
    return re.search(rf"\b(?:{words})\b", said) is not None


def _quoted(text: str, given: str, actions: Sequence[Action]) -> str | None:
    """Quotations may be of elements, too: only one right after a word for writing or opening is the call's."""
    named = [verbs for name, verbs in SAYS.items() if any(action.action == name for action in actions)]
    verbs = "|".join(named)
    wanted = _plain(given)
    found = []
    for match in re.finditer(
        rf"\b(?:{verbs})\b(?:\s+(?:the|words?|text|name|app|city|query|term|value)\b)*\s*", text, re.I
    ):
        if (quoted := QUOTED.match(text, match.end())) is not None:
            found.append(_plain(quoted[1] or quoted[2]))
    if found and wanted and not any(one in wanted or wanted in one for one in found):
        return f"writes {found[0]!r}, the call {given!r}"
    return None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def direction_of(action: Action) -> str | None:
    """Where the finger or the pointer goes: up, down, left, right."""
    points = list(action.coordinates.values())
    if len(points) < 2:
        return None
    across, down = points[1][0] - points[0][0], points[1][1] - points[0][1]
    if abs(across) == abs(down):
        return None
    if abs(down) > abs(across):
        return "down" if down > 0 else "up"
    return "right" if across > 0 else "left"


def _ways(action: Action) -> dict[str, str] | None:
    """How a text names the step's direction: `swipe up` the finger's, `scroll down` that of the page, the other one."""
    if action.action in ("scroll", "hscroll"):
        pixels = action.arguments.get("pixels")
        if not isinstance(pixels, int | float) or not pixels:
            return None
        up, down = ("up", "down") if action.action == "scroll" else ("right", "left")
        page = up if pixels > 0 else down
        return {"scroll": page, "swipe": OPPOSITE[page], "drag": OPPOSITE[page]}
    finger = direction_of(action)
    return None if finger is None else {"scroll": OPPOSITE[finger], "swipe": finger, "drag": finger}


def _direction(said: str, action: Action) -> str | None:
    want = _ways(action)
    named = [("swipe" if verb == "swip" else verb, way) for verb, way in DIRECTIONS.findall(said)]
    if want is None or not named or any(want[verb] == way for verb, way in named):
        return None
    verb, way = named[0]
    return f"{verb}s {way}, the action goes {want[verb]}"


def _button(said: str, button: str) -> str | None:
    named = BUTTONS.findall(said)
    if re.search(r"\b(?:go|going) back\b", said):
        named.append("back")
    if named and button.casefold() not in named:
        return f"presses {named[0]}, the call {button}"
    return None


def _end(said: str, status: str) -> str | None:
    up, done = GIVEN_UP.search(said) is not None, DONE.search(said) is not None
    if status == "success" and up and not done:
        return "gives up, the call ends with success"
    if status == "failure" and done and not up:
        return "is done, the call ends with failure"
    return None

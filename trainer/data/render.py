"""A Sample's messages as pieces of text, special tokens and media, in the family's own formats.

`render(sample, ...)` gives segments of pieces; layout.py tokenises them. Two renderings:
  document   no chat template: text after text, end-of-text at the end; every text token is a target
  chat       the family's chat template; targets are assistant content and its end token
What a user wrote is always a text piece: special tokens are written here and never parsed out of text.

The variant picks among ways of writing the same thing (coordinates as JSON or XML, times in seconds or hmsf).
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.data.coordinates import Size
from trainer.data.sample import Action, Box, Mask, Message, Object, Objects, Part, Point, Sample, Span, Tools
from trainer.models.family import Family
from trainer.recipe import Rendering

VERSION = 1
"""Raised when the text of any rendering changes: it is part of the rules' digest, so old counts are not reused."""


@dataclass(frozen=True)
class Piece:
    kind: Literal["text", "special", "image", "video"]
    text: str = ""
    target: bool = False
    media: int = -1


@dataclass(frozen=True)
class Segment:
    """`parent` is the segment whose tokens this one also sees; -1: none."""

    pieces: tuple[Piece, ...]
    parent: int = -1


Resized = Callable[[int], Size]
"""Index in Sample.media -> (width, height) that it is resized to."""


def render(sample: Sample, variant: int, family: Family, rendering: Rendering, resized: Resized) -> list[Segment]:
    """One segment; for a preference three: the prompt, the chosen and the rejected answer, which both see the prompt.

    Raises ValueError for a message that the rendering has no place for (a `document` message in a chat).
    """
    writer = _Writer(sample, variant, family, resized)
    if sample.chosen:
        if rendering == "document":
            raise ValueError("a preference needs the chat rendering")
        prompt = writer.chat(sample.messages, targets=False, open_turn=True)
        answers = [writer.answer(messages) for messages in (sample.chosen, sample.rejected)]
        return [Segment(tuple(prompt)), *(Segment(tuple(pieces), parent=0) for pieces in answers)]
    if rendering == "document":
        return [Segment(tuple(writer.document(sample.messages)))]
    return [Segment(tuple(writer.chat(sample.messages, targets=True)))]


def render_prompt(sample: Sample, variant: int, family: Family, resized: Resized) -> list[Piece]:
    """What generation starts from: the messages before the last assistant turn, and an open assistant turn."""
    messages = sample.messages
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return _Writer(sample, variant, family, resized).chat(messages, targets=False, open_turn=True)


class _Writer:
    def __init__(self, sample: Sample, variant: int, family: Family, resized: Resized):
        self.sample, self.variant, self.family, self.resized = sample, variant, family, resized

    def document(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for number, message in enumerate(messages):
            if number:
                pieces.append(Piece("text", "\n", True))
            pieces += self.content(message, target=True)
        return [*pieces, self.special(self.family.markers.eos, True)]

    def chat(self, messages: Sequence[Message], *, targets: bool, open_turn: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        if self.family.default_system and (not messages or messages[0].role != "system"):
            pieces += self.turn("system", [Piece("text", self.family.default_system)], False)
        for message in messages:
            if message.role == "document":
                raise ValueError("a document message in a chat: set the source's rendering to document")
            target = targets and message.role == "assistant"
            pieces += self.turn(message.role, self.content(message, target), target)
        if open_turn:
            pieces += [self.special(self.family.markers.im_start), Piece("text", "assistant\n")]
        return pieces

    def turn(self, role: str, content: list[Piece], target: bool) -> list[Piece]:
        marks = self.family.markers
        head = [self.special(marks.im_start), Piece("text", f"{role}\n")]
        return [*head, *content, self.special(marks.im_end, target), Piece("text", "\n")]

    def answer(self, messages: Sequence[Message]) -> list[Piece]:
        """A continuation of an open assistant turn: targets are what the assistant says."""
        marks = self.family.markers
        first, *rest = messages
        pieces = [*self.content(first, True), self.special(marks.im_end, True)]
        for message in rest:
            target = message.role == "assistant"
            pieces.append(Piece("text", "\n"))
            pieces += self.turn(message.role, self.content(message, target), target)[:-1]
        return pieces

    def special(self, token: str, target: bool = False) -> Piece:
        return Piece("special", token, target)

    def content(self, message: Message, target: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for part in message.parts:
            pieces += self.part(part, target)
        return pieces

    def part(self, part: Part, target: bool) -> list[Piece]:
        marks = self.family.markers
        if part.part == "text":
            return [Piece("text", part.text, target)] if part.text else []
        if part.part == "image" or part.part == "video":
            middle = Piece(part.part, media=part.media)
            return [self.special(marks.vision_start), middle, self.special(marks.vision_end)]
        if part.part == "objects":
            return [Piece("text", self.objects(part), target)]
        if part.part == "action":
            return [Piece("text", self.action(part), target)]
        return [Piece("text", self.tools(part), target)]

    # ---------------------------------------------------------------- geometry

    def point(self, media: int, x: float, y: float) -> list[float] | list[int]:
        file = self.sample.media[media]
        return list(self.family.coordinates.to_model(x, y, (file.width, file.height), self.resized(media)))  # type: ignore[return-value]

    def box(self, media: int, xyxy: Sequence[float]) -> list[Any]:
        return [*self.point(media, xyxy[0], xyxy[1]), *self.point(media, xyxy[2], xyxy[3])]

    def time(self, media: int, seconds: float) -> str:
        if self.variant % 2 == 0:
            return f"{seconds:.1f} seconds"
        return hmsf(seconds, self.sample.media[media].fps)

    def objects(self, part: Objects) -> str:
        if part.form == "html":
            return self.html(part)
        if part.form == "plain":
            return "\n".join(self.plain(part.media, thing) for thing in part.objects)
        points_only = bool(part.objects) and all(isinstance(thing.at, Point) for thing in part.objects)
        if part.form == "xml" or (part.form == "any" and points_only and self.variant % 2 == 1):
            return self.xml(part)
        return _compact([self.json(part.media, thing) for thing in part.objects])

    def json(self, media: int, thing: Object) -> dict[str, Any]:
        at = thing.at
        if isinstance(at, Point):
            entry: dict[str, Any] = {"point_2d": self.point(media, *at.xy)}
        elif isinstance(at, Span):
            entry = {"start": self.time(media, at.start_s), "end": self.time(media, at.end_s)}
        else:  # Qwen2.5-VL publishes no text form of masks: their box is written
            entry = {"bbox_2d": self.box(media, at.xyxy)}
        entry["label"] = thing.label
        if thing.role:
            entry["role"] = thing.role
        if thing.content is not None:
            entry["text_content"] = thing.content
        return entry

    def plain(self, media: int, thing: Object) -> str:
        at = thing.at
        if isinstance(at, Point):
            return ", ".join(map(str, self.point(media, *at.xy)))
        if isinstance(at, Span):
            return f"{self.time(media, at.start_s)} - {self.time(media, at.end_s)}"
        return ", ".join(map(str, self.box(media, at.xyxy)))

    def xml(self, part: Objects) -> str:
        """<points x1= y1= alt=>label</points>, one a label; boxes give their centre."""
        grouped: dict[str, list[Sequence[float]]] = {}
        for thing in part.objects:
            grouped.setdefault(thing.label, []).append(self.point(part.media, *_centre(thing)))
        lines = []
        for label, points in grouped.items():
            label = html.escape(label)
            where = " ".join(f'x{n}="{x}" y{n}="{y}"' for n, (x, y) in enumerate(points, start=1))
            lines.append(f'<points {where} alt="{label}">{label}</points>')
        return "\n".join(lines)

    def html(self, part: Objects) -> str:
        """QwenVL HTML (arXiv 2502.13923, section 2.2): every element carries data-bbox."""
        lines = ["<html><body>"]
        for thing in part.objects:
            box = f'data-bbox="{" ".join(map(str, self.box(part.media, _box(thing))))}"'
            role, content = thing.role or "p", thing.content or ""
            if role in ("p", "h1", "h2", "h3", "h4", "h5", "h6"):
                lines.append(f"<{role} {box}>{html.escape(content, quote=False)}</{role}>")
            elif role == "table":  # content is HTML already
                inner = content.removeprefix("<table>").removesuffix("</table>")
                lines.append(f"<table {box}>{inner}</table>")
            else:
                inner = html.escape(content, quote=False)
                lines.append(f'<div class="{role}" {box}><img {box}/>{inner}</div>')
        return "\n".join([*lines, "</body></html>"])

    # ---------------------------------------------------------------- agents

    def action(self, part: Action) -> str:
        arguments = {"action": part.action, **part.arguments}
        for name, (x, y) in part.coordinates.items():
            arguments[name] = self.point(part.media, x, y)
        call = json.dumps({"name": part.tool, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>"

    def tools(self, part: Tools) -> str:
        width, height = self._screen(part.media)
        schema = json.dumps({"type": "function", "function": _tool(part.tool, width, height)}, ensure_ascii=False)
        return TOOLS_TEXT.replace("[SCHEMA]", schema)

    def _screen(self, media: int) -> tuple[int, int]:
        kind = self.family.coordinates.kind
        return self.resized(media) if kind == "absolute" else (1000, 1000) if kind == "thousand" else (1, 1)


TOOLS_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n[SCHEMA]\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""The words of the released chat template for tools."""
_MOUSE = ["mouse_move", "left_click", "left_click_drag", "right_click", "middle_click", "double_click", "triple_click"]
ACTIONS = {
    "computer_use": ["key", "type", *_MOUSE, "scroll", "hscroll", "wait", "terminate", "answer"],
    "mobile_use": ["key", "click", "long_press", "swipe", "type", "system_button", "open", "wait", "terminate"],
}


def _tool(name: str, width: int, height: int) -> dict[str, Any]:
    """A function signature: the action space of the report, with the size of the screen that the model sees."""
    return {
        "name": name,
        "description": f"Use the screen. Its resolution is {width}x{height}.",
        "parameters": {
            "properties": {
                "action": {"type": "string", "enum": ACTIONS[name]},
                "coordinate": {"type": "array", "description": "(x, y) in pixels of the screen"},
            },
            "required": ["action"],
            "type": "object",
        },
    }


def hmsf(seconds: float, fps: float) -> str:
    """hours:minutes:seconds:frame, as "00:02:12:15"."""
    frames_per_s = round(fps) or 1
    whole = int(seconds)
    frame = min(int((seconds - whole) * frames_per_s + 1e-6), frames_per_s - 1)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}:{frame:02d}"


def _centre(thing: Object) -> tuple[float, float]:
    if isinstance(thing.at, Point):
        return thing.at.xy
    x0, y0, x1, y1 = _box(thing)
    return (x0 + x1) / 2, (y0 + y1) / 2


def _box(thing: Object) -> tuple[float, float, float, float]:
    at = thing.at
    if isinstance(at, Box | Mask):
        return at.xyxy
    if isinstance(at, Point):
        return (*at.xy, *at.xy)
    raise ValueError(f"object {thing.label!r} is a span of time; the form needs a place in the picture")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

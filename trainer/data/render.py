"""A Sample's messages as pieces of text, special tokens and media, in the family's own formats.

`render(sample, ...)` gives segments of pieces; layout.py tokenises them. Two renderings:
  document   no chat template: text after text, end-of-text at the end; every text token is a target
  chat       the family's chat template (chat.py); targets are assistant content and its end token
What a user wrote is always a text piece: special tokens are written here and never parsed out of text.

The variant picks among ways of writing the same thing (coordinates as JSON or XML, times in seconds or hmsf).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.objects import Pen, Resized
from trainer.data.pieces import Piece, Shown, Turn
from trainer.data.sample import Action, Image, Message, Part, Sample, Tools, Video, parts_of
from trainer.models.family import Family
from trainer.recipe import Rendering

VERSION = 2
"""Raised when the text of any rendering changes: it is part of the rules' digest, so old counts are not reused."""

Times = Callable[[int], Sequence[float]]
"""Index in Sample.media -> seconds of each row of the video's grid."""


@dataclass(frozen=True)
class Segment:
    """`parent` is the segment whose tokens this one also sees; -1: none."""

    pieces: tuple[Piece, ...]
    parent: int = -1


def _untimed(media: int) -> Sequence[float]:
    return ()


def render(
    sample: Sample, variant: int, family: Family, rendering: Rendering, resized: Resized, times: Times = _untimed
) -> list[Segment]:
    """One segment; for a preference three: the prompt, the chosen and the rejected answer, which both see the prompt.

    Raises ValueError for what the rendering has no place for: a `document` message in a chat, a role that the template
    lacks, a video in a family without video.
    """
    writer = _Writer(sample, variant, family, rendering, resized, times)
    template = family.template
    if sample.chosen:
        if rendering == "document":
            raise ValueError("a preference needs the chat rendering")
        prompt = template.conversation(writer.turns(sample.messages, targets=False), open_turn=True)
        answers = [template.answer(writer.turns(messages)) for messages in (sample.chosen, sample.rejected)]
        return [Segment(tuple(prompt)), *(Segment(tuple(pieces), parent=0) for pieces in answers)]
    if rendering == "document":
        return [Segment(tuple(writer.document(sample.messages)))]
    return [Segment(tuple(template.conversation(writer.turns(sample.messages))))]


def message_pieces(sample: Sample, message: Message, variant: int, family: Family, resized: Resized) -> list[Piece]:
    """The content of one message without the words and tokens that a template writes around it and around media, each
    of which is one piece: for endpoints, whose template writes them."""
    writer = _Writer(sample, variant, family, "chat", resized, _untimed)
    found = []
    for part in message.parts:
        if part.part == "image" or part.part == "video":
            found.append(Piece(part.part, media=part.media))
        else:
            found += writer.part(part, False)
    return found


class _Writer:
    def __init__(
        self, sample: Sample, variant: int, family: Family, rendering: Rendering, resized: Resized, times: Times
    ):
        self.family, self.times = family, times
        self.rendering: Rendering = rendering
        self.pen = Pen(sample, variant, family.coordinates, resized)
        self.numbers = _numbers(sample)

    def document(self, messages: Sequence[Message]) -> list[Piece]:
        marks = self.family.markers
        pieces = [Piece("special", marks.bos)] if marks.bos else []
        for number, message in enumerate(messages):
            if number:
                pieces.append(Piece("text", "\n", True))
            pieces += self.content(message, target=True)
        return [*pieces, Piece("special", marks.eos, True)]

    def turns(self, messages: Sequence[Message], *, targets: bool = True) -> list[Turn]:
        found = []
        for message in messages:
            if message.role == "document":
                raise ValueError("a document message in a chat: set the source's rendering to document")
            target = targets and message.role == "assistant"
            found.append(Turn(message.role, tuple(self.content(message, target)), target))
        return found

    def content(self, message: Message, target: bool) -> list[Piece]:
        return [piece for part in message.parts for piece in self.part(part, target)]

    def part(self, part: Part, target: bool) -> list[Piece]:
        if part.part == "text":
            return [Piece("text", part.text, target)] if part.text else []
        if part.part == "image" or part.part == "video":
            times = self.times(part.media) if part.part == "video" else ()
            return self.family.media_pieces(
                Shown(part.part, part.media, self.numbers[part.part, part.media], self.rendering, times)
            )
        if part.part == "objects":
            return self.family.objects.write(part, self.pen, target)
        if part.part == "action":
            return [Piece("text", self.action(part), target)]
        return [Piece("text", self.tools(part), target)]

    # ---------------------------------------------------------------- agents

    def action(self, part: Action) -> str:
        arguments = {"action": part.action, **part.arguments}
        for name, (x, y) in part.coordinates.items():
            arguments[name] = self.pen.point(part.media, x, y)
        call = json.dumps({"name": part.tool, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>"

    def tools(self, part: Tools) -> str:
        width, height = self.family.coordinates.screen(self.pen.resized(part.media))
        schema = json.dumps({"type": "function", "function": _tool(part.tool, width, height)}, ensure_ascii=False)
        return TOOLS_TEXT.replace("[SCHEMA]", schema)


def _numbers(sample: Sample) -> dict[tuple[str, int], int]:
    """(kind, medium) -> its number in reading order, from 1."""
    found: dict[tuple[str, int], int] = {}
    count = {"image": 0, "video": 0}
    for part in parts_of(sample):
        if isinstance(part, Image | Video) and (part.part, part.media) not in found:
            count[part.part] += 1
            found[part.part, part.media] = count[part.part]
    return found


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

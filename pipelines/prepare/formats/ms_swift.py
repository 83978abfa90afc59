"""ms-swift's standard form: {"messages": [{"role", "content"}], "images", "videos", "objects"} with <image>, <video>,
<ref-object> and <bbox> in the text. `objects`: {"ref": [...], "bbox": [[x1, y1, x2, y2] | [x, y]], "bbox_type": "real"
| "norm1", "image_id": [...]}. Pairs have `rejected_response` or `rejected_messages`. Also its query/response/history
and `conversation` rows. Source: its Custom-dataset page.

<ref-object><bbox>... is written as objects with that label, in each family's own way; a <bbox> in other words is just
its coordinates; a <bbox> of an answer to a question with one <ref-object> is that object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.prepare.formats.answers import with_places
from pipelines.prepare.formats.llava import media_of
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Places,
    Row,
    Units,
    check_turns,
    each,
    field_of,
    identity_of,
    key_of,
    message,
    rendered,
    say,
    units_of,
)  # fmt: skip
from pipelines.prepare.formats.tools import call, calls_of, check_learnt, joined, with_tools
from trainer.recipe import Source

KIND, RENDERING = "instruction", "chat"
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "tool_call": "call",
    "tool_response": "tool",
}
UNITS: dict[str, Units] = {"real": "pixels", "norm1": "unit"}
_PIECES = re.compile(r"(<image>|<video>|<ref-object>|<bbox>)")


def looks(peek: Peek) -> str | None:
    if peek.has("format"):
        return None
    if peek.has("messages"):
        for name in ("objects", "rejected_response", "rejected_messages", "images", "videos"):
            if peek.has(name) and not (peek.has("chosen") or peek.has("prompt")):
                return f"messages with {name} beside them"
    if peek.all("query", "response"):
        return "query and response"
    return "conversation of human and assistant" if isinstance(peek.first("conversation"), list) else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    _refuse(entry)
    media = media_of(entry, media_root)
    things = _Objects(entry.get("objects") or {}, media)
    messages = with_places(joined([_message(item, things) for item in _listed(entry)]))
    chosen, rejected = _pair(entry, messages, things)
    things.finish()
    if chosen:
        messages = messages[:-1]
        check_turns(messages, ends="question")
    else:
        messages = rendered(messages, source)
    return Draft(
        where,
        identity_of(entry, where),
        messages,
        media,
        chosen=chosen,
        rejected=rejected,
        key=key_of(entry),
        units=things.units if entry.get("objects") else units_of(entry),
    )


def _refuse(entry: dict) -> None:
    for name, what in (("audios", "audio"), ("label", "a label (KTO, classification)")):
        if entry.get(name) not in (None, []):
            raise BadRow("unsupported", f"a row without {name}", f"{what}, which no family here takes")


def _listed(entry: dict) -> list[dict]:
    """The turns as role and content."""
    system = str(entry.get("system") or "")
    if "messages" in entry:
        found = list(field_of(entry, "messages"))
    elif "conversation" in entry:
        found = [
            {"role": role, "content": pair[name]}
            for pair in entry["conversation"]
            for role, name in (("user", "human"), ("assistant", "assistant"))
        ]
    else:
        pairs = [*(entry.get("history") or []), [field_of(entry, "query"), field_of(entry, "response")]]
        found = [
            {"role": role, "content": words} for pair in pairs for role, words in zip(ROLES_OF_PAIR, pair, strict=True)
        ]
    if found and found[0].get("role") == "system":
        system = field_of(found.pop(0), "content")
    if not found:
        raise BadRow("wrong-form", "at least one message", "none")
    system = with_tools(system, entry.get("tools"))
    return [{"role": "system", "content": system}, *found] if system else found


ROLES_OF_PAIR = ("user", "assistant")


def _message(item: dict, things: _Objects) -> dict:
    role, content = field_of(item, "role"), item.get("content")
    if role not in ROLES:
        raise BadRow("wrong-form", f"a role of {', '.join(ROLES)}", role)
    check_learnt(item)
    if calls := item.get("tool_calls"):
        words = [_message({"role": role, "content": content}, things)] if content else []
        return joined([*words, calls_of(calls)])[0]
    if not isinstance(content, str):
        raise BadRow("wrong-form", "content: text with <image> and <video>", type(content).__name__)
    if ROLES[role] == "call":
        return call(content)
    return message(ROLES[role], *things.parts(content))


def _pair(entry: dict, messages: list[dict], things: _Objects) -> tuple[list[dict], list[dict]]:
    """(chosen, rejected) of a row that has a rejected answer; else nothing."""
    refused = entry.get("rejected_response")
    if refused is None and entry.get("rejected_messages"):
        refused = _last_of(entry["rejected_messages"], _listed(entry))
    if refused is None:
        return [], []
    if not isinstance(refused, str) or not refused.strip():
        raise BadRow("empty-answer", "a rejected answer with text", repr(refused))
    if messages[-1]["role"] != "assistant":
        raise BadRow("wrong-order", "a last turn from the assistant: the chosen answer", messages[-1]["role"])
    rejected = with_places([_message({"role": "assistant", "content": refused}, things)], messages[:-1])
    if rejected == messages[-1:]:
        raise BadRow("equal-answers", "two different answers", "the same one twice")
    return messages[-1:], rejected


def _last_of(refused: list[dict], listed: list[dict]) -> object:
    """The answer of a rejected conversation, which is the chosen one but for its last turn."""
    spoken = [item for item in refused if item.get("role") != "system"]
    asked = [item for item in listed if item.get("role") != "system"][:-1]
    if [_words(item) for item in spoken[:-1]] not in ([], [_words(item) for item in asked]):
        raise BadRow(
            "unequal-prompts", "rejected_messages that differ in the last message alone", f"{len(refused)} messages"
        )
    return field_of(refused[-1], "content")


def _words(item: dict) -> tuple[object, object]:
    return item.get("role"), item.get("content")


class _Objects:
    """Hands out media, refs and boxes to their placeholders in order."""

    def __init__(self, objects: dict, media: list[MediaRef]):
        self.places = Places(media)
        self.refs, self.boxes = [str(ref) for ref in objects.get("ref") or []], objects.get("bbox") or []
        images = objects.get("image_id") or [0] * len(self.boxes)
        kind = objects.get("bbox_type", "real")
        if kind not in UNITS:
            raise BadRow("wrong-form", f"a bbox_type of {' or '.join(UNITS)}", kind)
        self.units: Units = UNITS[kind]
        if len(images) != len(self.boxes):
            raise BadRow("wrong-form", f"an image_id for each of {len(self.boxes)} boxes", len(images))
        self.images = images
        self.next_ref = self.next_box = 0
        self.last = ""
        """The ref that a box without one of its own is of."""

    def parts(self, content: str) -> list[dict]:
        """Text with placeholders as parts."""
        parts: list[dict] = []
        named: str | None = None  # a ref whose place may follow
        pieces = [piece for piece in _PIECES.split(content) if piece]
        for number, piece in enumerate(pieces):
            if piece == "<ref-object>":
                named = self._ref()
                if pieces[number + 1 : number + 2] != ["<bbox>"]:
                    say(parts, named)
                    self.last, named = named, None
            elif piece == "<bbox>":
                self._add(parts, self._box(named or self.last))
            elif piece in ("<image>", "<video>"):
                parts.append(self.places.take("image" if piece == "<image>" else "video"))
            else:
                named = None
                before, after = parts and parts[-1]["part"] in ("image", "video"), pieces[number + 1 : number + 2]
                piece = piece.removeprefix("\n") if before else piece
                piece = piece.removesuffix("\n") if after and after[0] in ("<image>", "<video>") else piece
                say(parts, piece)
        return parts

    def _ref(self) -> str:
        self.next_ref += 1
        if self.next_ref > len(self.refs):
            raise BadRow("placeholder-without-object", f"{self.next_ref} entries in objects.ref", len(self.refs))
        return self.refs[self.next_ref - 1]

    def _box(self, label: str) -> dict:
        self.next_box += 1
        if self.next_box > len(self.boxes):
            raise BadRow("placeholder-without-object", f"{self.next_box} entries in objects.bbox", len(self.boxes))
        numbers = [float(value) for value in self.boxes[self.next_box - 1]]
        if len(numbers) not in (2, 4):
            raise BadRow("wrong-form", "a box of four numbers or a point of two", numbers)
        at = {"shape": "point", "xy": numbers} if len(numbers) == 2 else {"shape": "box", "xyxy": numbers}
        pictures = self.places.of_kind["image"]
        image = self.images[self.next_box - 1]
        if not isinstance(image, int) or not 0 <= image < len(pictures):
            raise BadRow("wrong-form", f"an image_id below {len(pictures)}", image)
        return {"media": pictures[image], "object": {"label": label, "at": at}}

    @staticmethod
    def _add(parts: list[dict], found: dict) -> None:
        """To the objects just before, when they are of the same picture."""
        form = "any" if found["object"]["label"] else "plain"
        same = {"part": "objects", "media": found["media"], "form": form}
        if parts and all(parts[-1].get(name) == value for name, value in same.items()):
            parts[-1]["objects"].append(found["object"])
        else:
            parts.append({**same, "objects": [found["object"]]})

    def finish(self) -> None:
        self.places.finish()
        for name, used, listed in (("ref", self.next_ref, self.refs), ("bbox", self.next_box, self.boxes)):
            if used != len(listed):
                place = "<ref-object>" if name == "ref" else "<bbox>"
                raise BadRow("object-without-placeholder", f"{len(listed)} placeholders {place}", f"{used} of them")

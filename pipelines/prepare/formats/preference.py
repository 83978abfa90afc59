"""Preference pairs, one an entry, in the public forms:
LLaMA-Factory ranking   {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}, "images": [...]}
TRL                     {"prompt": [messages] | text, "chosen": [message] | text, "rejected": ..., "images": [...]}
                        without `prompt` it is what the conversations `chosen` and `rejected` have in common at their
                        beginning; with it, answers that begin by repeating it (UltraFeedback) are read without that;
                        {"type": "image"} in a message is the next of `images`
RLAIF-V                 {"question": text, "chosen": text, "rejected": text, "image"}: pictures before the question
                        where it has no <image>
An answer is one message of the assistant: a longer continuation is refused, as nothing says which turn is preferred.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from pipelines.prepare.formats.answers import with_places
from pipelines.prepare.formats.llava import media_of, turns
from pipelines.prepare.formats.openai import conversation_message, told_tools
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    PLACEHOLDER,
    BadRow,
    Draft,
    Places,
    Row,
    check_turns,
    each,
    field_of,
    identity_of,
    message,
    text,
    units_of,
)  # fmt: skip
from trainer.recipe import Source

KIND, RENDERING = "preference", "chat"
ASKED = ("prompt", "messages", "question")


def looks(peek: Peek) -> str | None:
    if not peek.all("chosen", "rejected") or peek.has("conversations") or peek.has("instruction"):
        return None
    return "chosen and rejected" if any(map(peek.has, ASKED)) or _implicit(peek) else None


def _implicit(peek: Peek) -> bool:
    return all(isinstance(peek.first(name), list) for name in ("chosen", "rejected"))


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    media = media_of(entry, media_root)
    places = Places(media)
    given = {name: field_of(entry, name) for name in ("chosen", "rejected")}
    if "conversations" in entry:
        prompt = turns(entry, places)
    else:
        asked, given = _asked(_with_prompt(entry, places), given)
        prompt = [conversation_message(item, media, places, media_root) for item in asked]
    places.finish()
    prompt = with_places(told_tools(prompt, entry.get("tools")))
    check_turns(prompt, ends="question")
    chosen, rejected = (with_places(_answer(given[name]), prompt) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("equal-answers", "two different answers", "the same one twice")
    identity = identity_of(entry, where)
    return Draft(where, identity, prompt, media, chosen=chosen, rejected=rejected, units=units_of(entry))


def _with_prompt(entry: dict, places: Places) -> dict:
    """A row whose prompt is called a question as one with a prompt, its media at their places."""
    if not isinstance(asked := entry.get("question"), str) or any(entry.get(name) is not None for name in ASKED[:2]):
        return entry
    shown = "" if PLACEHOLDER.search(asked) else "".join(f"<{item.kind}>" for item in places.media)
    return {**entry, "prompt": f"{shown}{asked}"}


def _asked(entry: dict, given: dict) -> tuple[list[dict], dict]:
    """The prompt's messages, and the answers without it."""
    if not any(entry.get(name) is not None for name in ASKED):
        if not all(isinstance(answer, list) for answer in given.values()):
            expected = "a prompt or question, or conversations as chosen and rejected"
            raise BadRow("wrong-form", expected, f"fields {sorted(entry)}")
        pairs = zip(given["chosen"], given["rejected"], strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if any(len(answer) <= same for answer in given.values()):
            raise BadRow("equal-answers", "two different answers", "the same conversation twice")
        return given["chosen"][:same], {name: answer[same:] for name, answer in given.items()}
    value = field_of(entry, "prompt", "messages")
    asked = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(asked, list) or not asked:
        raise BadRow("wrong-form", "text or a list of messages", type(asked).__name__)
    return asked, {name: _without(asked, answer) for name, answer in given.items()}


def _without(asked: list[dict], answer: Any) -> Any:
    """An answer that is a conversation, without the prompt where it begins with that."""
    if isinstance(answer, list) and len(answer) > len(asked) and answer[: len(asked)] == asked:
        return answer[len(asked) :]
    return answer


def _answer(value: object) -> list[dict]:
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRow("wrong-form", "one message as an answer", f"{len(value)} of them")
        value = value[0]
    if isinstance(value, dict):
        if (speaker := value.get("from") or value.get("role")) not in (None, "gpt", "assistant"):
            raise BadRow("wrong-order", "an answer from the assistant", speaker)
        value = field_of(value, "value", "content")
    if isinstance(value, list) and value and all(part.get("type") == "text" for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("wrong-form", "the words of an answer", type(value).__name__)
    if not value.strip():
        raise BadRow("empty-answer", "an answer with text", repr(value))
    return [message("assistant", text(value))]

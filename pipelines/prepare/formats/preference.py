"""Preference pairs, one a line, in either public form:
LLaMA-Factory ranking   {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}, "images": [...]}
messages                {"prompt": [messages] | text, "chosen": [messages] | text, "rejected": ..., "images": [...]}
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.llava import media_of, turns
from pipelines.prepare.formats.openai import conversation_message
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Places,
    Row,
    answer_parts,
    check_turns,
    each,
    field_of,
    identity_of,
    message,
    units_of,
)  # fmt: skip
from trainer.recipe import Source


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        media = media_of(entry, media_root)
        places = Places(media)
        if "conversations" in entry:
            prompt = turns(entry, places, len(media))
        else:
            prompt = _messages(field_of(entry, "prompt", "messages"), "user", media, places, media_root)
        places.finish()
        check_turns(prompt, ends="question")
        chosen, rejected = (_answer(field_of(entry, name), media) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise BadRow("equal-answers", "two different answers", "the same one twice")
        identity = identity_of(entry, where)
        return Draft(where, identity, prompt, media, chosen=chosen, rejected=rejected, units=units_of(entry))

    yield from each(path, one)


def _messages(value: object, role: str, media: list[MediaRef], places: Places, root: str) -> list[dict]:
    listed = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed:
        raise BadRow("wrong-form", "text or a list of messages", type(value).__name__)
    return [conversation_message(item, media, places, root) for item in listed]


def _answer(value: object, media: list[MediaRef]) -> list[dict]:
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        if (speaker := value.get("from") or value.get("role")) not in (None, "gpt", "assistant"):
            raise BadRow("wrong-order", "an answer from the assistant", speaker)
        value = field_of(value, "value", "content")
    if not isinstance(value, str):
        raise BadRow("wrong-form", "the words of an answer", type(value).__name__)
    if not value.strip():
        raise BadRow("empty-answer", "an answer with text", repr(value))
    return [message("assistant", *answer_parts(value, len(media)))]

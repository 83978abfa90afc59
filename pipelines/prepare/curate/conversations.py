"""A sample as a conversation: what is asked, what is answered, and both as a judge is shown them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.prepare.curate.asking import picture_part
from trainer.curation import Judge
from trainer.data import media as images
from trainer.data.sample import Action, Message, Objects, Part, Sample, Text

ANSWERING = ("assistant", "document")
NAMES = {"system": "System", "user": "Question", "tool": "Tool", "assistant": "Answer", "document": "Document"}


def turns_of(sample: Sample) -> tuple[Message, ...]:
    """What is trained on, in order; of a preference the chosen answer."""
    return (*sample.messages, *sample.chosen)


def text_of_part(part: Part) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Objects):
        return "\n".join(item.content or item.label for item in part.objects)
    if isinstance(part, Action):
        return json.dumps({"action": part.action, **part.arguments}, ensure_ascii=False)
    return ""


def text_of_message(message: Message) -> str:
    return "\n".join(text for part in message.parts if (text := text_of_part(part)).strip())


def questions_of(sample: Sample) -> list[str]:
    return [text_of_message(message) for message in turns_of(sample) if message.role == "user"]


def answers_of(sample: Sample) -> list[str]:
    return [text_of_message(message) for message in turns_of(sample) if message.role in ANSWERING]


def media_kinds(sample: Sample) -> set[str]:
    return {file.kind for file in sample.media}


def shown(
    turns: Iterable[Message], files: Sequence[bytes], prompt: str, judge: Judge, *, pictures: bool = True
) -> list[dict[str, Any]]:
    """The prompt, then the conversation with its speakers and images in order; what does not fit is cut, and said to
    be. A video is named only: judges read pictures. `pictures`: whether they are sent, or named likewise.

    Raises:
        MediaError: an image cannot be decoded.
    """
    content: list[dict[str, Any]] = []
    room, sent = judge.max_characters, 0
    for message in turns:
        content.append({"type": "text", "text": f"{NAMES[message.role]}:"})
        for part in message.parts:
            if part.part == "image" and pictures and sent < judge.max_images:
                content.append(picture_part(images.upright(files[part.media]), judge))
                sent += 1
            elif part.part in ("image", "video"):
                content.append({"type": "text", "text": f"[{'an image' if part.part == 'image' else 'a video'}]"})
            elif text := text_of_part(part):
                if len(text) > room:
                    text = text[:room] + " [the rest is cut]" if room else ""
                room = max(0, room - len(text))
                content += [{"type": "text", "text": text}] if text else []
    return [{"role": "system", "content": prompt}, {"role": "user", "content": content}]

"""A picture and words about it, one an entry: {"image" | "images", "caption" | "text"}, or with "question" and "answer"
| "answers" (the first one is taken; of VQAv2's, the most frequent). What web-scale caption sets and many tables on a
hub come down to, with their ways to say it:

several captions     {"caption": [...]} (Flickr30k): all of them
choices              {"options" | "choices"} beside the question (MMMU, ScienceQA), or columns A, B, ... (choices.py)
several questions    {"images", "texts": [{"user", "assistant"}]} (the_cauldron, FineVision): turns of one conversation
pictures by number   {"image_1", "image_2"} and <image 1> in the question (MMMU)
a folder of pictures {"file_name", "text"} in its metadata.jsonl (Hugging Face's ImageFolder)

As a document the words follow their picture; in a chat a caption answers the request for a description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.prepare.formats.answers import with_places
from pipelines.prepare.formats.choices import ANSWERS, Shown, question_and_answer
from pipelines.prepare.formats.llava import media_of
from pipelines.prepare.formats.peek import IMAGES as ENDINGS
from pipelines.prepare.formats.peek import VIDEOS, Peek, ending_of
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    each,
    field_of,
    identity_of,
    key_of,
    message,
    resolve,
    say,
    text,
    units_of,
)
from trainer.recipe import Source

KIND, RENDERING = "caption", "document"
QUESTION = "Describe the picture."
AGAIN = "Describe it in other words."
IMAGES = ("image", "images")
NUMBERED = re.compile(r"image_(\d+)")
Turn = tuple[str | None, str]
"""A question and its answer, or a caption."""


def looks(peek: Peek) -> str | None:
    if _is_dialogue(peek.first("texts")):
        return "texts of user and assistant"
    if peek.has("texts") or peek.all("chosen", "rejected") or not _shows(peek):
        return None
    if peek.has("question"):
        return "image and question" if any(map(peek.has, ANSWERS)) else None
    return next((f"image and {name}" for name in ("caption", "text") if _words(peek.first(name))), None)


def _shows(peek: Peek) -> bool:
    if any(map(peek.has, IMAGES)) or any(NUMBERED.fullmatch(name) for entry in peek.entries for name in entry):
        return True
    return ending_of(peek.first("file_name")) in (*ENDINGS, *VIDEOS)


def _words(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _is_dialogue(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and {"user", "assistant"} <= {*value[0]}
    )


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    media = _media(entry, media_root)
    if not media and not _is_dialogue(entry.get("texts")):
        raise BadRow("wrong-form", f"a field {' or '.join(IMAGES)}", f"fields {sorted(entry)}")
    turns = _turns(entry)
    shown = Shown(media)
    asked = [shown.split(question) if question is not None else [] for question, _ in turns]
    asked[0] = [*shown.first(), *asked[0]]
    messages = []
    for number, (question, words) in enumerate(turns):
        wish = [] if question is not None else [text(AGAIN if number else QUESTION)]
        messages += [message("user", *asked[number], *wish), message("assistant", text(words))]
    messages = with_places(messages)
    if source.rendering == "document":
        answers = [item["parts"] for item in messages[1::2]]
        messages = [message("document", *_document(turns, asked, answers))]
    return Draft(where, identity_of(entry, where), messages, media, key=key_of(entry), units=units_of(entry))


def _document(turns: list[Turn], asked: list[list[dict]], answers: list[list[dict]]) -> list[dict]:
    """Everything in order, a question, an answer and a caption on lines of their own."""
    parts: list[dict] = []
    for number, (question, _) in enumerate(turns):
        if number:
            parts.append(text("\n"))
        parts += asked[number]
        if question is not None:
            say(parts, "\n")
        parts += answers[number]
    return parts


def _media(entry: dict, root: str) -> list[MediaRef]:
    """Those of image(s) and video(s); else image_1, image_2, ...; else the file of the entry."""
    found = media_of(entry, root)
    if found:
        return found
    numbered = sorted((int(name[6:]), name) for name in entry if NUMBERED.fullmatch(name) and entry[name] is not None)
    if numbered:
        if [number for number, _ in numbered] != list(range(1, len(numbered) + 1)):
            raise BadRow("wrong-form", "image_1, image_2, ... without a gap", ", ".join(name for _, name in numbered))
        return [ref for _, name in numbered for ref in media_of({"image": entry[name]}, root)]
    if (ending := ending_of(entry.get("file_name"))) in (*ENDINGS, *VIDEOS):
        return [MediaRef(resolve(root, entry["file_name"]), "image" if ending in ENDINGS else "video")]
    return []


def _turns(entry: dict) -> list[Turn]:
    """At least one. Raises BadRow: no words."""
    listed = entry.get("texts")
    if listed is not None and _is_dialogue(listed):
        return [(str(field_of(item, "user")), _said(field_of(item, "assistant"))) for item in listed]
    if entry.get("question"):
        asked, words = question_and_answer(entry)
        return [(asked, _said(words))]
    found = field_of(entry, "caption", "text")
    return [(None, _said(words)) for words in (found if isinstance(found, list) and found else [found])]


def _said(words: object) -> str:
    if not isinstance(words, str) or not words.strip():
        raise BadRow("empty-text", "words about the picture", repr(words))
    return words

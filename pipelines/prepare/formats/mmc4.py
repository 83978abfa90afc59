"""Interleaved documents as MMC4 writes them, one a line: {"text_list": [sentence, ...], "image_info": [{"image_name" |
"raw_url", "matched_text_index", "matched_sim"}, ...], "url"}. A picture stands before the sentence that it was matched
with (the order of the released training code); several of one sentence in the order of the list.

Pictures have the name `image_name` below the media folder, as its downloader stores them; without one, `raw_url` is
read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    each,
    field_of,
    identity_of,
    message,
    resolve,
    say,
)
from trainer.recipe import Source

KIND, RENDERING = "interleaved", "document"


def looks(peek: Peek) -> str | None:
    return "text_list and image_info" if peek.all("text_list", "image_info") else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    sentences = field_of(entry, "text_list")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadRow("wrong-form", "text_list: a list of sentences", type(sentences).__name__)
    shown: dict[int, list[str]] = defaultdict(list)
    for image in entry.get("image_info") or []:
        place = field_of(image, "matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            raise BadRow("wrong-form", f"a matched_text_index below {len(sentences)}", place)
        shown[place].append(resolve(media_root, field_of(image, "image_name", "raw_url")))
    parts: list[dict] = []
    media: list[MediaRef] = []
    for place, sentence in enumerate(sentences):
        for uri in shown[place]:
            media.append(MediaRef(uri, "image"))
            parts.append({"part": "image", "media": len(media) - 1})
        if sentence.strip():
            between = " " if parts and parts[-1]["part"] == "text" else ""
            say(parts, between + sentence)
    if not any(part["part"] == "text" for part in parts):
        raise BadRow("empty-text", "at least one sentence", sentences[:3])
    return Draft(where, identity_of(entry, where), [message("document", *parts)], media)

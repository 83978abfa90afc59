"""Plain text (JSONL): READMEs, licences and manuals of packages, cut at paragraphs; and icons described in words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.prepare.corpus.draw import COLOURS, MOVES, PLACES, article
from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.sources import Split

CHUNK_CHARS = 700


def write_texts(folder: Folder, split: Split, found: Ingredients) -> None:
    rng = folder.rng("text", split)
    rows = [
        {"id": f"{file.file.path}#{number}", "text": chunk, "source": file.file.path}
        for file in found.texts
        for number, chunk in enumerate(chunks(file.text, CHUNK_CHARS))
    ]
    rng.shuffle(rows)
    folder.jsonl("text", split, rows[: folder.count(700 if split == "train" else 64, 16)])


def write_descriptions(folder: Folder, split: Split, found: Ingredients) -> None:
    """Text alone about one icon, in three to five sentences that all name its colour. A language model learns from it
    that what was said before matters for what comes next; without that a frozen one could not use a picture either."""
    rng = folder.rng("descriptions", split)
    rows = []
    for number in range(folder.count(3000 if split == "train" else 64, 16)):
        colour, name, place = rng.choice(list(COLOURS)), rng.choice(found.icons).name, rng.choice(list(PLACES))
        label, start, lasting = f"{colour} {name}", rng.randrange(4) / 2, rng.randint(1, 3) / 2
        moving = f"moves {rng.choice(list(MOVES))} between {start:.1f} and {start + lasting:.1f} seconds"
        sentences = [
            f"the icon is {colour}.",
            f"there is {article(label)} {place}.",
            f"what colour is the icon? {colour}",
            f"{article(label)}.",
            f"{article(label)} {place}.",
            f"{article(label)} {moving}.",
            f"find the {label}.",
        ]
        rng.shuffle(sentences)
        rows.append({"id": f"description-{split}-{number:05d}", "text": " ".join(sentences[: rng.randint(3, 5)])})
    folder.jsonl("descriptions", split, rows)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of prose: badges, links, tables and rules of markdown and reStructuredText are left out."""
    found = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        clean = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]*)\s*<[^>]*>`_+", r"\1\2", block)
        clean = re.sub(r"<[^>]+>|https?://\S+|[*_`#=~^|]{2,}|^\s*[-*#>|.]+\s", " ", clean, flags=re.MULTILINE)
        clean = re.sub(r"\s+", " ", clean).strip()
        letters = sum(char.isalpha() or char == " " for char in clean)
        if len(clean) >= 40 and letters / len(clean) > 0.85 and clean.isascii():
            found.append(clean)
    return found


def chunks(text: str, size: int) -> Iterator[str]:
    """Whole paragraphs together, up to about `size` characters; a longer paragraph is cut between words."""
    at = ""
    for paragraph in paragraphs(text):
        for part in _cut(paragraph, size):
            if at and len(at) + len(part) > size:
                yield at
                at = ""
            at = f"{at}\n\n{part}" if at else part
    if len(at) >= 40:
        yield at


def _cut(paragraph: str, size: int) -> Iterator[str]:
    while len(paragraph) > size:
        end = paragraph.rfind(" ", 0, size)
        end = end if end > 0 else size
        yield paragraph[:end]
        paragraph = paragraph[end:].strip()
    yield paragraph

"""What curation looks at in a sample: its text, its words, its images. Pure."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

from trainer.data.sample import Objects, Sample, Text, parts_of
from trainer.resolve import digest

# Scripts that do not separate words: a character is a word there.
WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    r"|[^\s\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+"
)


def text_of(sample: Sample) -> str:
    """Text parts and what stands inside objects (their labels where nothing does), one a line, in reading order."""
    found: list[str] = []
    for part in parts_of(sample):
        if isinstance(part, Text):
            found.append(part.text)
        elif isinstance(part, Objects):
            found += [item.content if item.content else item.label for item in part.objects]
    return "\n".join(text for text in found if text.strip())


def texts_beside_images(sample: Sample) -> tuple[str, str]:
    """(text parts, text inside objects and captions that files brought as alt text or tags in meta)."""
    own = "\n".join(part.text for part in parts_of(sample) if isinstance(part, Text))
    inside = [
        item.content or item.label for part in parts_of(sample) if isinstance(part, Objects) for item in part.objects
    ]
    for name in ("alt", "alt_text", "ocr", "tags", "caption"):
        value = sample.meta.get(name)
        inside += [value] if isinstance(value, str) else [str(item) for item in value or []]
    return own, "\n".join(inside)


def words_of(text: str) -> list[str]:
    return WORD.findall(text)


@lru_cache(maxsize=65536)
def _bare(word: str) -> str:
    return regex.sub(r"[^\p{L}\p{N}]", "", word)


def shingle_words(text: str) -> list[str]:
    """Words for comparing texts: NFKC, lower case, letters and digits only."""
    return [bare for word in words_of(unicodedata.normalize("NFKC", text).lower()) if (bare := _bare(word))]


def content_digest(sample: Sample) -> str:
    """sha256 of what a sample says and shows: not its id, source, split, scores, meta, or where its files came from."""
    content = sample.model_dump(mode="json", include={"kind", "messages", "chosen", "rejected", "key"})
    return digest({**content, "media": [media.digest for media in sample.media]})

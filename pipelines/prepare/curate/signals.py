"""Statistics of one sample that the cleaning filters compare with their thresholds: text as Gopher and C4 publish it,
images from the sizes in the headers. Pure: sample in, numbers out; nothing is decoded.

A share of an empty text is 0: what has no text is left to min_words and min_images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from urllib.parse import urlsplit

import regex

from pipelines.prepare.curate.content import text_of, words_of
from trainer import storage
from trainer.data.sample import Sample, from_json
from trainer.errors import DataError

VERSION = 1
"""Raised when the same sample gives other signals than before: columns are computed again."""
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("-", "*", "•", "‣", "◦", "·", "▪", "●")
ELLIPSES = ("...", "…")
TERMINAL = regex.compile(r"""[.!?…。！？؟।"'”’»）)\]:;]\s*$""")
SENTENCE = regex.compile(r"[.!?…]+(?=[\s\"'”’)\]]|$)|[。！？؟।]+")
URL = regex.compile(r"\bhttps?://[^\s<>\"')\]]+", regex.IGNORECASE)
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)


@dataclass(frozen=True)
class Lists:
    """The word and domain lists that a source is cleaned with."""

    blocked_words: frozenset[str]
    blocked_urls: frozenset[str]
    boilerplate: tuple[str, ...]


def shipped(name: str) -> list[str]:
    return lines_of((resources.files("pipelines.prepare.curate") / "lists" / name).read_text(encoding="utf-8"))


def lines_of(text: str) -> list[str]:
    """Entries of a list file: lower case, comments and empty lines left out."""
    lines = (line.partition("#")[0].strip().lower() for line in text.splitlines())
    return sorted({" ".join(line.split()) for line in lines if line})


@lru_cache(maxsize=8)
def lists(words: str | None, urls: str | None) -> Lists:
    """Raises DataError: a list that the recipe names is not there or is no text."""

    def entries(uri: str | None, name: str) -> list[str]:
        if uri is None:
            return shipped(f"{name}.txt")
        try:
            return lines_of(storage.read_bytes(uri).decode("utf-8-sig"))
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
            do = f"check the path in clean.{name}: a UTF-8 file with one entry a line"
            raise DataError("a list cannot be read", where=uri, got=f"{type(error).__name__}: {error}", do=do) from None

    return Lists(
        frozenset(entries(words, "blocked_words")),
        frozenset(entries(urls, "blocked_urls")),
        tuple(shipped("boilerplate.txt")),
    )


@lru_cache(maxsize=1)
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability) of the first 4000 characters; ("", 0) of a text without letters."""
    if not regex.search(r"\p{L}", text):
        return "", 0.0
    code, probability = _identifier().classify(URL.sub(" ", text[:4000]))
    return str(code), float(probability)


def signals_row(text: str, *, words: str | None, urls: str | None) -> tuple[str, list[bytes]]:
    """A row function of pipelines/prepare/engine.py: a sample's JSON in, its signals as JSON out."""
    return json.dumps(signals(from_json(text), lists(words, urls))), []


def signals(sample: Sample, known: Lists) -> dict[str, float | str]:
    text = text_of(sample)
    code, probability = language_of(text)
    found: dict[str, float | str] = {"language": code, "language_probability": probability}
    return (
        found | text_signals(text, known) | {"blocked_urls": blocked_urls(sample, text, known)} | image_signals(sample)
    )


# ---------------------------------------------------------------- text


def text_signals(text: str, known: Lists) -> dict[str, float]:
    words = words_of(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lower = text.lower()
    found = {
        "characters": len(text),
        "words": len(words),
        "mean_word_length": _share(sum(map(len, words)), len(words)),
        "symbol_ratio": _share(text.count("#") + sum(text.count(mark) for mark in ELLIPSES), len(words)),
        "bullet_lines": _of(lines, lambda line: line.startswith(BULLETS)),
        "ellipsis_lines": _of(lines, lambda line: line.endswith(ELLIPSES)),
        "alphabetic_words": _of(words, lambda word: any(map(str.isalpha, word))),
        "stop_words": len(STOP_WORDS & set(lower.split())),
        "sentences": len(SENTENCE.findall(text)),
        "terminal_lines": _of(lines, lambda line: TERMINAL.search(line) is not None),
        "boilerplate_lines": _of(lines, lambda line: any(phrase in line.lower() for phrase in known.boilerplate)),
        "placeholder_text": lower.count("lorem ipsum"),
        "braces": text.count("{") + text.count("}"),
        "blocked_words": blocked_words(lower, known.blocked_words),
    }
    paragraphs = [part.strip() for part in regex.split(r"\n\s*\n", text) if part.strip()]
    found |= _said_before("line", "lines", lines) | _said_before("paragraph", "paragraphs", paragraphs)
    bare = [word.lower() for word in words]
    found |= {f"top_ngram_{n}": top_ngram(bare, n) for n in TOP_NGRAMS}
    return found | {f"duplicate_ngram_{n}": duplicate_ngram(bare, n) for n in DUPLICATE_NGRAMS}


def _share(count: float, whole: float) -> float:
    return count / whole if whole else 0.0


def _of(items: Sequence[str], test) -> float:
    return _share(sum(map(bool, map(test, items))), len(items))


def _said_before(one: str, many: str, items: Sequence[str]) -> dict[str, float]:
    seen: set[str] = set()
    count = characters = 0
    for item in items:
        if item in seen:
            count, characters = count + 1, characters + len(item)
        seen.add(item)
    return {
        f"duplicate_{many}": _share(count, len(items)),
        f"duplicate_{one}_characters": _share(characters, sum(map(len, items))),
    }


def _ngrams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def top_ngram(words: Sequence[str], n: int) -> float:
    """Characters in the most frequent n-gram (0 where none comes twice), of all characters in words."""
    counts = Counter(_ngrams(words, n))
    if not counts:
        return 0.0
    most = max(counts.values())
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most) if most > 1 else 0
    return min(1.0, _share(longest * most, sum(map(len, words))))


def duplicate_ngram(words: Sequence[str], n: int) -> float:
    """Characters in words that lie in an n-gram said before, each counted once, of all characters in words."""
    seen: set[tuple[str, ...]] = set()
    covered = bytearray(len(words))
    for start, gram in enumerate(_ngrams(words, n)):
        if gram in seen:
            covered[start : start + n] = b"\1" * n
        seen.add(gram)
    return _share(sum(len(word) for word, mark in zip(words, covered, strict=True) if mark), sum(map(len, words)))


def blocked_words(lower: str, blocked: frozenset[str]) -> int:
    """Listed words and phrases of up to five words; phrases of scripts without spaces are looked up as they are."""
    words = regex.findall(r"[\p{L}\p{N}]+", lower)
    found = sum(" ".join(gram) in blocked for n in range(1, 6) for gram in _ngrams(words, n) if blocked)
    return found + sum(
        lower.count(entry) for entry in blocked if regex.search(r"[\p{Han}\p{Hiragana}\p{Katakana}]", entry)
    )


def blocked_urls(sample: Sample, text: str, known: Lists) -> int:
    told = " ".join(
        str(value) for name, value in sample.meta.items() if isinstance(value, str) and "url" in name.lower()
    )
    addresses = URL.findall(f"{text} {told}") + [media.origin for media in sample.media if "://" in media.origin]
    return sum(_blocked(address, known.blocked_urls) for address in addresses)


def _blocked(address: str, domains: frozenset[str]) -> bool:
    try:
        host = (urlsplit(address).hostname or "").lower()
    except ValueError:
        return False
    parts = host.split(".")
    return any(".".join(parts[start:]) in domains for start in range(len(parts)))


# ---------------------------------------------------------------- images


def image_signals(sample: Sample) -> dict[str, float]:
    """From header facts; of a sample without images the sides are 0 and no filter of images applies."""
    images = [media for media in sample.media if media.kind == "image"]
    sides = [side for media in images for side in (media.width, media.height)]
    digests = [media.digest for media in images]
    return {
        "images": len(images),
        "image_min_side": min(sides, default=0),
        "image_max_side": max(sides, default=0),
        "image_aspect": max((max(m.width, m.height) / max(1, min(m.width, m.height)) for m in images), default=0.0),
        "repeated_images": _share(len(digests) - len(set(digests)), len(digests)),
    }

"""The four criteria without a model: statistics of text, overlap with alt text, OCR and tags, colours and edges. A
baseline: it sees form, not meaning. Pure.

text_quality                 geometric mean of: words with letters, words not said before, lines without boilerplate,
                             lines that end as sentences do, a plausible length of words and of the text
image_text_relevance         of the words that describe the images (alt text, OCR, tags, labels), those in the text too
image_text_complementarity   of the text's words, those that do not describe the images, times how much the images show
information_balance          the smaller over the larger of: information of the text, information of the images

Information of a text is its different content words; of an image its colours (entropy of 64 bins) times its edges. An
image full of both counts as WORDS_OF_IMAGE words (ours). What cannot be told (no image, one that
cannot be decoded, nothing describes it) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import regex

from pipelines.prepare.curate.content import text_of, texts_beside_images, words_of
from pipelines.prepare.curate.signals import lists, text_signals
from trainer.data import media
from trainer.data.sample import Sample
from trainer.errors import MediaError

VERSION = 1
WORDS_OF_IMAGE = 100
FULL_TEXT = 30
"""Words from which on a text counts as whole."""
SIDE = 64
EDGE = 16
"""Grey levels between neighbours from which on they are an edge."""
FUNCTION_WORDS = frozenset(
    (
        "a", "an", "the", "this", "that", "these", "those", "is", "are", "was", "were", "be",
        "been", "to", "of", "in", "on", "at", "for", "with", "and", "or", "not", "it",
        "its", "as", "by", "from", "there",
    )
)  # fmt: skip
NAN = math.nan


def scores(sample: Sample, files: Sequence[bytes]) -> dict[str, float]:
    """The four criteria, each 0..1 or NaN: where an image cannot be decoded, those of images are."""
    try:
        pictures = [
            picture_information(data, where=file.origin)
            for file, data in zip(sample.media, files, strict=True)
            if file.kind == "image"
        ]
    except MediaError:
        pictures = []
    own, inside = (content_words(text) for text in texts_beside_images(sample))
    shown = sum(pictures)
    return {
        "text_quality": text_quality(text_of(sample)),
        "image_text_relevance": len(own & inside) / len(inside) if inside and pictures else NAN,
        "image_text_complementarity": _complementarity(own, inside, shown) if pictures else NAN,
        "information_balance": _balance(len(own), WORDS_OF_IMAGE * shown) if pictures else NAN,
    }


def content_words(text: str) -> set[str]:
    words = regex.findall(r"[\p{L}\p{N}]+", " ".join(words_of(text.lower())))
    return {word for word in words if word not in FUNCTION_WORDS}


def text_quality(text: str) -> float:
    if not text.strip():
        return 0.0
    found = text_signals(text, lists(None, None))
    said_before = max(found["duplicate_lines"], found["duplicate_ngram_5"], found["top_ngram_2"])
    length = found["mean_word_length"]
    parts = (
        found["alphabetic_words"],
        1 - said_before,
        1 - found["boilerplate_lines"],
        0.5 + 0.5 * found["terminal_lines"],
        1.0 if length <= 10 else 10 / length,
        min(1.0, found["words"] / FULL_TEXT),
        1 / (1 + 5 * found["symbol_ratio"]),
    )
    return float(math.prod(max(part, 0.0) for part in parts) ** (1 / len(parts)))


def picture_information(data: bytes, *, where: object = None) -> float:
    """0..1: entropy of the colours times the share of edges, with a ceiling at a fifth of the pixels. Raises
    MediaError."""
    picture = media.upright(data, where=where)
    picture.thumbnail((SIDE, SIDE))
    pixels = np.asarray(picture, np.int64)
    bins = np.bincount(((pixels[..., 0] // 64) * 16 + (pixels[..., 1] // 64) * 4 + pixels[..., 2] // 64).ravel())
    shares = bins[bins > 0] / bins.sum()
    entropy = float(-(shares * np.log2(shares)).sum()) / 6  # of 64 bins: at most 6 bits
    grey = np.asarray(picture.convert("L"), np.int64)
    steps = [np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)]
    edges = float((np.concatenate(steps) > EDGE).mean()) if grey.size > 1 else 0.0
    return entropy * min(1.0, edges / 0.2)


def _complementarity(own: set[str], inside: set[str], shown: float) -> float:
    return len(own - inside) / len(own) * min(1.0, 2 * shown) if own else 0.0


def _balance(words: float, pictures: float) -> float:
    return min(words, pictures) / max(words, pictures) if max(words, pictures) else 0.0

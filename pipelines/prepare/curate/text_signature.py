"""What two texts are compared by: the set of 5-grams of their words, and the bands of its MinHash.

Daft's MinHash (in Rust) gives 252 minima; 36 bands of 7 become 36 keys. Two texts of Jaccard similarity s share a key
with probability 1 - (1 - s^7)^36: 99.98 % at 0.8, 95 % at 0.7, 0.1 % at 0.2.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.prepare.curate.content import shingle_words
from trainer.data.order import mix

VERSION = 1
NGRAM = 5
NUM_BANDS, BAND_ROWS = 36, 7
SEED = 1


def text_signatures(daft: Any, texts: list[str]) -> list[dict[str, Any]]:
    """shingles: uint64[], sorted, one for each different 5-gram (the whole text where it has fewer words); bands:
    uint64[36], empty for a text without words."""
    words = [shingle_words(text) for text in texts]
    frame = daft.from_pydict({"row": list(range(len(texts))), "text": [" ".join(line) for line in words]})
    minima = daft.functions.minhash(
        frame["text"], num_hashes=NUM_BANDS * BAND_ROWS, ngram_size=NGRAM, seed=SEED, hash_function="xxhash3_64"
    )
    table = frame.select(frame["row"], minima.alias("minima")).to_arrow().sort_by("row")
    found = np.array(table["minima"].to_pylist(), np.uint64).reshape(len(texts), NUM_BANDS, BAND_ROWS)
    bands = band_keys(found)
    return [
        {"shingles": shingles(line), "bands": bands[row].tolist() if line else []} for row, line in enumerate(words)
    ]


def band_keys(values: np.ndarray) -> np.ndarray:
    """uint64[N, B, R] -> uint64[N, B]: equal rows of a band give equal keys, different bands different ones."""
    bands = np.arange(values.shape[1], dtype=np.uint64)
    return mix(bands, *(values[:, :, row] for row in range(values.shape[2])))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def shingles(words: list[str]) -> np.ndarray:
    if not words:
        return np.zeros(0, np.uint64)
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    size = min(NGRAM, len(words))
    num = len(words) - size + 1
    return np.unique(mix(size, *(hashes[start : start + num] for start in range(size))))


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Of two sorted arrays without repeats."""
    if not len(left) or not len(right):
        return 0.0
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / (len(left) + len(right) - both)


SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("digest", pa.string()),
        ("size", pa.int64()),
        ("bands", pa.list_(pa.uint64())),
        ("shingles", pa.list_(pa.uint64())),
    ]
)
"""place: a uid without its folder; digest: of the content; size: characters and pixels, by which one of two is kept."""

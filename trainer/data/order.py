"""Seeded order without state: hashes that are the same in Python, in numpy and on every machine.

Order = f(seed, epoch, sample): no generator is carried along, so nothing has to be restored.
"""

from __future__ import annotations

import hashlib

import numpy as np

U64 = np.uint64


def id_hash(source: str, sample_id: str) -> np.uint64:
    """64 bits of a sample's name: the first 8 bytes of sha256 over `source`, a zero byte and the id."""
    return U64(int.from_bytes(hashlib.sha256(f"{source}\0{sample_id}".encode()).digest()[:8], "little"))


def mix(*keys: int | np.uint64 | np.ndarray) -> np.ndarray:
    """uint64 of the broadcast shape: a well-mixed hash of the keys in this order (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        state = np.zeros((), U64)
        for key in keys:
            state = _splitmix(state ^ np.asarray(key).astype(U64))
        return state


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def unit(values: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of uint64 hashes."""
    return (values >> U64(11)).astype(np.float64) / 2.0**53

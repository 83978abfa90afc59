"""The node cache: one folder for shards and checkpoint objects, named by digest, on a volume that outlives pods.

    folder("shards")                  QWENVL_CACHE_DIR/shards; None: this machine has no node cache
    fetch(uri, path)                  the object into the cache, unless a file of its size is there
    bound(QWENVL_CACHE_DIR)           least recently used files go until the rest is within QWENVL_CACHE_BYTES

A file is only ever a hint: who reads it verifies every byte, and fetches it again when it is gone. So ranks and jobs
share the folder without a lock: a file appears whole by one rename, and removing one that somebody has open or mapped
takes only its name. fsspec's filecache keeps no bound on its size (2026.9), hence these few lines.
"""

from __future__ import annotations

import contextlib
import os
import time

from trainer import storage
from trainer.errors import UsageError

DIR = "QWENVL_CACHE_DIR"
BYTES = "QWENVL_CACHE_BYTES"
YOUNG_S = 60.0
"""What was used this recently stays: somebody may be about to open it."""
LEFT_OVER_S = 24 * 3600.0
"""A temporary file that is this old is of a download that died."""


def root() -> str | None:
    return os.environ.get(DIR) or None


def folder(kind: str) -> str | None:
    """The part of the node cache for one kind of file."""
    base = root()
    return os.path.join(base, kind) if base else None


def limit_bytes() -> int | None:
    """What the cache may grow to on one node; None: no bound is stated.

    Raises:
        UsageError: QWENVL_CACHE_BYTES is not a number of bytes.
    """
    stated = os.environ.get(BYTES)
    if not stated:
        return None
    if not stated.isdecimal() or int(stated) == 0:
        raise UsageError("not a size of the node cache", where=BYTES, expected="a number of bytes above 0", got=stated)
    return int(stated)


def fetch(uri: str, path: str, *, size_bytes: int) -> None:
    """`uri` as the file `path`, marked as used now; downloaded unless it is there with this size.

    Raises:
        FileNotFoundError: there is no such object. StorageError
    """
    try:
        if os.stat(path).st_size == size_bytes:
            os.utime(path)
            return
    except FileNotFoundError:
        pass
    storage.download_file(uri, path)


def bound(base: str, limit: int | None = None, *, now: float | None = None) -> list[str]:
    """Remove least recently used files below `base` until the rest is within `limit` (default: limit_bytes()); what
    was removed. Files used within YOUNG_S stay, so the bound may be passed for as long.

    Safe while others do the same: a file that is gone already counts as removed.
    """
    limit = limit_bytes() if limit is None else limit
    now = time.time() if now is None else now
    found: list[tuple[float, int, str]] = []
    for parent, _, names in os.walk(base):
        for name in names:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    removed = []
    for used, size, path in sorted(found):
        temporary = os.path.basename(path).startswith(storage.TEMPORARY)
        left_over = temporary and now - used > LEFT_OVER_S
        too_much = limit is not None and total > limit and not temporary and now - used > YOUNG_S
        if left_over or too_much:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
            removed.append(path)
    return removed

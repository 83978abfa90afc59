"""Ids that were there before and what they stood for, in memory that does not grow with their number.

Their digests lie in a table on disk that only this process sees (SQLite, in the folder for temporary files); CACHE_KB
of it are held. Considered: a set of digests (110 bytes an id: 11 GB for 100 million), numpy arrays that are sorted now
and then (a quarter of that, and as much again while they are merged), Daft (an id is looked up when its row is read).
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from typing import Literal

from trainer.errors import StorageError

CACHE_KB = 16 * 1024
SET_UP = f"""
pragma journal_mode = off;
pragma synchronous = off;
pragma cache_size = -{CACHE_KB};
create table ids (digest blob primary key, content blob) without rowid;
"""


class Ids:
    """Used by one thread at a time."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.executescript(SET_UP)
        self._database.execute("begin")

    def add(self, identity: str, content: bytes = b"") -> Literal["new", "same", "other"]:
        """Whether it is there for the first time, or was added with the same content, or with another; halves of
        surrogate pairs are letters like any other. `content`: a digest, as short as it may be.

        Raises:
            StorageError: the disk is full.
        """
        found = hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=16).digest()
        try:
            if self._database.execute("insert or ignore into ids values (?, ?)", (found, content)).rowcount == 1:
                return "new"
            [(before,)] = self._database.execute("select content from ids where digest = ?", (found,))
            return "same" if before == content else "other"
        except sqlite3.OperationalError as error:
            do = "free space in the folder for temporary files, or name another with TMPDIR"
            where = tempfile.gettempdir()
            raise StorageError("the table of ids cannot be written", where=where, got=str(error), do=do) from error

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Ids:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Ids are known again, and memory does not grow with their number."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.prepare.ids import Ids
from trainer.errors import StorageError

PROGRAM = """
import sys
from pipelines.prepare.ids import Ids
from tests.memory import resident_kb
known = Ids() if sys.argv[1] == "table" else set()
before = resident_kb()
for number in range(300_000):
    if sys.argv[1] == "table":
        assert known.add(f"row-{number}", b"12345678") == "new"
    else:
        known.add(f"row-{number}".encode().ljust(16))
print((resident_kb() - before) / 1024)
"""


def test_an_id_is_known_the_second_time_whatever_it_is_made_of():
    with Ids() as ids:
        for identity in ("a", "A", "", "a" * 10_000, "\ud800", "a\x00", "雪"):
            added = [ids.add(identity, content) for content in (b"1", b"1", b"2", b"1")]
            assert added == ["new", "same", "other", "same"], repr(identity)


def test_a_full_disk_is_told():
    with Ids() as ids, pytest.raises(StorageError, match="TMPDIR"):
        ids._database.execute("pragma max_page_count = 2")  # SQLite says of it what it says of a full disk
        for number in range(10_000):
            ids.add(f"row-{number}")


def test_memory_does_not_grow_with_their_number():
    """Negative control: a set of as many digests."""
    table, held = (
        float(subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("table", "set")
    )
    assert table < 22 < held, f"{table} and {held} MB"

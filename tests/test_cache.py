"""The node cache: bounded, least recently used, safe for processes that share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import cache, storage
from trainer.errors import UsageError

NOW = 1_000_000.0


def a_file(path: Path, *, size: int = 100, used: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


def test_the_least_recently_used_files_go_first_whatever_their_kind(tmp_path: Path) -> None:
    old = a_file(tmp_path / "shards" / "old.tar", used=NOW - 300)
    middle = a_file(tmp_path / "checkpoint" / "middle", used=NOW - 200)
    new = a_file(tmp_path / "shards" / "new.tar", used=NOW - 100)
    assert cache.bound(str(tmp_path), 300, now=NOW) == []
    assert cache.bound(str(tmp_path), 200, now=NOW) == [str(old)]
    assert cache.bound(str(tmp_path), 1, now=NOW) == [str(middle), str(new)]


def test_what_was_used_just_now_and_what_is_being_written_stay(tmp_path: Path) -> None:
    young = a_file(tmp_path / "young", used=NOW - 5)
    writing = a_file(tmp_path / f"{storage.TEMPORARY}1-a", used=NOW - 3600)
    died = a_file(tmp_path / f"{storage.TEMPORARY}2-b", used=NOW - cache.LEFT_OVER_S - 1)
    assert cache.bound(str(tmp_path), 1, now=NOW) == [str(died)]
    assert young.exists() and writing.exists()


def test_fetching_marks_a_file_as_used_and_downloads_only_what_is_not_whole(tmp_path: Path) -> None:
    origin, path = a_file(tmp_path / "origin", used=NOW), tmp_path / "cache" / "name"
    cache.fetch(str(origin), str(path), size_bytes=100)
    os.utime(path, (NOW, NOW))
    origin.write_bytes(b"y" * 100)
    cache.fetch(str(origin), str(path), size_bytes=100)
    assert path.read_bytes() == b"x" * 100 and path.stat().st_mtime > NOW
    path.write_bytes(b"cut off")
    cache.fetch(str(origin), str(path), size_bytes=100)
    assert path.read_bytes() == b"y" * 100


def test_processes_that_bound_the_same_folder_do_not_trip_over_each_other(tmp_path: Path) -> None:
    for number in range(400):
        a_file(tmp_path / f"{number:03d}", used=NOW + number)
    code = f"from trainer import cache; cache.bound({str(tmp_path)!r}, 1000)"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{number:03d}" for number in range(390, 400)]


def test_a_size_that_is_none_is_refused_and_none_stated_is_no_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cache.BYTES, raising=False)
    kept = a_file(tmp_path / "kept", used=NOW - 999)
    assert cache.limit_bytes() is None and cache.bound(str(tmp_path), now=NOW) == [] and kept.exists()
    monkeypatch.setenv(cache.BYTES, "100Gi")
    with pytest.raises(UsageError, match="100Gi"):
        cache.limit_bytes()

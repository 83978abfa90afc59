"""A folder and a real S3 server behave alike."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare import swap
from tests.state.weed import s3
from trainer import storage, tries
from trainer.errors import StorageError, UsageError

__all__ = ["s3"]  # the fixture


@pytest.fixture(params=["folder", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_what_is_written_is_read_listed_and_removed(out: str) -> None:
    storage.write_json(storage.join(out, "a/b.json"), {"z": 1, "a": [None, "é"]})
    storage.write_bytes(storage.join(out, "a/c"), b"0123456789")
    assert storage.read_json(storage.join(out, "a/b.json")) == {"a": [None, "é"], "z": 1}
    assert storage.read_bytes(storage.join(out, "a/c"), 2, 5) == b"234"
    assert storage.list_dir(out) == ["a"]
    assert storage.list_dir(storage.join(out, "a")) == ["b.json", "c"]
    assert storage.list_dir(storage.join(out, "nothing")) == []
    assert storage.size(storage.join(out, "a/c")) == 10
    assert storage.exists(storage.join(out, "a/c"))
    storage.remove(storage.join(out, "a/c"))
    storage.remove(storage.join(out, "a/c"))
    assert not storage.exists(storage.join(out, "a/c"))
    storage.remove_tree(out)
    storage.remove_tree(out)
    assert not storage.exists(storage.join(out, "a/b.json"))
    assert storage.list_dir(storage.join(out, "a")) == []  # SeaweedFS goes on listing the empty folder itself


def test_an_empty_address_is_not_the_root_of_this_machine() -> None:
    with pytest.raises(UsageError, match="an empty address"):
        storage.join("", "a")
    assert (storage.join("/", "a"), storage.join("/"), storage.join("a/", "b/")) == ("/a", "/", "a/b")


def test_a_pattern_names_what_lies_in_an_object_store(out: str) -> None:
    if storage.local_path(out) is not None:
        pytest.skip("glob does it for folders")
    for name in ("a/part-1.jsonl", "a/part-2.jsonl", "b/part-3.jsonl", "a/other.json"):
        storage.write_bytes(storage.join(out, name), b"{}")
    here, everywhere = storage.matching(f"{out}/a/part-*.jsonl"), storage.matching(f"{out}/**/part-*.jsonl")
    assert here == [storage.join(out, f"a/part-{n}.jsonl") for n in (1, 2)]
    assert everywhere == [*here, storage.join(out, "b/part-3.jsonl")]
    assert storage.matching(f"{out}/none-*.jsonl") == []


def test_a_missing_object_is_a_file_not_found(out: str) -> None:
    for call in (storage.read_bytes, storage.size, storage.sha256_of):
        with pytest.raises(FileNotFoundError):
            call(storage.join(out, "none"))


def test_a_missing_bucket_is_no_empty_folder(s3: str) -> None:
    assert s3
    for call in (storage.read_bytes, storage.list_dir, lambda uri: storage.read_each([uri])):
        with pytest.raises(storage.Refused, match="no such bucket"):
            call("s3://no-such-bucket/none")


def test_objects_are_read_at_a_time_and_what_is_gone_is_none(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [storage.join(out, f"each/{number}") for number in range(12)]
    for number, uri in enumerate(uris[:-1]):
        storage.write_bytes(uri, b"%d" % number)
    under_way, most = 0, 0
    if storage.local_path(out) is None:
        before = tries.s3_class()._cat_file

        async def counted(*words: Any, **more: Any) -> bytes:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            try:
                return await before(*words, **more)
            finally:
                under_way -= 1

        monkeypatch.setattr(tries.s3_class(), "_cat_file", counted)
    assert storage.read_each(uris) == [*(b"%d" % number for number in range(11)), None]
    assert storage.read_each([]) == []
    assert most == (0 if storage.local_path(out) is not None else 12)


def test_create_once_creates_once(out: str) -> None:
    uri = storage.join(out, "deep/x")
    assert storage.create_once(uri, b"one") is True
    assert storage.create_once(uri, b"one") is False
    with pytest.raises(FileExistsError, match="other bytes"):
        storage.create_once(uri, b"two")
    assert storage.read_bytes(uri) == b"one"


def test_of_many_writers_exactly_one_creates_and_without_the_condition_many_would(out: str) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        try:
            if storage.create_once(storage.join(out, "race"), b"%d" % number):
                won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(storage.join(out, "race")) == b"%d" % won[0]
    storage.write_bytes(storage.join(out, "race"), b"over")  # the control: a plain write does replace
    assert storage.read_bytes(storage.join(out, "race")) == b"over"


def test_a_large_object_in_parts_is_created_once_too(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 1024**2)
    data, uri = os.urandom(11 * 1024**2), f"{s3}/large"
    assert storage.create_once(uri, memoryview(data))
    with pytest.raises(FileExistsError):
        storage.create_once(uri, memoryview(data[::-1]))
    assert storage.sha256_of(uri) == storage.sha256_bytes(data)


def test_files_go_up_and_come_down(out: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"bytes")
    storage.upload_file(str(tmp_path / "up"), storage.join(out, "remote"))
    storage.download_file(storage.join(out, "remote"), str(tmp_path / "new" / "down"))
    assert (tmp_path / "new/down").read_bytes() == b"bytes"


def test_a_write_that_dies_half_way_leaves_the_old_bytes_and_no_visible_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(str(tmp_path / "x"), b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_an_error_that_passes_is_retried_and_one_that_stays_becomes_a_storage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    failures = [ConnectionResetError("reset")] * 2

    def flaky() -> str:
        if failures:
            raise failures.pop()
        return "ok"

    assert storage._retried(flaky, "s3://b/k", "read") == "ok"
    assert len(waits) == 2

    def broken() -> str:
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="5 tries") as told:
        storage._retried(broken, "s3://b/k", "read")
    assert told.value.code == 146
    assert sum(waits) < 30

    def refused() -> str:
        raise PermissionError("403")

    waits.clear()
    with pytest.raises(StorageError, match="credentials"):
        storage._retried(refused, "s3://b/k", "read")
    assert waits == []


@pytest.mark.parametrize(
    ("uri", "want"),
    [("out/x", "out/x"), ("/a", "/a"), ("file:///a/b", "/a/b"), ("s3://b/k", None)],
)
def test_a_uri_is_local_or_not(uri: str, want: str | None) -> None:
    assert storage.local_path(uri) == want


def test_an_object_that_moves_replaces_what_has_the_name_and_is_gone_where_it_was(out: str) -> None:
    for name, data in (("a", b"new"), ("b", b"old")):
        storage.write_bytes(storage.join(out, "moved", name), data)
    storage.move(storage.join(out, "moved", "a"), storage.join(out, "moved", "b"))
    assert storage.list_dir(storage.join(out, "moved")) == ["b"]
    assert storage.read_bytes(storage.join(out, "moved", "b")) == b"new"
    with pytest.raises(FileNotFoundError):
        storage.move(storage.join(out, "moved", "a"), storage.join(out, "moved", "b"))


def test_new_files_take_the_place_of_a_folders_files_in_either_storage(out: str) -> None:
    folder, last = storage.join(out, "swapped"), ("input.json", "source.json")
    for name in ("00000.tar", "00001.tar", *last):
        storage.write_bytes(storage.join(folder, name), b"old")
    for name in ("00000.tar", *last):
        storage.write_bytes(storage.join(swap.beside(folder), name), b"new")
    assert storage.list_dir(folder) == ["00000.tar", "00001.tar", *last], "what is written beside is not listed"
    swap.settle(folder, last=last)
    assert {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_dir(folder)} == dict.fromkeys(
        ("00000.tar", *last), b"new"
    )
    assert storage.list_dir(swap.beside(folder)) == []

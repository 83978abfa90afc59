"""Logs: rank 0's as a stream, every rank's last lines from storage when pods are gone. Storage is a real folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from k8s import client, logs
from k8s.client import Disconnected
from k8s.logs import Follower
from tests.k8s.bench import Bench, a_record, script
from tests.k8s.memory import MemoryApi
from trainer import storage
from trainer.errors import ClusterError, StorageError


def an_attempt(tmp_path: Path, attempt: int = 1) -> Path:
    folder = tmp_path / "attempts" / f"{attempt:04d}"
    folder.mkdir(parents=True)
    return folder


def a_stage(tmp_path: Path) -> str:
    """Node w-1 left whole logs, node w-0 only its lines of the last minute."""
    folder = an_attempt(tmp_path)
    (folder / "last-lines-w-0.txt").write_text("==> rank0.log\nzero a\nzero b\n==> rank1.log\none a\n")
    (folder / "last-lines-w-1.txt").write_text("==> rank2.log\nold\n==> rank3.log\n")
    (folder / "rank2.log").write_text("".join(f"two {n}\n" for n in range(5000)))
    (folder / "rank3.log").write_text("")
    (folder / "end-w-1.json").write_text(a_record(65, rank=2, node="w-1").model_dump_json())
    (folder / "events.jsonl").write_text("")
    return str(tmp_path)


def test_last_lines_are_of_the_whole_log_where_there_is_one(tmp_path: Path) -> None:
    found, left = logs.last_lines(a_stage(tmp_path), 1)
    assert list(found) == [2, 0, 1, 3] and left == 0, "the rank that failed comes first"
    assert found[0] == ["zero a", "zero b"] and found[1] == ["one a"]
    assert found[2] == [f"two {n}" for n in range(5000 - logs.NUM_LINES, 5000)]


def test_a_tail_is_read_and_not_the_whole_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, read = a_stage(tmp_path), []
    whole = storage.read_bytes

    def counted(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = whole(uri, start, stop)
        read.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    logs.last_lines(stage, 1)
    assert max(read) <= logs.TAIL_BYTES < (tmp_path / "attempts/0001/rank2.log").stat().st_size


def test_they_are_said_with_where_they_come_from_and_failed_ranks_first(tmp_path: Path) -> None:
    said: list[str] = []
    logs.tell_last_lines(a_stage(tmp_path), 1, said.append)
    heads = [line for line in said if line.startswith("==>")]
    assert "last lines of rank 2, attempt 1, from storage" in heads[0]
    assert str(tmp_path) in heads[0] and len(heads) == 4 and "    zero b" in said


def test_of_many_ranks_some_are_said_and_the_others_counted(tmp_path: Path) -> None:
    folder = an_attempt(tmp_path)
    for rank in range(20):
        (folder / f"rank{rank}.log").write_text("x\n")
    said: list[str] = []
    logs.tell_last_lines(str(tmp_path), 1, said.append)
    assert sum(line.startswith("==>") for line in said) == logs.NUM_RANKS
    assert said[-1].startswith(f"({20 - logs.NUM_RANKS} more ranks in ")


@pytest.mark.parametrize("stored", ["logs", "last lines", "both"])
def test_of_512_ranks_few_are_read_and_those_that_failed_are_among_them(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = an_attempt(tmp_path)
    for node in range(64):
        ranks = range(node * 8, node * 8 + 8)
        codes = {rank: 65 if rank == 333 else 144 if node == 41 else 0 for rank in ranks}
        (folder / f"end-w-{node}.json").write_text(a_record(0, codes=codes).model_dump_json())
        if stored != "logs":
            lines = "".join(f"==> rank{rank}.log\nminute of {rank}\n" for rank in ranks)
            (folder / f"last-lines-w-{node}.txt").write_text(lines)
        if stored != "last lines":
            for rank in ranks:
                (folder / f"rank{rank}.log").write_text(f"whole of {rank}\n")
    calls: list[str] = []
    for name in ("list_dir", "read_bytes", "size"):
        call = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda *a, call=call, name=name: calls.append(name) or call(*a))
    said: list[str] = []
    logs.tell_last_lines(str(tmp_path), 1, said.append)
    assert calls.count("list_dir") == 1 and len(calls) <= 1 + 64 + 3 * logs.NUM_RANKS
    word = "minute" if stored == "last lines" else "whole"
    assert f"    {word} of 333" in said and said[-1].startswith("(504 more ranks in ")
    heads = [line for line in said if line.startswith("==>")]
    assert len(heads) == logs.NUM_RANKS and all("rank 32" in head or "rank 33" in head for head in heads)


def test_last_lines_that_storage_does_not_give_are_no_error_but_records_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> list[str]:
        raise StorageError("storage did not answer")

    monkeypatch.setattr(storage, "list_dir", down)
    said: list[str] = []
    logs.tell_last_lines(str(tmp_path), 1, said.append)
    assert "not to be had" in said[0]
    with pytest.raises(StorageError):  # a decision may depend on them
        logs.stored_ends(str(tmp_path), 1)


def test_ends_of_another_attempt_are_not_this_ones(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    assert set(logs.stored_ends(stage, 1)) == {"w-1"}
    (an_attempt(tmp_path, 2) / "end-w-1.json").write_text(a_record(65, attempt=1).model_dump_json())
    assert logs.stored_ends(stage, 2) == {}


def test_a_pod_that_went_unread_is_decided_on_by_what_it_left_in_storage(tmp_path: Path) -> None:
    """The operator removed every pod before anybody read its exit code."""
    bench = Bench()

    def vanish() -> None:
        name = f"{bench.jobs()[0]}-worker-0"
        end = a_record(65, error="MediaError: cut off").model_dump_json()
        (an_attempt(tmp_path) / f"end-{name}.json").write_text(end)
        for key in [key for key in bench.api.objects if key[0] == "pods"]:
            del bench.api.objects[key]
        bench.api.condition("Failed", "worker failed")

    script(bench, lambda: bench.api.pod(0), vanish)
    with pytest.raises(ClusterError, match="MediaError: cut off") as error:
        bench.launch(stage_uri=str(tmp_path))
    assert error.value.code == 65 and bench.created() == 1


# ---------------------------------------------------------------- the stream


def test_a_stream_that_breaks_off_is_taken_up_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "AGAIN_S", 0.01)
    api, left = MemoryApi(), [["one", "two"], ["two", "three"]]

    def log(pod: str, container: str, *, since: str | None = None) -> Iterator[tuple[str, str]]:
        for line in left.pop(0) if left else []:
            yield {"one": "t1", "two": "t2", "three": "t3"}[line], line
        raise Disconnected("reset by peer")

    api.log = log  # type: ignore[method-assign]
    said: list[str] = []
    follower = Follower(api, "pod", "pytorch", said.append).start()
    end = time.monotonic() + 5
    while "three" not in said and time.monotonic() < end:
        time.sleep(0.01)
    follower.stop()
    assert said == ["one", "two", "three"]


def test_a_log_is_followed_to_its_end_over_whatever_breaks_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "AGAIN_S", 0.01)
    api, left = MemoryApi(), [["one"], [], ["one", "two"]]

    def log(pod: str, container: str, *, since: str | None = None) -> Iterator[tuple[str, str]]:
        for line in left.pop(0):
            yield {"one": "t1", "two": "t2"}[line], line
        if left:
            raise Disconnected("no line for 300 s")

    api.log = log  # type: ignore[method-assign]
    said: list[str] = []
    Follower(api, "pod", "pytorch", said.append).follow()
    assert said == ["one", "two"]


def test_a_log_without_line_ends_does_not_grow_in_memory() -> None:
    class Response:
        closed = False

        def stream(self, size: int) -> Iterator[bytes]:
            for _ in range(200):
                yield b"." * 8192
            yield b"\nlast\n"

        def close(self) -> None:
            self.closed = True

    response = Response()
    lines = list(client._lines(response, longest=client.MAX_LINE_BYTES))
    assert max(map(len, lines)) <= client.MAX_LINE_BYTES + 8192 and lines[-1] == b"last\n" and response.closed
    assert sum(map(len, lines)) == 200 * 8192 + 6


def test_the_parts_of_a_line_that_was_cut_keep_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar: what stands in its middle is no time to go on from, and the line after it has its own."""
    stream = b"t1 one\nt2 " + b"\r 50 %" * 40_000 + b"\nt3 three\n"
    chunks = [stream[at : at + 8192] for at in range(0, len(stream), 8192)]
    response = SimpleNamespace(stream=lambda size: iter(chunks), close=lambda: None)
    api = client.KubernetesApi("space", load=MagicMock())
    monkeypatch.setattr(api, "_opened", lambda *_, **__: response)
    found = list(api.log("pod", "pytorch"))
    assert len(found) > 3 and [moment for moment, _ in found] == ["t1", *["t2"] * (len(found) - 2), "t3"]
    assert "".join(text for _, text in found) == "one" + "\r 50 %" * 40_000 + "three"


def test_an_end_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    folder = an_attempt(tmp_path)
    (folder / "end-a.json").write_text("{")
    (folder / "end-b.json").write_text(a_record(65).model_dump_json())
    assert {name: end.code for name, end in logs.stored_ends(str(tmp_path), 1).items()} == {"b": 65}

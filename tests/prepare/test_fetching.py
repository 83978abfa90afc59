"""Media behind web addresses: several at a time, in the order of the rows, and what trying again would not change is
asked for once."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.cli.main import main
from pipelines.prepare import fetching
from tests.prepare.builders import a_picture, write_lines
from trainer import storage, tries
from trainer.data.shards import ShardReader, Source
from trainer.errors import StorageError

NUM_ROWS = 24


class Server:
    """Pictures by number; each answer waits until `together` requests are there, so a client that asks for one at a
    time gets none in time."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.most_at_once, self._now = 0, 0
        self.together = threading.Barrier(4)
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with server._lock:
                    server.paths.append(self.path)
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                kind, number = self.path.strip("/").partition(".")[0].split("-")
                if kind == "silence":
                    self.close_connection = True
                    return
                code, data = (200, a_picture(40 + int(number), 40)) if kind == "good" else (int(kind), b"no")
                with contextlib.suppress(threading.BrokenBarrierError):
                    if code == 200:
                        server.together.wait(5)
                with server._lock:
                    server._now -= 1
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "pause_s", lambda turn, throttled=False: 0.0)


def ingest(folder: Path, urls: list[str], *more: str) -> int:
    rows = [{"id": str(n), "image": url, "caption": f"picture {n}"} for n, url in enumerate(urls)]
    path = write_lines(folder / "rows.jsonl", rows)
    return main(["data", "ingest", str(path), "--out", str(folder / "out"), *more])


def test_pictures_are_fetched_together_and_stay_in_order(server: Server, tmp_path: Path):
    assert ingest(tmp_path, [f"{server.url}/good-{number}.png" for number in range(NUM_ROWS)]) == 0
    assert not server.together.broken and 4 <= server.most_at_once <= fetching.AT_ONCE
    assert len(server.paths) == NUM_ROWS, "each once"
    source = Source.open(str(tmp_path / "out"))
    reader = ShardReader(source)
    for row in range(NUM_ROWS):
        assert source.sample(0, row).id == str(row) and reader.media(0, row) == [a_picture(40 + row, 40)]


@pytest.mark.parametrize("code", [401, 403, 404, 410, 451])
def test_a_refusal_is_asked_for_once(code: int, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    urls = [f"{server.url}/{code}-{number}.png" for number in range(5)]
    assert ingest(tmp_path, urls) == 64
    assert sorted(server.paths) == [f"/{code}-{number}.png" for number in range(5)]
    told = capsys.readouterr()
    assert ("5 missing-media" if code == 404 else "5 unreachable-media") in told.err
    assert (str(code) in told.err) or code == 404
    assert "asked once for each medium" not in told.out, "the host answers"


def test_what_may_pass_is_tried_again(server: Server):
    for code in (429, 500, 503):
        with pytest.raises(StorageError) as error:
            storage.read_bytes(f"{server.url}/{code}-0.png")
        assert not isinstance(error.value, storage.Refused)
        assert server.paths.count(f"/{code}-0.png") == storage.NUM_TRIES


def test_a_host_that_does_not_answer_is_said_once_and_then_asked_once_a_medium(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetching, "AT_ONCE", 1)  # so that they come in order
    assert ingest(tmp_path, [f"{server.url}/silence-{number}.png" for number in range(10)]) == 64
    told = capsys.readouterr()
    assert told.out.count("asked once for each medium") == 1
    shown = re.findall(r"did not read in (\w+ \w+)", told.err)
    assert shown == ["5 tries"] * fetching.FAILURES + ["1 try"] * (len(shown) - fetching.FAILURES)
    assert len(shown) > fetching.FAILURES


def test_an_answer_makes_a_host_one_that_is_tried_again(server: Server):
    host = server.url.removeprefix("http://")
    for _ in range(fetching.FAILURES):
        with pytest.raises(StorageError), fetching.host_of(server.url), tries.at_most(1):
            storage.read_bytes(f"{server.url}/silence-1.png")
    assert fetching._FAILED[host] == fetching.FAILURES
    with contextlib.suppress(StorageError), fetching.host_of(server.url):
        storage.read_bytes(f"{server.url}/403-1.png")
    assert fetching._FAILED[host] == 0
    server.paths.clear()
    for _ in range(2 * fetching.FAILURES):
        with contextlib.suppress(StorageError), fetching.host_of(server.url):
            storage.read_bytes(f"{server.url}/429-1.png")
    assert len(server.paths) == 2 * fetching.FAILURES * storage.NUM_TRIES, "one that asks for patience gets it"


def test_what_is_read_ahead_is_what_waits_for_a_network():
    far = ["https://a/b.png", "s3://a/b.png", "s3://a/t.tar#bytes=0-9"]
    near = ["a/b.png", "/a/t.tar#bytes=0-9", "s3://a/t.parquet#cell=0/1/image", "data:image/png;base64,AA"]
    assert all(map(fetching.is_remote, far)) and not any(map(fetching.is_remote, near))


def test_a_port_that_nobody_listens_at_is_a_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert ingest(tmp_path, [f"http://127.0.0.1:{port}/{number}.png" for number in range(6)]) == 64
    told = capsys.readouterr()
    assert "6 unreachable-media" in told.err and told.out.count("did not answer") == 1

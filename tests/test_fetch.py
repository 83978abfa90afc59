"""Fetching from a hub: a real HTTP server that answers like one, with range requests and cut connections."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import fetch
from trainer.errors import DataError, RecipeError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 4096 * 12  # 12 MiB: more than one of the client's chunks
FILES = {"config.json": b'{"model_type": "qwen2_5_vl"}', "model.safetensors": LARGE, "pytorch_model.bin": b"pickle"}


@dataclass
class Hub:
    """A hub with one model, alice/tiny, whose large file can be cut once or damaged."""

    cut_once_at: int | None = None
    damaged: bool = False
    commit: str = COMMIT
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""

    def ranges(self, name: str) -> list[str]:
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(name)]


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.requests.append((self.command, self.path.split("?")[0], self.headers.get("Range", "")))
            if "/api/" in self.path:
                self.api()
            elif (name := self.path.split("/")[-1]) in FILES:
                self.file(name, body)
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def api(self) -> None:
            if "alice/tiny" not in self.path:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if not any(f"/revision/{known}" in self.path for known in (hub.commit, "v1", "main")):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = []
            for name, content in FILES.items():
                entry: dict = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
                if len(content) > 1000:
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
                siblings.append(entry)
            info = {
                "_id": "1",
                "id": "alice/tiny",
                "sha": hub.commit,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }
            return self.send(200, json.dumps(info | {"cardData": {"license": "apache-2.0"}}).encode(), {})

        def file(self, name: str, body: bool) -> None:
            content = FILES[name]
            if hub.damaged and name == "model.safetensors":
                content = b"\xff" + content[1:]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            part = content[start:]
            etag = hashlib.sha256(content).hexdigest() if len(content) > 1000 else git_sha1(content)
            extra = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            if "Range" in self.headers:
                extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = hub.cut_once_at if name == "model.safetensors" and body and start == 0 else None
            if cut is not None:
                hub.cut_once_at = None
                self.send(200, part, extra, only=cut)
                self.close_connection = True
                return
            self.send(206 if "Range" in self.headers else 200, part, extra, only=None if body else 0)

        def send(self, status: int, content: bytes, extra: dict[str, str], only: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content if only is None else content[:only])
                self.wfile.flush()

    return Handler


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()


def fetch_tiny(hub: Hub, to: Path, ref: str = f"alice/tiny@{COMMIT}") -> tuple[dict, list[str]]:
    lines: list[str] = []
    return fetch.fetch_model(ref, to=str(to), endpoint=hub.url, say=lines.append), lines


def test_a_model_is_fetched_at_its_commit_with_digests_and_its_licence_is_shown(hub: Hub, tmp_path: Path) -> None:
    record, lines = fetch_tiny(hub, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE
    assert record["commit"] == COMMIT and record["licence"] == "apache-2.0"
    assert record["files"]["model.safetensors"]["sha256"] == hashlib.sha256(LARGE).hexdigest()
    assert any("licence: apache-2.0" in line for line in lines)
    assert json.loads((tmp_path / "model/fetch.json").read_text()) == record
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "fetch.json",
        "model.safetensors",
    ], "no pickle, no left-overs"


def test_a_tag_is_recorded_as_the_commit_it_stood_for(hub: Hub, tmp_path: Path) -> None:
    record, _ = fetch_tiny(hub, tmp_path / "model", "alice/tiny@v1")
    assert (record["revision"], record["commit"]) == ("v1", COMMIT)


def test_a_cut_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cut_once_at = 11 * 1024**2
    fetch_tiny(hub, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE
    resumed = [wanted for wanted in hub.ranges("model.safetensors") if wanted]
    assert resumed and int(resumed[0].removeprefix("bytes=").split("-")[0]) > 0, hub.ranges("model.safetensors")


def test_fetching_again_downloads_nothing_and_repairs_what_was_damaged(hub: Hub, tmp_path: Path) -> None:
    fetch_tiny(hub, tmp_path / "model")
    before = len(hub.ranges("model.safetensors"))
    fetch_tiny(hub, tmp_path / "model")
    assert len(hub.ranges("model.safetensors")) == before
    (tmp_path / "model/model.safetensors").write_bytes(b"\0" * len(LARGE))
    fetch_tiny(hub, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE


def test_bytes_that_are_not_what_the_hub_says_are_refused_and_nothing_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.damaged = True
    with pytest.raises(DataError, match="differs from what the hub says"):
        fetch_tiny(hub, tmp_path / "model")
    assert not (tmp_path / "model/model.safetensors").exists()
    assert not (tmp_path / "model/fetch.json").exists()


@pytest.mark.parametrize(
    ("ref", "want"),
    [
        ("alice/tiny", "a revision is needed"),
        ("alice/tiny@v9", "no such revision"),
        ("bob/none@v1", "no such repository"),
        ("a/b/c@v1", "not a repository"),
    ],
)
def test_a_wrong_reference_says_what_is_wrong(hub: Hub, tmp_path: Path, ref: str, want: str) -> None:
    with pytest.raises(UsageError, match=want):
        fetch_tiny(hub, tmp_path / "model", ref)


def test_another_commit_into_the_same_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    fetch_tiny(hub, tmp_path / "model")
    hub.commit = "f" * 40
    with pytest.raises(UsageError, match="another commit"):
        fetch_tiny(hub, tmp_path / "model", "alice/tiny@" + "f" * 40)


def test_every_described_data_set_has_a_reader_and_a_revision() -> None:
    assert fetch.data_sources()
    for name, source in fetch.data_sources().items():
        assert importlib.util.find_spec(f"pipelines.prepare.formats.{source['format']}"), name
        assert source["revision"] and source["repo"].count("/") == 1


DESCRIBED = "mine: {repo: alice/tiny, revision: REVISION, files: ['*.json'], format: llava, about: words}\n"


def fetch_mine(hub: Hub, to: Path, monkeypatch: pytest.MonkeyPatch, revision: str = "main") -> tuple[dict, str]:
    """Fetch a data set that is described with `revision`, as `qwenvl fetch data mine` does."""
    described = to.with_name("data_sources.yaml")
    described.write_text(DESCRIBED.replace("REVISION", revision))
    monkeypatch.setattr(fetch, "SOURCES", described)
    lines: list[str] = []
    return fetch.fetch_data("mine", to=str(to), endpoint=hub.url, say=lines.append), "\n".join(lines)


def test_a_branch_is_resolved_printed_and_recorded_and_refused_once_it_has_moved(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "data"
    record, told = fetch_mine(hub, to, monkeypatch)
    assert (record["kind"], record["revision"], record["commit"]) == ("dataset", "main", COMMIT)
    assert f"revision main is commit {COMMIT}" in told and f"mine@{COMMIT}" in told
    assert json.loads((to / "fetch.json").read_text())["commit"] == COMMIT
    assert fetch_mine(hub, to, monkeypatch)[0] == record, "again, while main stands where it stood"
    hub.commit = "f" * 40
    with pytest.raises(UsageError, match="main has moved") as error:
        fetch_mine(hub, to, monkeypatch)
    assert COMMIT in str(error.value) and "f" * 40 in str(error.value)
    assert json.loads((to / "fetch.json").read_text()) == record
    assert fetch_mine(hub, tmp_path / "other", monkeypatch)[0]["commit"] == "f" * 40, "another place takes the new one"


def test_a_commit_in_the_description_needs_no_resolving(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, told = fetch_mine(hub, tmp_path / "data", monkeypatch, revision=f"'{COMMIT}'")
    assert record["commit"] == COMMIT and "revision" not in told


def test_a_description_without_a_revision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = tmp_path / "data_sources.yaml"
    described.write_text(DESCRIBED.replace("revision: REVISION, ", ""))
    monkeypatch.setattr(fetch, "SOURCES", described)
    with pytest.raises(RecipeError, match=r"mine\.revision: required"):
        fetch.data_sources()

"""What the client makes of a server's answers, over real HTTP: the table at the top of k8s/client.py."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from k8s.client import CONFIG_MAPS, EVENTS, PYTORCH_JOBS, Conflict, Exists, KubernetesApi, Unreachable, connect
from k8s.logs import Follower
from trainer.errors import ClusterError

Answer = Callable[[str, str, Any], tuple[int, Any]]


class Server:
    """Answers with what the test says, and remembers what was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda method, path, body: (200, {})
        self.asked: list[tuple[str, str, Any, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                outer.asked.append((self.command, self.path, body, dict(self.headers)))
                status, content = outer.answer(self.command, self.path, body)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = _any

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def an_api(server: Server, tokens: list[str] | None = None) -> KubernetesApi:
    """With a clock that its own sleeps move."""
    from kubernetes import client

    now = [0.0]
    left = tokens if tokens is not None else ["t"]

    def load() -> Any:
        configuration = client.Configuration()
        configuration.host = server.url
        configuration.api_key["authorization"] = f"Bearer {left.pop(0) if len(left) > 1 else left[0]}"
        return client.ApiClient(configuration)

    return KubernetesApi(
        "space", load=load, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )


def status(code: int, message: str) -> tuple[int, Any]:
    return code, {"kind": "Status", "message": message, "code": code}


JOB = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "a"}, "spec": {"unknownToModels": 1}}


def test_objects_go_and_come_as_they_are(server: Server) -> None:
    server.answer = lambda method, path, body: (201, body)
    assert an_api(server).create(JOB) == JOB
    method, path, body, headers = server.asked[0]
    assert (method, body) == ("POST", JOB)
    assert path.startswith("/apis/kubeflow.org/v1/namespaces/space/pytorchjobs?")
    assert "fieldValidation=Strict" in path and "dryRun" not in path
    assert headers["authorization"] == "Bearer t"
    an_api(server).create(JOB, dry_run=True)
    assert "dryRun=All" in server.asked[1][1]


def test_a_patch_is_a_merge_patch_and_a_deletion_names_the_uid(server: Server) -> None:
    api = an_api(server)
    api.patch(CONFIG_MAPS, "a", {"metadata": {"labels": {"x": "y"}}})
    assert server.asked[0][3]["Content-Type"] == "application/merge-patch+json"
    assert api.delete(PYTORCH_JOBS, "a", uid="u") is True
    assert server.asked[1][2] == {"propagationPolicy": "Background", "preconditions": {"uid": "u"}}
    api.delete(PYTORCH_JOBS, "a", uid="u", version="7")
    assert server.asked[2][2]["preconditions"] == {"uid": "u", "resourceVersion": "7"}


def test_what_is_not_there_is_none(server: Server) -> None:
    server.answer = lambda *_: status(404, "not found")
    assert an_api(server).get(PYTORCH_JOBS, "a") is None
    assert an_api(server).delete(PYTORCH_JOBS, "a", uid="u") is False
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("code", "message", "want"),
    [
        (409, 'pytorchjobs "a" already exists', Exists),
        (409, "the object has been modified", Conflict),
        (403, "exceeded quota", ClusterError),
        (422, "spec.nprocPerNode: Invalid value", ClusterError),
        (400, 'strict decoding error: unknown field "spec.x"', ClusterError),
        (404, "the server could not find the requested resource", ClusterError),
    ],
)
def test_a_refusal_is_not_tried_again_and_quotes_the_server(
    server: Server, code: int, message: str, want: type
) -> None:
    server.answer = lambda *_: status(code, message)
    with pytest.raises(want, match=message.split('"')[0]):
        an_api(server).create(JOB)
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [429, 500, 503, 504])
def test_a_server_in_trouble_is_asked_again(server: Server, code: int) -> None:
    server.answer = lambda *_: status(code, "later") if len(server.asked) < 4 else (200, JOB)
    assert an_api(server).get(PYTORCH_JOBS, "a") == JOB
    assert len(server.asked) == 4


def test_a_server_that_never_answers_is_given_up_after_the_limit(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(Unreachable, match="no connection"):
        an_api(server).get(PYTORCH_JOBS, "a")


def test_an_expired_token_is_read_again_once(server: Server) -> None:
    def answer(*_: Any) -> tuple[int, Any]:
        return (200, JOB) if server.asked[-1][3]["authorization"] == "Bearer new" else status(401, "expired")

    server.answer = answer
    assert an_api(server, ["old", "new"]).get(PYTORCH_JOBS, "a") == JOB
    server.asked.clear()
    with pytest.raises(ClusterError, match="credentials are not accepted"):
        an_api(server, ["old"]).get(PYTORCH_JOBS, "a")
    assert len(server.asked) == 2


def test_connections_are_kept_alive_also_with_a_new_token(server: Server) -> None:
    """A watch whose other end is gone without a word would else be waited for until it should have ended."""
    api = an_api(server, ["old", "new"])
    server.answer = lambda *_: (200, {}) if server.asked[-1][3]["authorization"] == "Bearer new" else status(401, "no")
    api.get(PYTORCH_JOBS, "a")
    pools = api._client.rest_client.pool_manager
    ours = pools.connection_from_url(server.url).pool.get()
    assert ours.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert ours.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1, "as it was before"
    ours.close()


def test_lists_leave_out_who_wrote_which_field(server: Server) -> None:
    """It is half of an object, and the launcher lists every event of a namespace."""
    one = {"metadata": {"name": "a", "managedFields": [{"manager": "kubelet"}]}, "message": "m"}
    server.answer = lambda *_: (200, {"kind": "EventList", "apiVersion": "v1", "items": [one], "metadata": {}})
    found = an_api(server).list(EVENTS, {})
    assert found == [{"apiVersion": "v1", "kind": "Event", "metadata": {"name": "a"}, "message": "m"}]


def test_lists_are_read_to_the_last_page(server: Server) -> None:
    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        if "continue=more" in path:
            return 200, {"items": [{"n": 2}], "metadata": {}}
        return 200, {"items": [{"n": 1}], "metadata": {"continue": "more"}}

    server.answer = answer
    assert an_api(server).list(PYTORCH_JOBS, {"a/b": "c"}) == [{"n": 1}, {"n": 2}]
    assert "labelSelector=a%2Fb%3Dc" in server.asked[0][1]


def test_without_a_cluster_the_file_that_was_looked_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="no cluster to talk to") as told:
        connect("a")
    assert told.value.where == f"KUBECONFIG={tmp_path / 'none'}" and told.value.got and told.value.do


def test_a_log_that_breaks_off_goes_on_without_a_line_twice(server: Server) -> None:
    parts = ["t1 one\nt2 two\nt2 three\n", "t2 two\nt2 three\nt2 four\nt3 five\n"]
    server.answer = lambda *_: (200, parts.pop(0))
    said: list[str] = []
    follower = Follower(an_api(server), "a-worker-0", "pytorch", said.append)
    follower.follow_once()
    follower.follow_once()
    assert said == ["one", "two", "three", "four", "five"]
    assert "sinceTime=t2" in server.asked[1][1]


def test_a_log_that_cannot_be_had_is_said_once_and_ends_nothing(server: Server) -> None:
    server.answer = lambda *_: status(400, "container is waiting to start")
    said: list[str] = []
    follower = Follower(an_api(server), "a-worker-0", "pytorch", said.append).start()
    follower.stop(10)
    assert len(said) <= 1
    assert not follower._thread.is_alive()

"""The objects of memory.py behind real HTTP, with watches: what the client, the mirror and the launcher do to a server.

Faults that a real API server cannot be made to show at will: versions that are too old, watches that break off, tokens
that expire, a restart. What it answers otherwise is tested on a real one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from k8s.client import EVENTS, Conflict, Exists, Json, Kind, KubernetesApi
from k8s.client import KINDS as KIND_OF
from tests.k8s.memory import MemoryApi

KINDS = {kind.plural: kind for kind in (*KIND_OF.values(), EVENTS)}
NAMES = {kind.plural: name for name, kind in KIND_OF.items()} | {"events": "Event"}
STEP_S = 0.02


class ApiServer:
    """Objects are changed under `lock`; every change is a line in `changes`, which watches read.

    `asked` holds (time, method, path) of every request. `fault` may answer first: (status, body) or None.
    """

    def __init__(self) -> None:
        self.memory = MemoryApi()
        self.lock = threading.RLock()
        self.changes: list[tuple[int, str, str, Json]] = []
        self.asked: list[tuple[float, str, str]] = []
        self.fault: Callable[[str, str, dict[str, str]], tuple[int, Any] | None] = lambda method, path, query: None
        self.oldest = 0
        """Versions below this are too old to watch from."""
        self.watch_s = 60.0
        self.epoch = 0
        """Watches end when it changes."""
        self.log = ""
        self._seen: dict[tuple[str, str], str] = {}
        self._start(0)

    # ------------------------------------------------------------ up and down

    def _start(self, port: int) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                outer._answer(self)

            do_GET = do_POST = do_PATCH = do_DELETE = _any

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.epoch += 1
        self.http.shutdown()
        self.http.server_close()

    def restart(self, down_s: float) -> None:
        """Nothing answers for so long; then the same objects are there."""
        self.stop()
        time.sleep(down_s)
        self._start(self.port)

    def api(self, **more: Any) -> KubernetesApi:
        from kubernetes import client

        def load() -> Any:
            configuration = client.Configuration()
            configuration.host = f"http://127.0.0.1:{self.port}"
            return client.ApiClient(configuration)

        return KubernetesApi("qwenvl", load=load, **more)

    # ------------------------------------------------------------ what tests do

    def change(self, act: Callable[[MemoryApi], Any]) -> None:
        """Do something to the objects; watches tell what came of it."""
        with self.lock:
            act(self.memory)
            self._record()

    def event(self, name: str, reason: str, message: str, kind: str = "Pod", warning: bool = True) -> None:
        body = {
            "kind": "Event",
            "metadata": {"name": f"event-{len(self.changes)}"},
            "involvedObject": {"kind": kind, "name": name},
            "reason": reason,
            "message": message,
            "type": "Warning" if warning else "Normal",
        }
        self.change(lambda memory: memory.put(EVENTS, body))

    def _record(self) -> None:
        objects = self.memory.objects
        for key, one in objects.items():
            one["metadata"].setdefault("resourceVersion", "0")
            text = json.dumps(one, sort_keys=True)
            if self._seen.get(key) != text:
                if key in self._seen or one["metadata"]["resourceVersion"] == "0":
                    self.memory._touch(one)
                what = "MODIFIED" if key in self._seen else "ADDED"
                self._note(key, what, one)
                self._seen[key] = json.dumps(one, sort_keys=True)
        for key in [key for key in self._seen if key not in objects]:
            gone = json.loads(self._seen.pop(key))
            self.memory._touch(gone)
            self._note(key, "DELETED", gone)

    def _note(self, key: tuple[str, str], what: str, one: Json) -> None:
        copy = json.loads(json.dumps(one))
        self.changes.append((int(one["metadata"]["resourceVersion"]), key[0], what, copy))

    # ------------------------------------------------------------ answers

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else {}
        parts = urlsplit(handler.path)
        query = dict(parse_qsl(parts.query))
        self.asked.append((time.monotonic(), handler.command, handler.path))
        if (faulty := self.fault(handler.command, parts.path, query)) is not None:
            _send(handler, *faulty)
            return
        _, _, rest = parts.path.partition("/namespaces/qwenvl/")
        plural, _, name = rest.partition("/")
        kind = KINDS[plural]
        if name.endswith("/log"):
            _send(handler, 200, self.log)
            return
        if query.get("watch"):
            self._watch(handler, kind, query)
            return
        try:
            with self.lock:
                status, answer = self._do(handler.command, kind, name, query, body)
                self._record()
        except Exists as error:
            status, answer = 409, {"message": f'"{error}" already exists'}
        except Conflict as error:
            status, answer = 409, {"message": f"{error} has been modified"}
        _send(handler, status, answer)

    def _do(self, method: str, kind: Kind, name: str, query: dict[str, str], body: Json) -> tuple[int, Any]:
        memory = self.memory
        if method == "POST":
            return 201, memory.create(body, dry_run="dryRun" in query)
        if method == "GET" and not name:
            # One page whatever its limit says, but for a single object: who asks for that wants the version.
            one = 1 if query.get("limit") == "1" else None
            items, version = memory.snapshot(kind, _labels(query), _labels(query, "fieldSelector"), one)
            about = {"apiVersion": kind.api_version, "kind": f"{NAMES[kind.plural]}List"}
            return 200, {**about, "items": items, "metadata": {"resourceVersion": version}}
        found = memory.get(kind, name)
        if found is None:
            return 404, {"message": f"{name} not found"}
        if method == "PATCH":
            return 200, memory.patch(kind, name, body)
        if method == "DELETE":
            conditions = body["preconditions"]
            ok = memory.delete(kind, name, uid=conditions["uid"], version=conditions.get("resourceVersion", ""))
            return (200, {}) if ok else (409, {"message": "the UID in the precondition does not match"})
        return 200, found

    def _watch(self, handler: BaseHTTPRequestHandler, kind: Kind, query: dict[str, str]) -> None:
        """Chunks as the API server sends them, until the time is over or the server restarts."""
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        version, labels, epoch = int(query["resourceVersion"]), _labels(query), self.epoch
        if version < self.oldest:
            _chunk(handler, {"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}})
            _last_chunk(handler)
            return
        end, at = time.monotonic() + min(self.watch_s, float(query["timeoutSeconds"])), 0
        while time.monotonic() < end and epoch == self.epoch:
            with self.lock:
                news, at = self.changes[at:], len(self.changes)
            for number, plural, what, one in news:
                chosen = labels.items() <= one["metadata"].get("labels", {}).items()
                if number > version and plural == kind.plural and chosen:
                    _chunk(handler, {"type": what, "object": one})
            time.sleep(STEP_S)
        if epoch == self.epoch:
            _last_chunk(handler)
        else:
            handler.close_connection = True  # broken off in the middle, as by a process that dies


def _labels(query: dict[str, str], selector: str = "labelSelector") -> dict[str, str]:
    return dict(part.split("=", 1) for part in query.get(selector, "").split(",") if part)


def _send(handler: BaseHTTPRequestHandler, status: int, answer: Any) -> None:
    data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def _chunk(handler: BaseHTTPRequestHandler, value: Json) -> None:
    data = json.dumps(value).encode() + b"\n"
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()


def _last_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"0\r\n\r\n")

"""The few API calls we need, as a small Protocol over plain dicts, and its implementation over the kubernetes client.

    Api        get, list, watch, create, patch, delete, log: what the launcher is written against
    connect()  Api of the cluster that this pod runs in, or that KUBECONFIG names

What the API server answers becomes one of few things (the table in `_raise`):

    404                         None or False: there is nothing
    409 AlreadyExists           Exists
    409 Conflict                Conflict: read again, decide again
    410, or a watch's ERROR 410 Gone: what was read is too old, list again (a list of several pages does so by itself)
    408 429 5xx, no connection  tried again with back-off, at most RETRY_S, then Unreachable; 429 waits as long as the
                                server says (Retry-After). An open watch or log ends as Disconnected: its reader goes on
    401                         credentials are read again once, then as 403
    403 exceeded quota          QuotaExceeded: may pass
    400 403 422 and others      ClusterError with the server's words: the request itself is wrong
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlencode

from trainer.errors import ClusterError, StorageError

Json = dict[str, Any]

RETRY_S = 120.0
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 10.0
TIMEOUT_S = (5, 30)
"""Connect, read."""
LOG_SILENCE_S = 300
WATCH_S = 280
"""The server ends a watch after so long; ours gives up a little later."""
MAX_LINE_BYTES = 64 * 1024
"""A log without line ends (a progress bar) is cut here: it must not grow in memory."""
PAGE = 500
FIELD_MANAGER = "qwenvl-train-launcher"


@dataclass(frozen=True)
class Kind:
    """A kind of object as its URL has it."""

    api_version: str
    plural: str

    def path(self, namespace: str, name: str = "") -> str:
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        return f"{root}/namespaces/{namespace}/{self.plural}" + (f"/{name}" if name else "")


PODS = Kind("v1", "pods")
EVENTS = Kind("v1", "events")
CONFIG_MAPS = Kind("v1", "configmaps")
PYTORCH_JOBS = Kind("kubeflow.org/v1", "pytorchjobs")
JOBS = Kind("batch/v1", "jobs")
RAY_JOBS = Kind("ray.io/v1", "rayjobs")
TRAIN_JOBS = Kind("trainer.kubeflow.org/v1alpha1", "trainjobs")
RUNTIMES = Kind("trainer.kubeflow.org/v1alpha1", "trainingruntimes")
KINDS = {
    "Pod": PODS,
    "ConfigMap": CONFIG_MAPS,
    "PyTorchJob": PYTORCH_JOBS,
    "Job": JOBS,
    "RayJob": RAY_JOBS,
    "TrainJob": TRAIN_JOBS,
    "TrainingRuntime": RUNTIMES,
}

ALL = ("create", "delete", "get", "list", "patch", "watch")
VERBS: dict[str, tuple[str, ...]] = {
    "kubeflow.org/pytorchjobs": ALL,
    "batch/jobs": ALL,
    "/configmaps": ("create", "get", "patch"),
    "/events": ("list", "watch"),
    "/pods": ("create", "list", "watch"),  # created in dry runs only
    "/pods/log": ("get",),
}
"""All that the launcher asks of a namespace by default; the chart's Role grants exactly this."""
MORE_VERBS: dict[str, dict[str, tuple[str, ...]]] = {
    "rayjobs": {"ray.io/rayjobs": ALL},
    "trainjobs": {
        "trainer.kubeflow.org/trainjobs": ALL,
        "trainer.kubeflow.org/trainingruntimes": ("create", "delete", "get", "patch"),
    },
}
"""What it asks besides where the cluster file chooses such jobs; granted by the chart's value rbac.kinds."""


def kind_of(manifest: Mapping[str, Any]) -> Kind:
    return KINDS[manifest["kind"]]


class Exists(Exception):
    """An object of that name is there already."""


class Conflict(Exception):
    """The object changed since it was read."""


class Gone(Exception):
    """What was read is too old to go on from: list again."""


class Disconnected(Exception):
    """A stream broke off, or could not be opened just now."""


class QuotaExceeded(ClusterError):
    """A ResourceQuota has no room now; perhaps later."""


class Unreachable(StorageError):
    """The API server did not answer after all retries: the launcher's own attempt fails, the job goes on."""


class Api(Protocol):
    """One namespace of one cluster."""

    def get(self, kind: Kind, name: str) -> Json | None: ...

    def list(self, kind: Kind, labels: Mapping[str, str]) -> list[Json]: ...

    def snapshot(
        self, kind: Kind, labels: Mapping[str, str], fields: Mapping[str, str] | None = None, most: int | None = None
    ) -> tuple[list[Json], str]:
        """What list gives, and the version from which a watch goes on; with `most` no page more once there are so
        many, 0 for the version alone."""
        ...

    def watch(self, kind: Kind, labels: Mapping[str, str], version: str) -> Iterator[tuple[str, Json]]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) after `version`, until the server ends it; open when the
        call returns.

        Raises Gone, Disconnected, ClusterError.
        """
        ...

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        """Strict: unknown fields are refused. Raises Exists."""
        ...

    def patch(self, kind: Kind, name: str, change: Json) -> Json:
        """JSON merge patch; with metadata.resourceVersion in it, Conflict when the object changed."""
        ...

    def delete(self, kind: Kind, name: str, *, uid: str, version: str = "") -> bool:
        """Only the object with this uid, and what it owns; False when it is gone. With `version`, Conflict when the
        object changed."""
        ...

    def log(self, pod: str, container: str, *, since: str | None = None) -> Iterator[tuple[str, str]]:
        """(time, line) while the container runs, or of what it left; ends when the connection does."""
        ...


# ---------------------------------------------------------------- the real one


class KubernetesApi:
    """Api over the official client's transport; objects stay plain dicts, its models drop fields they do not know."""

    def __init__(
        self,
        namespace: str,
        *,
        load: Callable[[], Any],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.namespace = namespace
        self._load, self._clock, self._sleep = load, clock, sleep
        self._client = self._loaded()

    def _loaded(self) -> Any:
        """Credentials and connections; a connection that died in silence (a NAT, a load balancer, a lost node) is found
        out within a minute, not when a watch should have ended."""
        made = self._load()
        made.rest_client.pool_manager.connection_pool_kw["socket_options"] = _keep_alive()
        return made

    def get(self, kind: Kind, name: str) -> Json | None:
        return self._call("GET", kind.path(self.namespace, name))

    def list(self, kind: Kind, labels: Mapping[str, str]) -> list[Json]:
        return self.snapshot(kind, labels)[0]

    def snapshot(
        self, kind: Kind, labels: Mapping[str, str], fields: Mapping[str, str] | None = None, most: int | None = None
    ) -> tuple[list[Json], str]:
        size = PAGE if most is None else max(1, min(PAGE, most))
        asked = [*_selected(labels, fields), ("limit", str(size))]
        found: list[Json] = []
        query = asked
        while True:
            try:
                page = self._call("GET", kind.path(self.namespace), query=query) or {}
            except Gone:  # the pages before are too old to go on from
                found, query = [], asked
                continue
            named = {"apiVersion": page.get("apiVersion"), "kind": page.get("kind", "").removesuffix("List")}
            for one in page.get("items", []):
                one.get("metadata", {}).pop("managedFields", None)  # half of an object; a namespace has 10,000 events
                found.append({**named, **one} if named["kind"] else one)
            about = page.get("metadata", {})
            if not about.get("continue") or (most is not None and len(found) >= most):
                return found[:most], about.get("resourceVersion", "")
            query = [*asked, ("continue", about["continue"])]

    def watch(self, kind: Kind, labels: Mapping[str, str], version: str) -> Iterator[tuple[str, Json]]:
        query = [*_selected(labels), ("watch", "1"), ("allowWatchBookmarks", "true"), ("resourceVersion", version)]
        query += [("timeoutSeconds", str(WATCH_S))]
        return self._changes(self._opened(kind.path(self.namespace), query, read_s=WATCH_S + 20))

    def _changes(self, response: Any) -> Iterator[tuple[str, Json]]:
        for line in _lines(response, longest=None):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError as error:  # cut off in the middle
                raise Disconnected(f"half an event: {error}") from None
            if event["type"] == "ERROR":
                status = event.get("object", {})
                if status.get("code") == 410:
                    raise Gone(status.get("message", ""))
                raise Disconnected(str(status.get("message", status)))
            yield event["type"], event["object"]

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        query = [("fieldValidation", "Strict"), ("fieldManager", FIELD_MANAGER)] + (
            [("dryRun", "All")] if dry_run else []
        )
        return self._call("POST", kind_of(body).path(self.namespace), query=query, body=body) or {}

    def patch(self, kind: Kind, name: str, change: Json) -> Json:
        query = [("fieldManager", FIELD_MANAGER)]
        found = self._call("PATCH", kind.path(self.namespace, name), query=query, body=change)
        if found is None:
            raise Conflict(f"{name} is gone")
        return found

    def delete(self, kind: Kind, name: str, *, uid: str, version: str = "") -> bool:
        conditions = {"uid": uid} | ({"resourceVersion": version} if version else {})
        body = {"propagationPolicy": "Background", "preconditions": conditions}
        try:
            return self._call("DELETE", kind.path(self.namespace, name), body=body) is not None
        except Conflict:
            if version:
                raise
            return False  # another object of that name

    def log(self, pod: str, container: str, *, since: str | None = None) -> Iterator[tuple[str, str]]:
        query = [("container", container), ("follow", "true"), ("timestamps", "true")]
        query += [("sinceTime", since)] if since else []
        path = f"{PODS.path(self.namespace, pod)}/log"
        moment, whole = "", True
        for line in _lines(self._opened(path, query, read_s=LOG_SILENCE_S), longest=MAX_LINE_BYTES):
            text = line.removesuffix(b"\n").decode("utf-8", "replace")
            if whole:  # the rest of a line that was cut has no time of its own
                moment, _, text = text.partition(" ")
            whole = line.endswith(b"\n")
            if text or whole:
                yield moment, text

    # ------------------------------------------------------------ streams

    def _opened(self, path: str, query: list[tuple[str, str]], read_s: float) -> Any:
        """An answer whose body is still to come. Not tried again here: readers of streams go on by themselves."""
        from urllib3.exceptions import HTTPError

        for reloaded in (False, True):
            try:
                response = self._send("GET", path, query=query, stream_s=read_s)
            except HTTPError as error:
                raise Disconnected(str(error)) from None
            if response.status == 200:
                return response
            message, status = _message(response.read()), response.status
            response.close()
            if status == 401 and not reloaded:
                self._client = self._loaded()
                continue
            if status == 410:
                raise Gone(message)
            if status in (408, 429) or status >= 500:
                raise Disconnected(f"{status} {message}")
            _raise(status, message, f"GET {path}")
        raise AssertionError("not reached")

    # ------------------------------------------------------------ transport

    def _call(
        self, method: str, path: str, *, query: list[tuple[str, str]] | None = None, body: Json | None = None
    ) -> Json | None:
        """Send with retries; None when the object is not there."""
        deadline, wait, reloaded = self._clock() + RETRY_S, FIRST_WAIT_S, False
        while True:
            status, data, told_s = self._answer(method, path, query or [], body)
            if 200 <= status < 300:
                return json.loads(data)
            if status == 404 and method != "POST":
                return None
            if status == 401 and not reloaded:  # an expired token: the file has a newer one
                self._client, reloaded = self._loaded(), True
                continue
            if status not in (0, 408, 429) and status < 500:
                _raise(status, _message(data), f"{method} {path}")
            pause = max(wait * random.uniform(0.5, 1.0), told_s)
            if self._clock() + pause > deadline:
                got = f"{status or 'no connection'}: {_message(data)}"
                raise Unreachable("the API server did not answer", where=f"{method} {path}", got=got)
            self._sleep(pause)
            wait = min(wait * 2, MAX_WAIT_S)

    def _answer(
        self, method: str, path: str, query: list[tuple[str, str]], body: Json | None
    ) -> tuple[int, bytes, float]:
        """(status, body, Retry-After); status 0 and the reason when there was no answer."""
        from urllib3.exceptions import HTTPError

        try:
            response = self._send(method, path, query=query, body=body)
            told = response.headers.get("Retry-After", "")
            return response.status, response.data, float(told) if told.isdigit() else 0.0
        except HTTPError as error:
            return 0, str(error).encode(), 0.0

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, str]],
        body: Json | None = None,
        stream_s: float | None = None,
    ) -> Any:
        """The client's connections and credentials, without its models and its own error handling.

        With `stream_s` the body is left to be read, at most so long between two parts of it.
        """
        from urllib3.util import Timeout

        headers = {"Accept": "application/json"}
        self._client.update_params_for_auth(headers, [], ["BearerToken"])
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return self._client.rest_client.pool_manager.request(
            method,
            f"{self._client.configuration.host}{path}" + (f"?{urlencode(query)}" if query else ""),
            headers=headers,
            body=None if body is None else json.dumps(body).encode(),
            preload_content=stream_s is None,
            retries=False,  # retried in _call, with one limit
            timeout=Timeout(connect=TIMEOUT_S[0], read=stream_s or TIMEOUT_S[1]),
        )


def _keep_alive() -> list[tuple[int, int, int | bytes]]:
    """Options of a socket: asked after 30 s of silence, given up 30 s later. Not every system has all of them."""
    from urllib3.connection import HTTPConnection

    timing = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    known = [
        (socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in timing.items() if hasattr(socket, name)
    ]
    return [*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *known]


def _lines(response: Any, *, longest: int | None) -> Iterator[bytes]:
    """Lines of an open stream as they come, with their ends; of one beyond `longest` bytes several parts, the last with
    its end."""
    from urllib3.exceptions import HTTPError

    try:
        rest = b""
        for chunk in response.stream(64 * 1024):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if longest is not None and len(rest) > longest:
                yield rest
                rest = b""
        if rest:
            yield rest
    except HTTPError as error:
        raise Disconnected(str(error)) from None
    finally:
        response.close()


def _selected(labels: Mapping[str, str], fields: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    chosen = {"labelSelector": labels, "fieldSelector": fields or {}}
    return [
        (name, ",".join(f"{key}={value}" for key, value in sorted(wanted.items())))
        for name, wanted in chosen.items()
        if wanted
    ]


def _message(data: bytes) -> str:
    """The server's own words."""
    try:
        return str(json.loads(data)["message"])
    except (TypeError, ValueError, KeyError):
        return data[:500].decode("utf-8", "replace")


def _raise(status: int, message: str, where: str) -> None:
    if status == 409:
        raise (Exists if "already exists" in message else Conflict)(message)
    if status == 410:
        raise Gone(message)
    do = {
        401: "the credentials are not accepted: look at KUBECONFIG or the service account",
        403: "the launcher's service account lacks a right (RayJob, TrainJob: the chart's rbac.kinds), or a policy or "
        "quota of the namespace refuses the object",
        404: "is the operator of this kind, with its CRD, installed?" if where.startswith("POST") else None,
    }.get(status)
    error = QuotaExceeded if status == 403 and "exceeded quota" in message else ClusterError
    raise error("the cluster refused a request", where=where, got=f"{status} {message}", do=do)


def api_client() -> Any:
    """The official client of the cluster that this pod runs in, else of the one that KUBECONFIG names.

    Raises:
        ClusterError: there is neither.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        try:
            # Named here: the client reads the variable once, when it is imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
        except config.ConfigException as error:
            raise ClusterError(
                "no cluster to talk to",
                where=f"KUBECONFIG={os.environ.get('KUBECONFIG', '')}",
                expected="a kubeconfig with a current context, or a pod with a service account",
                got=str(error),
                do="set KUBECONFIG, or run in a pod",
            ) from None
    return client.ApiClient(configuration)


def connect(namespace: str) -> KubernetesApi:
    """One namespace of the cluster that api_client knows.

    Raises:
        ClusterError: there is none.
    """
    return KubernetesApi(namespace, load=api_client)

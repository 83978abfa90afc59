"""A small Kubeflow Pipelines: its v2beta1 API over HTTP, as far as `qwenvl submit`, `qwenvl runs` and kfp's CLI use it.

It is strict where a real one (2.14.3) is: an uploaded definition must parse, a run's parameters must be the
definition's, single-user mode takes no namespace, only a run that failed can be retried. What a run does is a script:
each time somebody asks for it, it goes one line on. On the side it answers as the cluster: pods, their logs, and jobs.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Json = dict[str, Any]
CREATED = "2026-11-22T12:00:00Z"
KINDS = {str: "STRING", list: "LIST", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", bool: "BOOLEAN", dict: "STRUCT"}


class Refused(Exception):
    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


@dataclass
class FakeKfp:
    """What the server holds; tests read and set it.

    Args:
        script: (state of the run, {step: state}) of each line; the last one stays.
        faults: answers to the next questions for a run: a status, or 0 for a closed connection.
        token: what the Authorization header must have.
    """

    script: list[tuple[str, dict[str, str]]] = field(default_factory=lambda: [("SUCCEEDED", {})])
    faults: list[int] = field(default_factory=list)
    token: str | None = None
    pipelines: dict[str, Json] = field(default_factory=dict)
    versions: dict[str, Json] = field(default_factory=dict)
    experiments: dict[str, Json] = field(default_factory=dict)
    runs: dict[str, Json] = field(default_factory=dict)
    line: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    pods: list[Json] = field(default_factory=list)
    pod_logs: dict[str, str] = field(default_factory=dict)
    jobs: list[Json] = field(default_factory=list)
    url: str = ""

    # ------------------------------------------------------------ routes

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Json | str:
        path, query = urlsplit(url).path, {k: v[0] for k, v in parse_qs(urlsplit(url).query).items()}
        self.calls.append(f"{method} {path}")
        if not path.startswith("/apis/v2beta1/"):
            return self._cluster(method, path)
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            raise Refused(401, "Request header error: there is no user identity header.")
        sent = json.loads(body) if body and headers.get("Content-Type", "").startswith("application/json") else {}
        for pattern, handler in (
            (r"GET healthz", lambda: {"multi_user": False}),
            (r"GET experiments", lambda: {"experiments": [*self.experiments.values()]}),
            (r"POST experiments", lambda: self._experiment(sent)),
            (r"GET pipelines/names/(.+)", self._named),
            (r"POST pipelines/upload", lambda: self._upload(query["name"], _file(headers, body))),
            (
                r"POST pipelines/upload_version",
                lambda: self._version(query["pipelineid"], query["name"], _file(headers, body)),
            ),
            (r"GET pipelines/([^/]+)/versions", lambda one: {"pipeline_versions": self._versions(one, query)}),
            (r"GET pipelines/[^/]+/versions/([^/]+)", lambda one: self.versions[one]),
            (r"GET runs", lambda: {"runs": [*self.runs.values()][::-1][: int(query.get("page_size", 10))]}),
            (r"POST runs", lambda: self._run(sent)),
            (r"GET runs/([^/:]+)", self._get),
            (r"POST runs/([^/:]+):terminate", self._terminate),
            (r"POST runs/([^/:]+):retry", self._retry),
        ):  # fmt: skip
            if match := re.fullmatch(pattern, f"{method} {path.removeprefix('/apis/v2beta1/')}"):
                return handler(*match.groups())
        raise Refused(404, f"no such path: {method} {path}")

    # ------------------------------------------------------------ experiments, pipelines

    def _experiment(self, sent: Json) -> Json:
        if sent.get("namespace"):
            raise Refused(400, "Invalid input error: In single-user mode, an experiment has no namespace")
        made = {"experiment_id": f"e{len(self.experiments) + 1}", "display_name": sent["display_name"]}
        self.experiments[made["experiment_id"]] = made
        return made

    def _named(self, name: str) -> Json:
        for one in self.pipelines.values():
            if one["display_name"] == name:
                return one
        raise Refused(404, f"ResourceNotFoundError: Pipeline {name} not found.")

    def _upload(self, name: str, content: bytes) -> Json:
        made = {"pipeline_id": f"p{len(self.pipelines) + 1}", "display_name": name, "created_at": CREATED}
        self.pipelines[made["pipeline_id"]] = made
        self._version(made["pipeline_id"], name, content)
        return made

    def _version(self, pipeline: str, name: str, content: bytes) -> Json:
        if any(one["pipeline_id"] == pipeline and one["display_name"] == name for one in self.versions.values()):
            raise Refused(409, "Already exist error: the name of a pipeline version must be unique")
        made = {
            "pipeline_id": pipeline,
            "pipeline_version_id": f"v{len(self.versions) + 1}",
            "display_name": name,
            "pipeline_spec": _parsed(content),
            "created_at": CREATED,
        }
        self.versions[made["pipeline_version_id"]] = made
        return {key: value for key, value in made.items() if key != "pipeline_spec"}

    def _versions(self, pipeline: str, query: dict[str, str]) -> list[Json]:
        wanted = [one for one in self.versions.values() if one["pipeline_id"] == pipeline]
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            assert (predicate["operation"], predicate["key"]) == ("EQUALS", "display_name")
            wanted = [one for one in wanted if one["display_name"] == predicate["stringValue"]]
        return [{key: value for key, value in one.items() if key != "pipeline_spec"} for one in wanted]

    # ------------------------------------------------------------ runs

    def _run(self, sent: Json) -> Json:
        if sent["experiment_id"] not in self.experiments:
            raise Refused(400, f"Invalid input error: experiment {sent['experiment_id']} does not exist")
        spec = sent.get("pipeline_spec")
        if spec is None:
            spec = self.versions[sent["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"]
        _check_parameters(spec, sent.get("runtime_config", {}).get("parameters") or {})
        made = {**sent, "run_id": f"00000000-0000-0000-0000-{len(self.runs) + 1:012}", "created_at": CREATED}
        made["state"] = "PENDING"
        made.pop("pipeline_spec", None)
        self.runs[made["run_id"]], self.line[made["run_id"]] = made, -1
        return made

    def _known(self, run_id: str) -> Json:
        if run_id not in self.runs:
            raise Refused(404, f"Failed to get a run: ResourceNotFoundError: Run {run_id} not found.")
        return self.runs[run_id]

    def _get(self, run_id: str) -> Json:
        if self.faults:
            raise Refused(self.faults.pop(0), "upstream connect error")
        run = self._known(run_id)
        self.line[run_id] = min(self.line[run_id] + 1, len(self.script) - 1)
        run["state"], steps = self.script[self.line[run_id]]
        kfps_own = ["root", "root-driver", "exit-handler-1", *(f"{name}-driver" for name in steps)]
        tasks = [_task(name, "SUCCEEDED") for name in kfps_own] + [_task(*step) for step in steps.items()]
        run["run_details"] = {"task_details": tasks}
        run.pop("error", None)
        if run["state"] == "FAILED":
            run["error"] = {"code": 9, "message": "run failed with message"}
        return run

    def _terminate(self, run_id: str) -> Json:
        self._known(run_id)
        self.script = [("RUNNING", {"stage1": "RUNNING"}), ("FAILED", {"stage1": "FAILED", "clean-up": "SUCCEEDED"})]
        self.line[run_id] = -1
        return {}

    def _retry(self, run_id: str) -> Json:
        if self._known(run_id)["state"] != "FAILED":
            raise Refused(400, "Bad request error: Workflow must be Failed/Error to retry")
        self.runs[run_id]["state"], self.line[run_id] = "PENDING", -1
        return {}

    # ------------------------------------------------------------ the cluster beside it

    def _cluster(self, method: str, path: str) -> Json | str:
        if match := re.fullmatch(r"/api/v1/namespaces/kubeflow/pods/([^/]+)/log", path):
            return self.pod_logs[match[1]]
        if path == "/api/v1/namespaces/kubeflow/pods":
            return {"kind": "PodList", "apiVersion": "v1", "items": self.pods}
        kind, _, name = path.rpartition("/apis/kubeflow.org/v1/namespaces/qwenvl/pytorchjobs")[2].partition("/")
        if kind == "" and path.startswith("/apis/kubeflow.org/v1/namespaces/qwenvl/pytorchjobs"):
            if method == "DELETE":
                self.jobs = [one for one in self.jobs if one["metadata"]["name"] != name]
                return {"kind": "Status", "status": "Success"}
            return {"items": self.jobs}
        return {"items": []}


def _parsed(content: bytes) -> Json:
    documents = list(yaml.safe_load_all(content))
    try:
        json_format.ParseDict(documents[0], vars(pipeline_spec_pb2)["PipelineSpec"]())
    except json_format.ParseError as error:
        raise Refused(400, f"Invalid input error: Invalid IR spec format: {error}") from error
    return {"pipeline_spec": documents[0], "platform_spec": documents[1]}


def _check_parameters(spec: Json, given: Json) -> None:
    asked = spec.get("pipeline_spec", spec)["root"]["inputDefinitions"]["parameters"]
    if unknown := given.keys() - asked.keys():
        raise Refused(400, f"Invalid input error: parameter(s) {sorted(unknown)} provided do not exist")
    for name, rule in asked.items():
        if name not in given and not rule.get("isOptional"):
            raise Refused(400, f"Invalid input error: parameter {name} is not optional, yet has neither default value")
        if name in given and KINDS[type(given[name])] != rule["parameterType"]:
            raise Refused(400, f"Invalid input error: input parameter {name} requires type {rule['parameterType']}")


def _task(name: str, state: str) -> Json:
    made: Json = {"task_id": name, "display_name": name, "state": state, "create_time": CREATED, "start_time": CREATED}
    if state == "FAILED":
        made["error"] = {"code": 9, "message": f"{name}: This step is in Error state\nwith this message: exit code 1"}
    if state != "RUNNING":
        made["end_time"] = "2026-11-22T12:00:05Z"
    return made


def _file(headers: Any, body: bytes) -> bytes:
    """The one file of a multipart form."""
    whole = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body
    from email import message_from_bytes, policy

    message: EmailMessage = message_from_bytes(whole, policy=policy.default)  # type: ignore[assignment]
    (part,) = message.iter_parts()
    return part.get_payload(decode=True)  # type: ignore[return-value]


@contextmanager
def serving(fake: FakeKfp) -> Iterator[FakeKfp]:
    """The fake on a port of this machine, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, answer = 200, fake.answer(self.command, self.path, self.headers, body)
            except Refused as refused:
                if refused.status == 0:
                    self.close_connection = True
                    return
                status, answer = refused.status, {"error": refused.message, "message": refused.message, "code": 3}
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A small API server in memory, for the launcher's decisions: names, uids, resource versions, label selectors.

What a real server does beyond that (admission, quota, garbage collection, operators) is tested on a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from k8s.client import JOBS, PODS, PYTORCH_JOBS, RAY_JOBS, TRAIN_JOBS, Conflict, Exists, Json, Kind, kind_of
from k8s.mirror import Event
from k8s.pytorchjob import templates_in
from k8s.schemas.validate import problems

JOB_KINDS = (PYTORCH_JOBS, JOBS, RAY_JOBS, TRAIN_JOBS)
JOB_PLURALS = [kind.plural for kind in JOB_KINDS]


class MemoryApi:
    """`outlive` keeps pods, marked as being deleted, when their job goes: a kubelet's grace."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.calls: list[str] = []
        self.refuse_dry_run: list[Exception] = []
        self.outlive = False
        self._count = 0

    # ------------------------------------------------------------ Api

    def get(self, kind: Kind, name: str) -> Json | None:
        return copy.deepcopy(self.objects.get((kind.plural, name)))

    def snapshot(
        self, kind: Kind, labels: Mapping[str, str], fields: Mapping[str, str] | None = None, most: int | None = None
    ) -> tuple[list[Json], str]:
        found = [one for one in self.list(kind, labels) if all(_at(one, key) == v for key, v in (fields or {}).items())]
        return found[:most], str(self._count)

    def watch(self, kind: Kind, labels: Mapping[str, str], version: str) -> Iterator[tuple[str, Json]]:
        raise NotImplementedError("MemoryView looks by itself")

    def list(self, kind: Kind, labels: Mapping[str, str]) -> list[Json]:
        return [
            copy.deepcopy(one)
            for (plural, _), one in sorted(self.objects.items())
            if plural == kind.plural and labels.items() <= one["metadata"].get("labels", {}).items()
        ]

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        kind, name = kind_of(body), body["metadata"]["name"]
        self.calls.append(f"{'dry-run' if dry_run else 'create'} {body['kind']} {name}")
        if dry_run and self.refuse_dry_run:
            raise self.refuse_dry_run.pop(0)
        assert problems(body) == []
        if (kind.plural, name) in self.objects:
            raise Exists(name)
        return copy.deepcopy(body) if dry_run else self.put(kind, body)

    def patch(self, kind: Kind, name: str, change: Json) -> Json:
        found = self.objects[kind.plural, name]
        version = change["metadata"].get("resourceVersion")
        if version is not None and version != found["metadata"]["resourceVersion"]:
            raise Conflict(name)
        self.calls.append(f"patch {found['kind']} {name}")
        _merge(found, {**change, "metadata": {k: v for k, v in change["metadata"].items() if k != "resourceVersion"}})
        self._touch(found)
        return copy.deepcopy(found)

    def delete(self, kind: Kind, name: str, *, uid: str, version: str = "") -> bool:
        found = self.objects.get((kind.plural, name))
        if found is None or found["metadata"]["uid"] != uid:
            return False
        if version and found["metadata"]["resourceVersion"] != version:
            raise Conflict(name)
        self.calls.append(f"delete {found['kind']} {name}")
        del self.objects[kind.plural, name]
        for key, one in list(self.objects.items()):
            owners = one["metadata"].get("ownerReferences", [])
            if not any(owner["uid"] == uid for owner in owners):
                continue
            if key[0] == "pods" and self.outlive:
                one["metadata"]["deletionTimestamp"] = "2026-11-22T00:00:00Z"
            elif len(owners) > 1:
                owners[:] = [owner for owner in owners if owner["uid"] != uid]
            else:
                del self.objects[key]
        return True

    def log(self, pod: str, container: str, *, since: str | None = None) -> Iterator[tuple[str, str]]:
        return iter(())

    # ------------------------------------------------------------ what operator and kubelet would do

    def put(self, kind: Kind, body: Json) -> Json:
        body = copy.deepcopy(body)
        self._count += 1
        body["metadata"].setdefault("uid", f"uid-{self._count}")
        self.objects[kind.plural, body["metadata"]["name"]] = body
        self._touch(body)
        return copy.deepcopy(body)

    def job(self) -> Json:
        """The newest job."""
        return [one for (plural, _), one in self.objects.items() if plural in JOB_PLURALS][-1]

    def condition(self, kind: str, message: str = "") -> None:
        job = self.job()
        job.setdefault("status", {})["conditions"] = [{"type": kind, "status": "True", "message": message}]
        self._touch(job)

    def pod(self, index: int, uid: str | None = None, node: str | None = "node-a", **status: Any) -> None:
        """Make or replace worker `index` of the newest job."""
        job = self.job()
        name = f"{job['metadata']['name']}-worker-{index}"
        reference = {"uid": job["metadata"]["uid"], "name": job["metadata"]["name"], "kind": job["kind"]}
        metadata = {
            "name": name,
            "uid": uid or f"{name}-uid",
            "labels": dict(job["metadata"]["labels"]),
            "ownerReferences": [reference],
        }
        self.objects["pods", name] = {
            "kind": "Pod",
            "metadata": metadata,
            "spec": {**_containers(job), **({"nodeName": node} if node else {})},
            "status": {"phase": "Running", **status},
        }

    def _touch(self, body: Json) -> None:
        self._count += 1
        body["metadata"]["resourceVersion"] = str(self._count)


def _at(found: Json, path: str) -> Any:
    for key in path.split("."):
        found = found.get(key, {})
    return found


def _containers(job: Json) -> Json:
    """Names and images of the pods that the job itself describes."""
    template = next(iter(templates_in(job["spec"])), {"spec": {"containers": []}})
    return {"containers": [{key: one[key] for key in ("name", "image")} for one in template["spec"]["containers"]]}


def _merge(into: Json, change: Json) -> None:
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class MemoryView:
    """What the launcher's loop looks at, without watches: `act` is what happens on the cluster while it waits."""

    def __init__(self, api: MemoryApi, sleep: Callable[[float], None]):
        self.api, self.sleep = api, sleep
        self.act: Callable[[], None] = lambda: None
        self.said: list[Event] = []
        self.silent: float | None = None
        self.selected: Mapping[str, str] = {}
        self.closed = False

    def jobs(self) -> list[Json]:
        return [one for kind in JOB_KINDS for one in self.api.list(kind, self.selected)]

    def pods(self) -> list[Json]:
        return self.api.list(PODS, self.selected)

    def events(self) -> list[Event]:
        return self.said

    def note(self, kind: Kind, found: Json) -> None:
        pass

    def wait(self, seconds: float) -> None:
        self.sleep(seconds)
        self.act()

    def silent_since(self) -> float | None:
        return self.silent

    def close(self) -> None:
        self.closed = True


def ended(code: int, message: str = "", reason: str = "") -> Json:
    """Status of a pod whose container ended."""
    state = {"terminated": {"exitCode": code, "message": message, "reason": reason}}
    return {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"state": state}]}


def waiting(reason: str, message: str = "") -> Json:
    return {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}

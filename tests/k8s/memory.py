"""A small API server in memory, for the launcher's decisions: names, uids, resource versions, label selectors.

What a real server does beyond that (admission, quota, garbage collection, operators) is tested on a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from k8s.client import PODS, Conflict, Exists, Json, Kind, kind_of
from k8s.schemas.validate import problems
from trainer.errors import ClusterError


class MemoryApi:
    """`on_poll` is called at every read of a job, with the number of reads so far: the test's script."""

    def __init__(self, on_poll: Callable[[MemoryApi, int], None] | None = None):
        self.objects: dict[tuple[str, str], Json] = {}
        self.calls: list[str] = []
        self.refuse_dry_run = ""
        self._on_poll, self._polls, self._count = on_poll, 0, 0

    # ------------------------------------------------------------ Api

    def get(self, kind: Kind, name: str) -> Json | None:
        if kind != PODS and kind.plural in ("pytorchjobs", "jobs"):
            self._polls += 1
            if self._on_poll is not None:
                self._on_poll(self, self._polls)
        return copy.deepcopy(self.objects.get((kind.plural, name)))

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
            raise ClusterError("the cluster refused a request", got=self.refuse_dry_run)
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

    def delete(self, kind: Kind, name: str, *, uid: str) -> bool:
        found = self.objects.get((kind.plural, name))
        if found is None or found["metadata"]["uid"] != uid:
            return False
        self.calls.append(f"delete {found['kind']} {name}")
        del self.objects[kind.plural, name]
        for key, one in list(self.objects.items()):
            if any(owner["uid"] == uid for owner in one["metadata"].get("ownerReferences", [])):
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
        return [one for (plural, _), one in self.objects.items() if plural in ("pytorchjobs", "jobs")][-1]

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
            "spec": {"nodeName": node} if node else {},
            "status": {"phase": "Running", **status},
        }

    def _touch(self, body: Json) -> None:
        self._count += 1
        body["metadata"]["resourceVersion"] = str(self._count)


def _merge(into: Json, change: Json) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def ended(code: int, message: str = "", reason: str = "") -> Json:
    """Container statuses of a pod whose container ended."""
    return {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "message": message, "reason": reason}}}]}


def waiting(reason: str, message: str = "") -> Json:
    return {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}

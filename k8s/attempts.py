"""One attempt on the cluster: found, taken over, created, marked as watched, removed.

Order of creation: everything that the server can refuse is asked first (dry runs), then the job, then its ConfigMap,
which the job owns from its first moment. A launcher that dies in between leaves a job whose pods wait for the ConfigMap
until the next launcher adds it, and never a ConfigMap that nobody owns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from k8s import names
from k8s.client import Api, Conflict, Exists, Json, QuotaExceeded, kind_of
from k8s.cluster import quantity
from k8s.names import Run
from k8s.pytorchjob import Rendered, differences
from trainer.errors import ClusterError

NUM_TRIES = 10
NEVER = "never"


class Attempts:
    """Calls about the jobs of one run's step.

    Args:
        launcher: who watches; "never" for a job that is created and left alone.
    """

    def __init__(self, api: Api, run: Run, *, launcher: str, say: Callable[[str], None]):
        self.api, self.run, self.launcher, self.say = api, run, launcher, say
        self._renewals = 0

    # ------------------------------------------------------------ take over

    def adopt(self, job: Json, rendered: Rendered) -> Json:
        """Take over a job that is under way, if it is the one that we would create.

        Raises:
            ClusterError: it is another one; every field that differs is named.
        """
        name = job["metadata"]["name"]
        for _ in range(NUM_TRIES):
            refuse_another(rendered.job, job)
            try:
                job = self.api.patch(kind_of(job), name, self._taking(job))
            except Conflict:
                again = self.api.get(kind_of(job), name)
                if again is None:
                    raise ClusterError("the job to adopt is gone", where=name, do="run again") from None
                job = again
                continue
            self.give_config_map(rendered.config_map, job)
            self.say(f"adopted {name}")
            return job
        raise ClusterError("the job changes faster than it can be adopted", where=name, do="run again")

    def _taking(self, job: Json) -> Json:
        """Ours, by a patch that fails when somebody else was quicker."""
        marks: Json = {names.OWNER: self.run.id, names.LAUNCHER: self.launcher, names.RENEWED: self._renewal()}
        metadata: Json = {"resourceVersion": job["metadata"]["resourceVersion"], "annotations": marks}
        # Without an owner of our own the one before goes as well: its deletion would delete the job under us.
        metadata["ownerReferences"] = [self.run.owner.reference()] if self.run.owner is not None else None
        change: Json = {"metadata": metadata}
        if names.SUSPENDED in job["metadata"].get("annotations", {}):
            marks[names.SUSPENDED] = None
            change["spec"] = suspension(job, False)
        return change

    def _renewal(self) -> str:
        """Another text each time: the reaper counts changes and reads no clock."""
        if self.launcher == NEVER:
            return NEVER
        self._renewals += 1
        return f"{self.launcher}/{self._renewals}"

    def renew(self, job: Json) -> Json | None:
        """Say that somebody watches; the job as it is now, None when that has to wait."""
        try:
            marks = {names.RENEWED: self._renewal()}
            return self.api.patch(kind_of(job), job["metadata"]["name"], {"metadata": {"annotations": marks}})
        except Conflict:
            return None

    def let_go(self, job: Json) -> None:
        """Nobody promises to watch it any more, and that is meant."""
        try:
            self.api.patch(kind_of(job), job["metadata"]["name"], {"metadata": {"annotations": {names.RENEWED: NEVER}}})
        except Conflict:
            return  # gone

    def still_ours(self, job: Json) -> None:
        """Of two launchers for one job, the one that took it over goes on."""
        marks = job["metadata"].get("annotations", {})
        refuse_suspended(job, do="qwenvl job watch resumes it")
        if (marks.get(names.OWNER), marks.get(names.LAUNCHER)) != (self.run.id, self.launcher):
            raise ClusterError(
                "another run took the job over",
                where=job["metadata"]["name"],
                got=f"owner {marks.get(names.OWNER)}, launcher {marks.get(names.LAUNCHER)}",
                expected=f"owner {self.run.id}, launcher {self.launcher}",
                do="follow that run; running this one again takes the job back",
            )

    # ------------------------------------------------------------ create

    def create(self, rendered: Rendered) -> Json:
        """The job, asked for before it is made; one that is there under this name already is adopted.

        Raises:
            QuotaExceeded: a ResourceQuota has no room now.
            ClusterError: the cluster refuses it for good.
        """
        rendered.job["metadata"]["annotations"] |= {names.LAUNCHER: self.launcher, names.RENEWED: self._renewal()}
        self.dry_run(rendered)
        try:
            job = self.api.create(rendered.job)
        except Exists:  # a launcher beside us was quicker, or our own request was answered into the void
            found = self.api.get(kind_of(rendered.job), rendered.name)
            if found is None:
                raise ClusterError(
                    "the job vanished while it was created", where=rendered.name, do="run again"
                ) from None
            return self.adopt(found, rendered)
        try:
            self.give_config_map(rendered.config_map, job)
        except ClusterError:  # a job without its recipe would hold GPUs for nothing
            self.remove(job)
            raise
        self.say(f"created {rendered.name}")
        return job

    def dry_run(self, rendered: Rendered) -> None:
        """Unknown fields, Pod Security, LimitRange, quota and priority class are refused here, by the field's name."""
        job = rendered.job
        template = template_of(job)
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        about = {"name": f"{rendered.name}-worker-0", "namespace": job["metadata"]["namespace"]}
        pod["metadata"] = {**template["metadata"], **about}
        for body in (rendered.config_map, job, pod):
            try:
                self.api.create(body, dry_run=True)
            except Exists:
                continue  # decided when it is created

    def give_config_map(self, config_map: Json, job: Json) -> None:
        """There is one, and the job is among its owners: it goes when its last job goes."""
        kind, name = kind_of(config_map), config_map["metadata"]["name"]
        reference = {key: job[key] for key in ("apiVersion", "kind")}
        reference |= {key: job["metadata"][key] for key in ("name", "uid")}
        for _ in range(NUM_TRIES):
            found = self.api.get(kind, name)
            try:
                if found is None:
                    owned = {**config_map["metadata"], "ownerReferences": [reference]}
                    self.api.create({**config_map, "metadata": owned})
                    return
                owners = found["metadata"].get("ownerReferences", [])
                if any(one["uid"] == reference["uid"] for one in owners):
                    return
                metadata = {
                    "resourceVersion": found["metadata"]["resourceVersion"],
                    "ownerReferences": [*owners, reference],
                }
                self.api.patch(kind, name, {"metadata": metadata})
                return
            except (Conflict, Exists):
                continue
        raise ClusterError("the ConfigMap changes faster than it can be owned", where=name, do="run again")

    # ------------------------------------------------------------ remove

    def remove(self, job: Json) -> bool:
        return self.api.delete(kind_of(job), job["metadata"]["name"], uid=job["metadata"]["uid"])


def refuse_another(wanted: Json, found: Json) -> None:
    """Raises ClusterError with the difference when `found` is not the job that we mean."""
    marks = found["metadata"].get("annotations", {})
    if marks.get(names.SPEC) == wanted["metadata"]["annotations"][names.SPEC]:
        return
    if lines := differences(wanted, found):
        raise ClusterError(
            "a job of this name is under way, and it is another one",
            where=f"{found['kind']} {found['metadata'].get('namespace')}/{found['metadata']['name']}",
            got="\n".join(lines[:20]),
            do="wait for it, stop it, or ask for what it does; the next attempt may differ in image and nodes",
        )


def template_of(job: Json) -> Json:
    spec = job["spec"]
    return spec["pytorchReplicaSpecs"]["Worker"]["template"] if "pytorchReplicaSpecs" in spec else spec["template"]


def container_of(job: Json) -> str:
    return template_of(job)["spec"]["containers"][0]["name"]


def refuse_suspended(job: Json, *, do: str) -> None:
    """ClusterError when a person suspended the job, which others than Kueue cannot undo by themselves."""
    if names.SUSPENDED in job["metadata"].get("annotations", {}):
        raise ClusterError("the job was suspended by a person", where=job["metadata"]["name"], do=do)


def suspension(job: Json, suspend: bool) -> Json:
    """The part of a spec that suspends or resumes it."""
    return {"runPolicy": {"suspend": suspend}} if "pytorchReplicaSpecs" in job["spec"] else {"suspend": suspend}


def attempt_of(job: Json) -> int:
    return int(job["metadata"]["labels"][names.ATTEMPT])


def excluded_by(job: Json) -> tuple[str, ...]:
    return tuple(filter(None, job["metadata"].get("annotations", {}).get(names.EXCLUDED, "").split(",")))


def pods_of(job: Json, pods: Sequence[Json]) -> list[Json]:
    """The pods of this very job: one that was deleted and made again under its name has others."""
    uid = job["metadata"]["uid"]
    return [pod for pod in pods if any(one["uid"] == uid for one in pod["metadata"].get("ownerReferences", []))]


# ---------------------------------------------------------------- quota


def never_fits(error: QuotaExceeded, num_pods: int) -> bool:
    """Whether the pods together ask for more than the quota's whole, from the server's words:

    exceeded quota: NAME, requested: requests.cpu=8,pods=1, used: requests.cpu=4,pods=3, limited: requests.cpu=10,pods=9
    """
    asked, limited = _amounts(str(error.got), "requested"), _amounts(str(error.got), "limited")
    return any(
        asked[name] * (num_pods if _of_pods(name) else 1) > limited[name] for name in asked.keys() & limited.keys()
    )


def _of_pods(name: str) -> bool:
    """Whether every pod asks for it; of jobs and ConfigMaps there is one."""
    return name == "count/pods" or not (name.startswith("count/") or name == "configmaps")


def _amounts(message: str, what: str) -> dict[str, float]:
    found = re.search(rf"{what}: ([^\s]+=[^\s]+)", message)
    made = {}
    for part in found[1].strip(",").split(",") if found else ():
        name, _, amount = part.partition("=")
        try:
            made[name] = quantity(amount)
        except ValueError:
            continue
    return made

"""One attempt on the cluster: found, taken over, created, marked as watched, removed.

Order of creation: everything that the server can refuse is asked first (dry runs), then the job, then its ConfigMap,
which the job owns from its first moment. A launcher that dies in between leaves a job whose pods wait for the ConfigMap
until the next launcher adds it, and never a ConfigMap that nobody owns. Only what a TrainJob must find when it is
created, its runtime, comes first; one that a dead launcher left holds nothing and is replaced by the next.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

from k8s import names
from k8s.client import Api, Conflict, Exists, Json, QuotaExceeded, kind_of
from k8s.cluster import quantity
from k8s.kinds import marked, runtime_of, suspension
from k8s.names import Run
from k8s.pytorchjob import Rendered, differences
from k8s.seen import read
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
            self.refuse_another(rendered, job)
            try:
                job = self.api.patch(kind_of(job), name, self._taking(job))
            except Conflict:
                again = self.api.get(kind_of(job), name)
                if again is None:
                    raise ClusterError("the job to adopt is gone", where=name, do="run again") from None
                job = again
                continue
            self._give_all(rendered, job)
            self.say(f"adopted {name}")
            return job
        raise ClusterError("the job changes faster than it can be adopted", where=name, do="run again")

    def refuse_another(self, rendered: Rendered, job: Json) -> None:
        """
        Raises:
            ClusterError: `job` is not the one that we mean; every field that differs is named.
        """
        if (place := runtime_of(job)) is not None and rendered.runtime is not None and _another(rendered.job, job):
            runtime = self.api.get(*place)
            if runtime is not None:
                refuse_another(rendered.runtime, runtime)
        refuse_another(rendered.job, job)

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
        refuse_suspended(job, do="qwenvl job watch resumes it")
        _refuse_taken(job, (self.run.id, self.launcher))

    # ------------------------------------------------------------ create

    def create(self, rendered: Rendered) -> Json:
        """The job, asked for before it is made; one that is there under this name already is adopted, by a launcher
        that watches. Who creates and leaves leaves that one as it is, and raises Exists.

        Raises:
            QuotaExceeded: a ResourceQuota has no room now.
            ClusterError: the cluster refuses it for good.
        """
        rendered = marked(rendered, uuid.uuid4().hex[:8])
        rendered.job["metadata"]["annotations"] |= {names.LAUNCHER: self.launcher, names.RENEWED: self._renewal()}
        self.dry_run(rendered)
        try:
            self._make_room(rendered)
            job = self.api.create(rendered.job)
        except Exists:  # a launcher beside us was quicker, or our own request was answered into the void
            found = self.api.get(kind_of(rendered.job), rendered.name)
            if found is None:
                raise ClusterError(
                    "the job vanished while it was created", where=rendered.name, do="run again"
                ) from None
            if self.launcher == NEVER:
                self.refuse_another(rendered, found)
                raise Exists(rendered.name) from None
            return self.adopt(found, rendered)
        except ClusterError:
            self._remove_runtime(rendered)
            raise
        try:
            self._give_all(rendered, job)
        except ClusterError:  # a job without its recipe would hold GPUs for nothing
            self.remove(job)
            raise
        self.say(f"created {rendered.name}")
        return job

    def dry_run(self, rendered: Rendered) -> None:
        """Unknown fields, Pod Security, LimitRange, quota and priority class are refused here, by the field's name."""
        about = {"namespace": rendered.job["metadata"]["namespace"]}
        pods = [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                **template,
                "metadata": {**template["metadata"], **about, "name": f"{rendered.name}-worker-{index}"},
            }
            for index, template in enumerate(rendered.templates())
        ]
        # Without its runtime a TrainJob would be refused.
        for body in (rendered.config_map, rendered.runtime or rendered.job, *pods):
            try:
                self.api.create(body, dry_run=True)
            except Exists:
                continue  # decided when it is created

    def _make_room(self, rendered: Rendered) -> None:
        """The runtime, if the job needs one. Raises Exists when the job is there."""
        runtime = rendered.runtime
        for _ in range(NUM_TRIES):
            try:
                if runtime is not None:
                    self.api.create(runtime)
                return
            except Exists:
                if self.api.get(kind_of(rendered.job), rendered.name) is not None:
                    raise
                self._remove_runtime(rendered)  # of a launcher that died here, or of a job that went
        what = "the runtime of a job that went does not go"
        raise ClusterError(what, where=f"TrainingRuntime {rendered.name}", do="run again in a minute")

    def _remove_runtime(self, rendered: Rendered) -> None:
        """Unless the job that it is for is there."""
        if rendered.runtime is None or self.api.get(kind_of(rendered.job), rendered.name) is not None:
            return
        kind = kind_of(rendered.runtime)
        if (found := self.api.get(kind, rendered.name)) is not None:
            self.api.delete(kind, rendered.name, uid=found["metadata"]["uid"])

    def _give_all(self, rendered: Rendered, job: Json) -> None:
        if (mark := job["metadata"].get("labels", {}).get(names.CREATION)) is not None:
            rendered = marked(rendered, mark)
        for body in (rendered.config_map, rendered.runtime):
            if body is not None:
                self.give(body, job)

    def give(self, body: Json, job: Json) -> None:
        """The object is there, and the job is among its owners: it goes when its last job goes."""
        kind, name = kind_of(body), body["metadata"]["name"]
        reference = {key: job[key] for key in ("apiVersion", "kind")}
        reference |= {key: job["metadata"][key] for key in ("name", "uid")}
        for _ in range(NUM_TRIES):
            found = self.api.get(kind, name)
            try:
                if found is None:
                    owned = {**body["metadata"], "ownerReferences": [reference]}
                    self.api.create({**body, "metadata": owned})
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
        raise ClusterError(f"the {body['kind']} changes faster than it can be owned", where=name, do="run again")

    # ------------------------------------------------------------ remove

    def remove(self, job: Json) -> bool:
        """Whether it was deleted. What another launcher takes over between the look and the deletion stays.

        Raises:
            ClusterError: somebody took it over.
        """
        return delete_as_seen(self.api, job, lambda found: _refuse_taken(found, _holder(job)))


def delete_as_seen(api: Api, job: Json, wanted: Callable[[Json], bool]) -> bool:
    """Whether the job was deleted, as what it is now: between our look and the deletion another run may take it over.
    One that has ended meanwhile stays to be read.

    Args:
        wanted: asked of every version that is looked at.
    """
    kind, name, uid = kind_of(job), job["metadata"]["name"], job["metadata"]["uid"]
    for _ in range(NUM_TRIES):
        if not wanted(job):
            return False
        try:
            return api.delete(kind, name, uid=uid, version=job["metadata"]["resourceVersion"])
        except Conflict:
            found = api.get(kind, name)
        if found is None or found["metadata"]["uid"] != uid or read(found, []).outcome is not None:
            return False
        job = found
    raise ClusterError("the job changes faster than it can be removed", where=name, do="run again")


def _holder(job: Json) -> tuple[str | None, str | None]:
    """(owner, launcher)."""
    marks = job["metadata"].get("annotations", {})
    return marks.get(names.OWNER), marks.get(names.LAUNCHER)


def _refuse_taken(job: Json, holder: tuple[str | None, str | None]) -> bool:
    """True while the job is the holder's; of two launchers the one that took it over goes on."""
    if (now := _holder(job)) != holder:
        raise ClusterError(
            "another run took the job over",
            where=job["metadata"]["name"],
            got=f"owner {now[0]}, launcher {now[1]}",
            expected=f"owner {holder[0]}, launcher {holder[1]}",
            do="follow that run; running this one again takes the job back",
        )
    return True


def _another(wanted: Json, found: Json) -> bool:
    marks = found["metadata"].get("annotations", {})
    return marks.get(names.SPEC) != wanted["metadata"]["annotations"][names.SPEC]


def refuse_another(wanted: Json, found: Json) -> None:
    """Raises ClusterError with the difference when `found` is not the object that we mean."""
    if not _another(wanted, found):
        return
    if lines := differences(wanted, found):
        raise ClusterError(
            "a job of this name is under way, and it is another one",
            where=f"{found['kind']} {found['metadata'].get('namespace')}/{found['metadata']['name']}",
            got="\n".join(lines[:20]),
            do="wait for it, stop it, or ask for what it does; the next attempt may differ in image and nodes",
        )


def refuse_suspended(job: Json, *, do: str) -> None:
    """ClusterError when a person suspended the job, which others than Kueue cannot undo by themselves."""
    if names.SUSPENDED in job["metadata"].get("annotations", {}):
        raise ClusterError("the job was suspended by a person", where=job["metadata"]["name"], do=do)


def attempt_of(job: Json) -> int:
    return int(job["metadata"]["labels"][names.ATTEMPT])


def excluded_by(job: Json) -> tuple[str, ...]:
    return tuple(filter(None, job["metadata"].get("annotations", {}).get(names.EXCLUDED, "").split(",")))


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

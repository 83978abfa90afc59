"""What a test has of the cluster: a namespace with what the chart installs, an output in S3, launchers.

A launcher runs in a thread of the test with the service account's token, or as a process of its own that can be killed
(launching.py); both run k8s/launcher.py as it is. `Bench` reads and disturbs the cluster as its administrator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from k8s import names
from k8s.cleanup import remove_owned
from k8s.client import CONFIG_MAPS, JOBS, PODS, PYTORCH_JOBS, Kind, KubernetesApi, kind_of
from k8s.cluster import Cluster
from k8s.tools import tool
from tests.cluster import place
from tests.cluster.between import Relay
from tests.cluster.launching import api_of, commits, launch
from trainer import storage

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "qwenvl-train"
SECRET = "qwenvl-train-s3"
PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))
"""What tests wait for may take so many times as long: on a machine that others load."""
Json = dict[str, Any]
KINDS = {
    "pytorchjobs": PYTORCH_JOBS,
    "jobs": JOBS,
    "pods": PODS,
    "configmaps": CONFIG_MAPS,
    "workloads": Kind("kueue.x-k8s.io/v1beta2", "workloads"),
    "services": Kind("v1", "services"),
    "endpointslices": Kind("discovery.k8s.io/v1", "endpointslices"),
    "secrets": Kind("v1", "secrets"),
    "claims": Kind("v1", "persistentvolumeclaims"),
    "leases": Kind("coordination.k8s.io/v1", "leases"),
    "networkpolicies": Kind("networking.k8s.io/v1", "networkpolicies"),
}
"""All that a run may make in a namespace, or somebody for it."""
NAMESPACE_HERE = "namespace-of-a-test"
OF_THE_NAMESPACE = {"configmaps/kube-root-ca.crt"}


@dataclass
class Launching:
    """A launcher at work in a thread: what it said, when, and how it ended."""

    thread: threading.Thread
    said: list[tuple[float, str]] = field(default_factory=list)
    error: BaseException | None = None

    def lines(self) -> list[str]:
        return [line for _, line in self.said]

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    def when(self, text: str) -> float:
        """Monotonic time of the first line with this text."""
        return next(moment for moment, line in self.said if text in line)

    def ended(self, limit_s: float = 180.0) -> BaseException | None:
        """Wait for its end; the error that it raised, None when the step is done."""
        self.thread.join(limit_s * PATIENCE)
        assert not self.thread.is_alive(), "the launcher did not end:\n" + "\n".join(self.lines()[-30:])
        return self.error

    def done(self, limit_s: float = 180.0) -> None:
        error = self.ended(limit_s)
        assert error is None, f"{error}\n" + "\n".join(self.lines()[-40:])


@dataclass(frozen=True)
class Bench:
    """One test's namespace."""

    namespace: str
    cluster: Cluster
    out: str
    admin: Path
    launcher: Path
    """Kubeconfigs: the administrator's and the launcher's."""
    launchings: list[Launching] = field(default_factory=list)

    # ------------------------------------------------------------ another one

    def with_cluster(self, change: Json) -> Bench:
        """With another cluster file: {"limits": {"schedule_s": 8}} is merged into this one's."""
        content = _merged(self.cluster.model_dump(mode="json"), change)
        return dataclasses.replace(self, cluster=Cluster.model_validate(content))

    def limited(self, **limits: int) -> Bench:
        return self.with_cluster({"limits": limits})

    def other_out(self) -> Bench:
        return dataclasses.replace(self, out=f"{self.out}-other")

    def through(self, api: Relay) -> Bench:
        """Launchers reach the API server through a relay."""
        content = json.loads(self.launcher.read_text())
        content["clusters"][0]["cluster"]["server"] = f"https://{api.address}"
        path = self.launcher.with_name("relayed.kubeconfig")
        path.write_text(json.dumps(content))
        return dataclasses.replace(self, launcher=path)

    # ------------------------------------------------------------ the administrator

    def kubectl(self, *arguments: object, text: str | None = None, check: bool = True) -> str:
        command = [str(tool("kubectl")), "--kubeconfig", str(self.admin), "-n", self.namespace, *map(str, arguments)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    @property
    def api(self) -> KubernetesApi:
        """As the administrator; a look costs milliseconds where kubectl costs a tenth of a second of CPU."""
        return _api(str(self.admin), self.namespace)

    @property
    def core(self) -> Any:
        return core_of(str(self.admin))

    def end_pods(self, limit_s: float = 90.0) -> None:
        """Without their grace: the next test shares the machine with what is left of this one."""

        def none_left() -> bool:
            if not self.items("pods"):
                return True
            self.core.delete_collection_namespaced_pod(self.namespace, grace_period_seconds=1)
            return False

        self.until("the end of all pods", none_left, limit_s)

    def items(self, kind: str) -> list[Json]:
        return self.api.list(KINDS[kind], {})

    def objects(self) -> set[str]:
        """KIND/NAME of all that somebody may have left here."""
        return {f"{kind}/{one['metadata']['name']}" for kind in KINDS for one in self.items(kind)}

    def apply(self, *objects: Json) -> None:
        self.kubectl("apply", "-f", "-", text=yaml.safe_dump_all(objects))

    def jobs(self) -> list[Json]:
        """PyTorchJobs, oldest attempt first."""
        return sorted(self.items("pytorchjobs"), key=lambda job: int(job["metadata"]["labels"][names.ATTEMPT]))

    def pods(self, attempt: int = 1, step: str = "sft") -> list[Json]:
        labels = {names.ATTEMPT: str(attempt), names.STEP: step}
        return sorted(self.api.list(PODS, labels), key=lambda pod: pod["metadata"]["name"])

    def until(self, what: str, ready: Callable[[], Any], limit_s: float = 90.0) -> Any:
        """Poll until `ready` gives something true, which is returned; not for long once every launcher has given up."""
        limit_s *= PATIENCE
        end = time.monotonic() + limit_s
        at_work = any(one.error is None for one in self.launchings)
        while not (found := ready()):
            if at_work and all(one.error is not None for one in self.launchings):
                at_work, end = False, min(end, time.monotonic() + 3)
            assert time.monotonic() < end, f"{what} did not come in {limit_s:.0f} s\n{self.picture()}"
            time.sleep(0.25)
        return found

    def running(self, attempt: int = 1, count: int = 2, step: str = "sft") -> list[Json]:
        """The pods of an attempt, once all of them run."""

        def look() -> list[Json] | None:
            pods = self.pods(attempt, step)
            return pods if sum(pod["status"].get("phase") == "Running" for pod in pods) == count else None

        return self.until(f"{count} running pods of attempt {attempt}", look)

    def picture(self) -> str:
        """For people, when a test fails."""
        told = [line for one in self.launchings for line in [*one.lines()[-20:], repr(one.error)]]
        state = self.kubectl("get", "pytorchjobs,jobs,pods,services,configmaps,workloads", "-o", "wide", check=False)
        events = self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)
        return "\n".join(["-- launchers", *told, "-- state", state, "-- events", events])

    # ------------------------------------------------------------ the launcher

    def launch(self, payload: Json, **options: Any) -> Launching:
        """A stage of two workers that runs payload.py; see launching.launch for the options."""
        return self.start(lambda say: launch(self.spec(payload, **options), say))

    def spec(self, payload: Json, **options: Any) -> Json:
        return {
            "cluster": self.cluster.model_dump(mode="json"),
            "out": self.out,
            "kubeconfig": str(self.launcher),
            "payload": payload,
            **options,
        }

    def start(self, work: Callable[[Callable[[str], None]], None]) -> Launching:
        launching: Launching

        def run() -> None:
            try:
                work(lambda line: launching.said.append((time.monotonic(), line)))
            except BaseException as error:
                launching.error = error

        launching = Launching(threading.Thread(target=run, name=f"launcher-{self.namespace}", daemon=True))
        self.launchings.append(launching)
        launching.thread.start()
        return launching

    @contextlib.contextmanager
    def process(self, payload: Json, *, s3: str | None = None, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """The launcher as a process, to be killed; what it says is in `told`. s3: HOST:PORT of its way to storage."""
        spec = self.launcher.with_name("spec.json")
        spec.write_text(json.dumps(self.spec(payload, **options)))
        disturbed = {"AWS_ENDPOINT_URL": f"http://{s3}"} if s3 else {}
        with self.program("tests.cluster.launching", str(spec), **disturbed) as process:
            yield process

    @contextlib.contextmanager
    def program(self, module: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program of ours as a process, to be killed; what it says is in `told`."""
        command = [sys.executable, "-m", module, *arguments]
        with self.told.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **env})
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def told(self) -> Path:
        return self.launcher.with_name("told.log")

    def heard(self, text: str) -> bool:
        """Whether the launcher's process has said it."""
        return text in self.told.read_text(errors="replace")

    def audited(self) -> Iterator[Json]:
        """What the launcher's account asked of the API server in this namespace, by its audit log."""
        user = f"system:serviceaccount:{self.namespace}:{self.cluster.accounts.launcher}"
        with place.AUDIT.open() as lines:
            yield from (
                event for line in lines if user in line and (event := json.loads(line))["user"]["username"] == user
            )

    # ------------------------------------------------------------ the output

    def result(self, stage: str = "sft") -> Json:
        return storage.read_json(storage.join(self.out, stage, "payload", "done.json"))

    def let_end(self, stage: str = "sft") -> None:
        """A payload without `steps` works until this."""
        storage.write_json(storage.join(self.out, stage, "payload", "go"), {})

    def commits(self, stage: str = "sft") -> list[int]:
        return commits(storage.join(self.out, stage))


def _merged(content: Json, change: Json) -> Json:
    made = dict(content)
    for key, value in change.items():
        known = made.get(key)
        made[key] = _merged(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return made


@functools.cache
def _api(kubeconfig: str, namespace: str) -> KubernetesApi:
    return api_of(kubeconfig, namespace)


@functools.cache
def client_of(kubeconfig: str) -> Any:
    """The official client; imported where it is needed, since collecting these tests is part of make test."""
    from kubernetes import client, config

    configuration = client.Configuration()
    config.load_kube_config(kubeconfig, client_configuration=configuration)
    return client.ApiClient(configuration)


def core_of(kubeconfig: str) -> Any:
    from kubernetes import client

    return client.CoreV1Api(client_of(kubeconfig))


def create(kubeconfig: str, objects: Iterable[Json]) -> None:
    from kubernetes import utils

    for one in objects:
        utils.create_from_dict(client_of(kubeconfig), one)


def token_of(kubeconfig: str, namespace: str, account: str) -> str:
    """Of a service account, for two hours."""
    body = {"spec": {"audiences": [], "expirationSeconds": 7200}}
    return core_of(kubeconfig).create_namespaced_service_account_token(account, namespace, body).status.token


def nothing_left(bench: Bench, before: set[str], limit_s: float = 90.0) -> None:
    """Clean-up as the exit task of a pipeline does it, for every run; finished jobs go as their TTL would have it.
    After that nothing is there that was not there before the test, and no launcher goes on."""
    jobs = [*bench.items("pytorchjobs"), *bench.items("jobs")]
    marks = [job["metadata"].get("annotations", {}) for job in jobs]
    for out, owner in sorted({(one[names.OUT], one[names.OWNER]) for one in marks if names.OUT in one}):
        remove_owned(bench.api, out=out, owner=owner)
    for job in jobs:
        bench.api.delete(kind_of(job), job["metadata"]["name"], uid=job["metadata"]["uid"])
    bench.end_pods(limit_s)
    for one in bench.launchings:
        one.ended(limit_s)
    bench.until("an empty namespace", lambda: not bench.objects() - before - OF_THE_NAMESPACE, limit_s)


@functools.cache
def _chart(kinds: tuple[str, ...]) -> str:
    """Role, binding and service accounts as the chart installs them into a namespace `NAMESPACE_HERE`."""
    command = [str(tool("helm")), "template", "qwenvl", str(CHART), "--namespace", NAMESPACE_HERE]
    command += ["--show-only", "templates/rbac.yaml", "--show-only", "templates/serviceaccounts.yaml"]
    command += [word for kind in kinds for word in ("--set", f"rbac.kinds.{kind}=true")]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def chart(namespace: str, *kinds: str) -> list[Json]:
    """What the chart installs into a namespace for the launcher. kinds: of its values rbac.kinds."""
    return [one for one in yaml.safe_load_all(_chart(kinds).replace(NAMESPACE_HERE, namespace)) if one]

"""A real Kubeflow Pipelines and its cluster: what the environment names (README.md has the variables), else our own."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from k8s import names
from k8s.client import JOBS, PODS, PYTORCH_JOBS, Json, KubernetesApi, connect
from k8s.cluster import load_cluster
from k8s.seen import read
from pipelines.remote import DEFAULT_NAMESPACE, ENDED, IMPLEMENTATION, RUN_LABEL, Place, client_of
from pipelines.submit import Asked, submit
from tests.cluster import lifecycle
from tests.cluster.place import KUBECONFIG
from tests.cluster.processes import enter
from tests.kfp import backend
from trainer.errors import UsageError
from trainer.resolve import load_recipe

NEEDED = ("KUBECONFIG", "KFP_CLUSTER", "KFP_OUT")
"""Beside KFP_ENDPOINT, where that names somebody's."""
RECIPE = "tiny_smoke"
STAGES = tuple(load_recipe(RECIPE).stages.named())
FIRST = STAGES[0]
ONE_STAGE = tuple(f"stages.{stage}=null" for stage in STAGES[1:])
"""Overrides for tests that need one stage only; the pipeline's steps are the same."""
EXPERIMENT = "qwenvl-tests"
MANAGED = {"app.kubernetes.io/managed-by": f"{names.PREFIX}-launcher"}


@dataclass(frozen=True)
class Reached:
    """A Kubeflow Pipelines that answers, as the README's variables say."""

    place: Place
    cluster: str
    out: str
    overrides: tuple[str, ...]
    service_account: str | None


@pytest.fixture(scope="session")
def reached() -> Iterator[Reached]:
    """KFP_ENDPOINT's; without it our own, on the test cluster, kept when it was up before."""
    if endpoint := os.environ.get("KFP_ENDPOINT"):
        if missing := [name for name in NEEDED if not os.environ.get(name)]:
            raise UsageError("how is that cluster reached?", where=", ".join(missing), do="tests/kfp/README.md")
        yield Reached(
            place=Place(endpoint.rstrip("/"), os.environ.get("KFP_NAMESPACE") or None, os.environ.get("KFP_TOKEN")),
            cluster=Path(os.environ["KFP_CLUSTER"]).read_text(encoding="utf-8"),
            out=os.environ["KFP_OUT"].rstrip("/"),
            overrides=tuple(os.environ.get("KFP_SET", "").split()),
            service_account=os.environ.get("KFP_SERVICE_ACCOUNT"),
        )
        return
    was_up = lifecycle.current() is not None
    with pytest.MonkeyPatch.context() as patched:
        try:
            found = backend.current() or backend.up()
            enter()
            for name, value in {**found.storage, "KUBECONFIG": str(KUBECONFIG)}.items():
                patched.setenv(name, value)
            yield Reached(
                place=Place(backend.ENDPOINT),
                cluster=backend.as_yaml(found.cluster),
                out=f"s3://{backend.BUCKET}",
                overrides=tuple(f"stages.{stage}.compute.node_pool={backend.RANKS}" for stage in STAGES),
                service_account=None,
            )
        finally:
            if not was_up:
                lifecycle.down()


@dataclass
class RealKfp:
    """What a test does with it.

    Args:
        steps_api: pods of the pipeline's steps live in Kubeflow Pipelines' namespace, jobs in the cluster file's.
    """

    reached: Reached
    out: str
    api: KubernetesApi
    steps_api: KubernetesApi
    started: list[str] = field(default_factory=list)

    @property
    def place(self) -> Place:
        return self.reached.place

    def submit(self, *overrides: str, wait: bool) -> tuple[int, str]:
        """(exit code, run id) of the recipe into this test's output."""
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            print(line, flush=True)

        asked = Asked(
            recipe=RECIPE,
            out=self.out,
            cluster=self.reached.cluster,
            overrides=(*self.reached.overrides, *overrides),
            experiment=EXPERIMENT,
            service_account=self.reached.service_account,
        )
        code = submit(self.place, asked, wait=wait, say=say)
        self.started.append(said[2])
        return code, said[2]

    def run(self, run_id: str) -> Any:
        return client_of(self.place).get_run(run_id)

    def jobs(self) -> dict[str, Json]:
        """Every job into this output that the cluster has, by name."""
        found = [job for kind in (PYTORCH_JOBS, JOBS) for job in self.api.list(kind, MANAGED)]
        ours = [job for job in found if job["metadata"].get("annotations", {}).get(names.OUT, "") == self.out]
        return {job["metadata"]["name"]: job for job in ours}

    def under_way(self) -> dict[str, Json]:
        return {name: job for name, job in self.jobs().items() if read(job, []).outcome is None}

    def job_of(self, step: str) -> Json | None:
        """The newest job of a step."""
        found = [job for job in self.jobs().values() if job["metadata"]["labels"][names.STEP] == step]
        return max(found, key=lambda job: int(job["metadata"]["labels"][names.ATTEMPT]), default=None)

    def pods(self, step: str) -> list[Json]:
        """Pods of a step's jobs into this output that hold a node's resources."""
        uids = {job["metadata"]["uid"] for job in self.jobs().values()}
        found = self.api.list(PODS, {names.STEP: step})
        owned = [pod for pod in found if {one["uid"] for one in pod["metadata"].get("ownerReferences", [])} & uids]
        return [pod for pod in owned if pod["status"].get("phase") in ("Pending", "Running")]

    def launcher_pods(self, run_id: str) -> list[Json]:
        """Pods of the pipeline's steps that are running."""
        pods = self.steps_api.list(PODS, {RUN_LABEL: run_id})
        own = [pod for pod in pods if IMPLEMENTATION in pod["metadata"]["name"]]
        return [pod for pod in own if pod["status"].get("phase") == "Running"]

    def wait(self, what: str, found: Callable[[], Any], limit_s: float) -> Any:
        until = time.monotonic() + limit_s
        while not (answer := found()):
            assert time.monotonic() < until, f"not within {limit_s:.0f} s: {what}"
            time.sleep(2.0)
        return answer

    def running(self, step: str) -> Json | None:
        """The step's job once its ranks run."""
        job = self.job_of(step)
        pods = self.pods(step) if job is not None else []
        return job if pods and all(pod["status"]["phase"] == "Running" for pod in pods) else None


@pytest.fixture
def kfp(reached: Reached) -> Iterator[RealKfp]:
    made = RealKfp(
        reached=reached,
        out=f"{reached.out}/{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
        api=connect(load_cluster(reached.cluster).namespace),
        steps_api=connect(reached.place.namespace or DEFAULT_NAMESPACE),
    )
    yield made
    client = client_of(made.place)
    for run_id in made.started:
        if client.get_run(run_id).state not in ENDED:
            client.terminate_run(run_id)
    made.wait("every job of the test is gone or over", lambda: not made.under_way(), 120)

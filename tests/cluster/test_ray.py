"""Data preparation over several nodes: RayJobs that the real KubeRay operator runs, with head, workers and submitter.

The operator is built and started by the first of these tests (extras.py). Its pods are the product's, its status is
what k8s/seen.py reads.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator

import fsspec
import pytest
import yaml

from k8s.cleanup import reap, remove_owned, stop
from k8s.client import RAY_JOBS, Json, Kind
from k8s.kinds import kinds_of
from k8s.loop import Launcher
from k8s.names import Run
from k8s.tasks import task_of
from pipelines.settle import settle
from tests.cluster import extras
from tests.cluster.bench import OF_THE_NAMESPACE, PATIENCE, Bench, Launching
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from tests.cluster.test_rbac import granted, requests_of, role_of
from trainer import storage
from trainer.errors import ClusterError, DataError

pytestmark = [pytest.mark.cluster, pytest.mark.full]

STEP = "prepare-data"
ON_RAY = ["prepare.engine=ray"]
WORKERS = 2
LIMIT_S = 600
RAYJOBS = "ray.io/rayjobs"
CLUSTERS = Kind("ray.io/v1", "rayclusters")


@pytest.fixture
def ray(bench: Bench, reached: Reached) -> Iterator[Bench]:
    """A namespace whose launcher may create RayJobs, and where none is left."""
    if reached.own:
        extras.start(extras.KUBERAY)
    elif "rayjobs.ray.io" not in bench.kubectl("get", "crd", "-o", "name"):
        pytest.skip("KUBECONFIG's cluster has no KubeRay")
    bench.apply(role_of(bench, "rayjobs"))
    # A worker starts when its head has: on the way are KubeRay's init container, which has a fifth of a processor, and
    # probes that wait.
    made = bench.with_cluster({"ray": {"workers": WORKERS}, "limits": {"start_s": int(240 * PATIENCE)}})
    yield made
    for job in rayjobs(made):
        made.api.delete(RAY_JOBS, job["metadata"]["name"], uid=job["metadata"]["uid"])
    made.until("the end of all RayClusters", lambda: not rayjobs(made) and not made.api.list(CLUSTERS, {}))


def rayjobs(ray: Bench) -> list[Json]:
    return ray.api.list(RAY_JOBS, {})


def launched(ray: Bench, run_id: str, overrides: list[str] = ON_RAY) -> Launching:
    """The step by a launcher in a thread."""
    recipe = settle("tiny_smoke", overrides, out=ray.out)
    task = task_of(STEP, recipe, ray.cluster, Run(out=ray.out, id=run_id))
    api = api_of(str(ray.launcher), ray.namespace)
    return ray.start(lambda say: Launcher(api, ray.cluster, task, say=say).launch())


def at_work(ray: Bench) -> Json | None:
    """The RayJob, once Ray runs the step."""
    (job,) = rayjobs(ray) or [{}]
    return job if job.get("status", {}).get("jobStatus") == "RUNNING" else None


def names_of(ray: Bench) -> list[str]:
    """Of the head and its workers, once all are there."""
    found = [pod["metadata"]["name"] for pod in ray.pods(step=STEP)]
    return found if len(found) == 1 + WORKERS else []


def data_of(out: str) -> dict[str, str]:
    """sha256 of every file below OUT/data, by its name."""
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    root = f"{out.removeprefix('s3://')}/data"
    return {name.removeprefix(root): hashlib.sha256(files.cat_file(name)).hexdigest() for name in files.find(root)}


def test_a_preparation_survives_its_launcher_and_makes_the_bytes_of_the_native_engine(ray: Bench) -> None:
    before = ray.objects()
    file = ray.launcher.with_name("cluster.yaml")
    file.write_text(yaml.safe_dump(ray.cluster.model_dump(mode="json", exclude_none=True)))
    words = ["job", "watch", STEP, "--recipe", "tiny_smoke", "--set", *ON_RAY, "--cluster", str(file)]
    words += ["--out", ray.out, "--run-id", "run-1"]
    with ray.program("pipelines.cli.main", *words, KUBECONFIG=str(ray.launcher)) as watching:
        job = ray.until("the step at work", lambda: at_work(ray), LIMIT_S)
        watching.send_signal(signal.SIGKILL)
        watching.wait()
    again = launched(ray, "run-2")
    native = f"{ray.out}-native"
    words = [STEP, "--recipe", storage.join(ray.out, "recipe.json"), "--set", "prepare.engine=native", "--out", native]
    with ray.program("pipelines.prepare", *words) as alone:
        again.done(LIMIT_S)
        assert alone.wait(LIMIT_S) == 0, ray.told.read_text()
    assert again.heard("adopted") and again.heard("tokenizer: "), "the submitter's log is the step's"
    assert again.heard("Connecting to existing Ray cluster"), "whose head has no processors: workers do the work"
    (ended,) = rayjobs(ray)
    assert ended["metadata"]["uid"] == job["metadata"]["uid"]
    assert (ended["status"]["jobDeploymentStatus"], ended["status"]["jobStatus"]) == ("Complete", "SUCCEEDED")
    made, want = data_of(ray.out), data_of(native)
    assert made == want and sum(name.endswith(".tar") for name in made) > 5

    # Ray's pods go by themselves, the rest goes with the RayJob, which the reaper removes.
    ray.until("the end of Ray's pods", lambda: len(ray.items("pods")) == 1)
    api = api_of(str(ray.launcher), ray.namespace)
    looks = [list(reap(api, after=1, keep=1, kinds=kinds_of(ray.cluster))) for _ in range(2)]
    assert looks[0] == [] and looks[1][0].endswith("ended 1 looks ago"), looks
    ray.until("nothing that is left", lambda: not ray.objects() - before - OF_THE_NAMESPACE)
    assert rayjobs(ray) == [] and ray.api.list(CLUSTERS, {}) == []


def test_an_error_of_the_step_is_told_with_its_own_code_and_is_permanent(ray: Bench) -> None:
    absent = f"prepare.sources.captions.path={ray.out}/nobody-wrote-it.json"
    error = launched(ray, "run-1", [*ON_RAY, absent]).ended(LIMIT_S)
    assert isinstance(error, ClusterError) and error.code == DataError.code, error
    assert "nobody-wrote-it.json" in str(error) and "by its job's word" in str(error)
    (job,) = rayjobs(ray)
    assert (job["status"]["jobDeploymentStatus"], job["status"]["reason"]) == ("Failed", "AppFailed")


def test_one_that_a_person_suspended_comes_back_and_goes_with_its_terminated_run_by_the_charts_role(
    ray: Bench, reached: Reached
) -> None:
    before = ray.objects()
    api, kinds = api_of(str(ray.launcher), ray.namespace), kinds_of(ray.cluster)
    first = launched(ray, "run-1")
    pods = ray.until("Ray's pods", lambda: names_of(ray))
    assert len(stop(api, out=ray.out, suspend=True, kinds=kinds)) == 1
    assert "suspended by a person" in str(first.ended(60))
    ray.until("no pods", lambda: ray.items("pods") == [])
    second = launched(ray, "run-2")
    ray.until("other pods", lambda: names_of(ray))
    assert second.heard("adopted") and not set(pods) & set(names_of(ray))
    assert remove_owned(api, out=ray.out, owner="run-1", kinds=kinds) == []
    assert len(remove_owned(api, out=ray.out, owner="run-2", kinds=kinds)) == 1
    assert "the job is gone" in str(second.ended(60))
    ray.until("nothing that is left", lambda: not ray.objects() - before - OF_THE_NAMESPACE)
    assert rayjobs(ray) == [] and ray.api.list(CLUSTERS, {}) == []
    if reached.own:
        asked = list(requests_of(ray))
        assert [one for one in asked if one[2] in (401, 403)] == []
        ours = {one for one in granted(role_of(ray, "rayjobs")) if one[0] == RAYJOBS}
        used = {(resource, verb) for resource, verb, _ in asked if resource == RAYJOBS}
        assert used | {(RAYJOBS, "get")} == ours, "granted and not used; get is for what changes meanwhile"

"""A RayJob from creation to its end, by the status that KubeRay writes: adopted, watched, judged, removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from k8s import cleanup, names
from k8s.client import JOBS, PYTORCH_JOBS, RAY_JOBS, TRAIN_JOBS
from k8s.cluster import load_cluster
from k8s.kinds import KEPT, kinds_of
from k8s.names import Run
from k8s.seen import read
from k8s.tasks import Task, task_of
from tests.k8s.bench import OUT, Bench, nothing, script
from tests.k8s.memory import ended, waiting
from tests.k8s.operators import KubeRay, the_exit_message
from trainer.errors import ClusterError
from trainer.resolve import load_recipe

RECIPE = load_recipe("tiny", ["prepare.engine=ray"])
CLUSTER = load_cluster("test", ["ray={workers: 2}"])
KINDS = kinds_of(CLUSTER)


def a_task(run_id: str = "run-1") -> Task:
    return replace(task_of("prepare-data", RECIPE, CLUSTER, Run(out=OUT, id=run_id)), records=None)


def a_bench(run_id: str = "run-1", **more: object) -> tuple[Bench, KubeRay]:
    bench = Bench(run_id=run_id, cluster=CLUSTER, **more)  # type: ignore[arg-type]
    bench.task = lambda **_: a_task(bench.run_id)  # type: ignore[method-assign]
    return bench, KubeRay(bench.api)


def created(bench: Bench) -> list[str]:
    return [call.split()[2] for call in bench.api.calls if call.startswith("create RayJob")]


def work(ray: KubeRay) -> tuple[Callable[[], None], ...]:
    """From nothing to a step at work."""

    def starts() -> None:
        ray.pods(submitter=False, phase="Pending")
        ray.status("Initializing")

    def runs() -> None:
        ray.pods()
        ray.status("Running", "RUNNING")

    return starts, runs


# ---------------------------------------------------------------- which kind


@pytest.mark.parametrize(
    ("what", "engine", "ray", "want"),
    [
        ("prepare-data", "ray", "{workers: 2}", "RayJob"),
        ("prepare-stage", "ray", "{workers: 2}", "RayJob"),
        ("prepare-data", "native", "{workers: 2}", "Job"),
        ("prepare-data", "ray", "null", "Job"),
        ("requests", "ray", "{workers: 2}", "Job"),
    ],
)
def test_a_preparation_is_a_rayjob_where_recipe_and_cluster_both_say_so(
    what: str, engine: str, ray: str, want: str
) -> None:
    recipe = load_recipe("tiny", [f"prepare.engine={engine}"])
    cluster = load_cluster("test", [f"ray={ray}"])
    stage = None if what == "prepare-data" else "sft"
    task = task_of(what, recipe, cluster, Run(out=OUT, id="r"), stage=stage)
    assert task.render(task.run).job["kind"] == want


def test_only_what_the_cluster_file_chooses_is_looked_for() -> None:
    """Rights for the other kinds are not there by default."""
    assert kinds_of(load_cluster("test")) == (PYTORCH_JOBS, JOBS)
    assert KINDS == (PYTORCH_JOBS, JOBS, RAY_JOBS)
    assert kinds_of(load_cluster("test", ["job_kind=TrainJob"])) == (PYTORCH_JOBS, JOBS, TRAIN_JOBS)


# ---------------------------------------------------------------- a life


def test_it_is_asked_for_with_all_its_pods_and_done_when_ray_says_succeeded() -> None:
    bench, ray = a_bench()
    script(bench, *work(ray), nothing, lambda: ray.status("Complete", "SUCCEEDED"))
    bench.launch()
    assert [" ".join(call.split()[:2]) for call in bench.api.calls] == [
        *("dry-run ConfigMap", "dry-run RayJob", "dry-run Pod", "dry-run Pod", "dry-run Pod"),
        *("create RayJob", "create ConfigMap"),
    ]
    assert bench.heard("start: ") and bench.heard("run: at work") and bench.heard("done, attempt 1")


def test_a_lost_launchers_rayjob_is_adopted_with_its_config_map() -> None:
    first, ray = a_bench()
    launcher = first.launcher()
    launcher.attempts.create(launcher._rendered(1))
    for part in work(ray):
        part()
    second, _ = a_bench("run-2", api=first.api)
    script(second, nothing, lambda: ray.status("Complete", "SUCCEEDED"))
    second.launch()
    assert second.heard("adopted") and len(created(first)) == 1
    assert first.api.job()["metadata"]["annotations"][names.OWNER] == "run-2"


@pytest.mark.parametrize(
    ("deployed", "step", "message", "reason", "want"),
    [
        # the step's own code, which no pod has: Ray's message has it
        ("Failed", "FAILED", the_exit_message(65, "MediaError: cut off"), "AppFailed", ("permanent", 65, "cut off")),
        ("Failed", "FAILED", the_exit_message(1), "AppFailed", ("retry-once", 1, "AppFailed")),
        ("Failed", "FAILED", the_exit_message(-9), "AppFailed", ("retry", -9, "by its job's word")),
        ("Failed", "FAILED", "The head node died", "AppFailed", ("retry", 1, "The head node died")),
        # a submitter that fails says nothing of the step, whatever its words remind of
        ("Failed", "", "Job submission has failed. Reason: BackoffLimitExceeded. Message: failed with exit code 2",
         "SubmissionFailed", ("retry", 1, "BackoffLimitExceeded")),
        # stopped by somebody: the operator calls that Complete
        ("Complete", "STOPPED", "Job was intentionally stopped.", "", ("retry", 1, "intentionally")),
        ("ValidationFailed", "", "The RayJob spec is invalid: x", "ValidationFailed", ("permanent", 73, "spec is")),
    ],
)  # fmt: skip
def test_how_it_ended_is_what_both_of_its_words_say(
    deployed: str, step: str, message: str, reason: str, want: tuple[str, int, str]
) -> None:
    decision, code, told = want
    bench, ray = a_bench()
    code = ClusterError.code if code == 73 else code

    def fail() -> None:
        ray.status(deployed, step, message, reason)
        ray.shut_down()

    def act() -> None:
        fail() if len(created(bench)) == 1 else ray.status("Complete", "SUCCEEDED")

    script(bench, *work(ray), act)
    if decision == "permanent":
        with pytest.raises(ClusterError, match=told) as error:
            bench.launch()
        assert error.value.code == code and len(created(bench)) == 1
        return
    bench.launch()
    assert [name[-3:] for name in created(bench)] == ["-a1", "-a2"]
    assert any(f"exit code {code} " in line for line in bench.said)


def test_of_a_long_message_the_last_lines_are_told() -> None:
    """Ray sends up to 20,000 characters of the step's log."""
    bench, ray = a_bench()
    tail = "\n".join([f"row {number}" for number in range(1000)] + ["MediaError: cut off"])

    def fail() -> None:
        ray.pods()
        ray.status("Failed", "FAILED", the_exit_message(65, tail), "AppFailed")

    script(bench, fail)
    with pytest.raises(ClusterError) as error:
        bench.launch()
    assert "MediaError: cut off" in str(error.value) and "row 900" not in str(error.value)


def test_a_head_that_ran_out_of_memory_says_so_and_a_worker_that_did_does_not() -> None:
    """The step's process is in the head's pod; what a worker does again is Ray's."""
    bench, ray = a_bench()
    launcher = bench.launcher()
    launcher.attempts.create(launcher._rendered(1))
    ray.pods(**ended(137, reason="OOMKilled"))
    job = bench.api.job()
    workers = {one.container: one for one in read(job, bench.view.pods()).workers}
    assert workers["ray-head"].code == 147 and workers["ray-worker"].code is None
    assert workers["ray-job-submitter"].code is None


def test_a_worker_that_ray_replaces_while_the_step_runs_ends_nothing_and_is_waited_for_by_nobody() -> None:
    bench, ray = a_bench()

    def replaced() -> None:
        ray.pods(workers=1)
        group = bench.api.job()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
        ray.pod("another", group, {"uid": "x1-uid"}, **waiting("ImagePullBackOff", "registry down"))
        if bench.now > bench.cluster.limits.schedule_s + 100:
            ray.status("Complete", "SUCCEEDED")

    script(bench, *work(ray), replaced)
    bench.launch()
    assert len(created(bench)) == 1 and bench.heard("done, attempt 1")
    # before the step runs there is no work to lose, and nothing to wait for
    bench, ray = a_bench()

    def hopeless() -> None:
        ray.pods(submitter=False, **waiting("ImagePullBackOff", "no such image"))
        ray.status("Initializing")

    script(bench, hopeless)
    with pytest.raises(ClusterError, match="no such image"):
        bench.launch()


def test_a_suspended_one_waits_and_comes_back_with_other_pods() -> None:
    bench, ray = a_bench()
    again = KubeRay(bench.api, "x2")

    def suspended() -> None:
        ray.shut_down()
        ray.status("Suspended")

    def back() -> None:
        again.pods()
        again.status("Running", "RUNNING")

    script(bench, *work(ray), suspended, back, lambda: again.status("Complete", "SUCCEEDED"))
    bench.launch()
    assert bench.heard("queue: suspended") and len(created(bench)) == 1


def test_one_that_is_being_deleted_is_gone_while_its_finalizer_holds_it() -> None:
    bench, ray = a_bench()

    def deleted() -> None:
        bench.api.job()["metadata"]["deletionTimestamp"] = "2026-11-22T00:00:00Z"

    script(bench, *work(ray), deleted)
    with pytest.raises(ClusterError, match="somebody deleted it"):
        bench.launch()


def test_pods_of_a_rayjob_that_had_its_name_before_are_not_its_own() -> None:
    bench, ray = a_bench()
    launcher = bench.launcher()
    launcher.attempts.create(launcher._rendered(1))
    ray.pods()
    before = bench.api.job()
    assert len(read(before, cleanup.pods_of(before, bench.view.pods())).workers) == 4
    del bench.api.objects["rayjobs", before["metadata"]["name"]]
    launcher.attempts.create(launcher._rendered(1))
    now = bench.api.job()
    assert now["metadata"]["name"] == before["metadata"]["name"]
    assert cleanup.pods_of(now, bench.view.pods()) == []


# ---------------------------------------------------------------- removal


def test_a_person_stops_suspends_and_reads_it() -> None:
    bench, ray = a_bench()
    launcher = bench.launcher()
    launcher.attempts.create(launcher._rendered(1))
    ray.pods()
    ray.status("Running", "RUNNING")
    pod = cleanup.first_pod(bench.api, out=OUT, step="prepare-data", kinds=KINDS)
    assert pod == (f"{bench.api.job()['metadata']['name']}-zzzzz", "ray-job-submitter")
    assert cleanup.stop(bench.api, out=OUT, suspend=True, kinds=KINDS)
    assert bench.api.job()["spec"]["suspend"] is True
    bench.api.job()["metadata"]["annotations"].pop(names.SUSPENDED)
    assert cleanup.remove_owned(bench.api, out=OUT, owner="run-2", kinds=KINDS) == []
    assert len(cleanup.remove_owned(bench.api, out=OUT, owner="run-1", kinds=KINDS)) == 1


@pytest.mark.parametrize(("end", "looks"), [("Running", 3), ("Complete", 5), ("Failed", 5)])
def test_the_reaper_removes_one_that_nobody_watches_and_later_one_that_has_ended(end: str, looks: int) -> None:
    """No controller removes a RayJob that has ended; a PyTorchJob has its TTL."""
    bench, ray = a_bench()
    launcher = bench.launcher()
    launcher.attempts.create(launcher._rendered(1))
    ray.status(end, "SUCCEEDED" if end == "Complete" else "")
    assert bench.api.job()["kind"] in KEPT

    def look() -> list[str]:
        return list(cleanup.reap(bench.api, after=3, keep=5, kinds=KINDS))

    assert [look() for _ in range(looks)] == [[]] * looks
    (line,) = look()
    assert line.endswith("not watched for 3 looks" if end == "Running" else "ended 5 looks ago")
    assert not [name for plural, name in bench.api.objects if plural == "rayjobs"]


def test_without_the_kind_the_reaper_does_not_ask_for_it() -> None:
    bench, _ = a_bench()
    asked: list[str] = []
    listed = bench.api.list
    bench.api.list = lambda kind, labels: asked.append(kind.plural) or listed(kind, labels)  # type: ignore[method-assign]
    assert list(cleanup.reap(bench.api, after=1)) == [] and asked == ["pytorchjobs", "jobs"]

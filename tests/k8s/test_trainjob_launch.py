"""A TrainJob from creation to its end, by the status that Kubeflow Trainer writes: its runtime, its pods, its owner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k8s import cleanup, names, trainjob
from k8s.client import RUNTIMES
from k8s.cluster import Cluster, load_cluster
from k8s.decide import NodeBeat, Progress
from k8s.kinds import kinds_of
from tests.k8s.bench import OUT, RECIPE, Bench, a_record, each_look, script
from tests.k8s.memory import ended
from tests.k8s.operators import Trainer
from trainer import storage
from trainer.errors import ClusterError

CLUSTER = load_cluster("test", ["job_kind=TrainJob"])
KINDS = kinds_of(CLUSTER)
FAILED = "jobset failed due to one or more job failures (first failed job: x-node-0)"


class TrainBench(Bench):
    """The stage sft as a TrainJob."""

    def task(self, **more: Any) -> Any:
        cluster = self.cluster
        return super().task(**{"render": lambda run: trainjob.render_stage(RECIPE, "sft", cluster, run)} | more)


def a_bench(cluster: Cluster = CLUSTER, **more: Any) -> tuple[TrainBench, Trainer]:
    bench = TrainBench(cluster=cluster, **more)
    return bench, Trainer(bench.api)


def made(**more: Any) -> tuple[TrainBench, Trainer]:
    """One that a launcher created before it was lost."""
    bench, trainer = a_bench(**more)
    launcher = bench.launcher()
    launcher.attempts.create(launcher._rendered(1))
    return bench, trainer


def calls(bench: Bench) -> list[str]:
    return [" ".join(call.split()[:2]) for call in bench.api.calls]


def runtimes(bench: Bench) -> list[dict]:
    return [one for (plural, _), one in bench.api.objects.items() if plural == "trainingruntimes"]


# ---------------------------------------------------------------- created


def test_the_runtime_is_there_before_the_job_that_names_it_and_belongs_to_it_after() -> None:
    """The Trainer's webhook refuses a TrainJob without its runtime, in dry runs too."""
    bench, trainer = a_bench()

    def complete() -> None:
        trainer.condition("Complete", reason="AllJobsCompleted", message="jobset completed successfully")
        bench.done = True

    script(bench, lambda: trainer.pods(0), complete)
    bench.launch()
    assert calls(bench) == [
        *("dry-run ConfigMap", "dry-run TrainingRuntime", "dry-run Pod"),
        *("create TrainingRuntime", "create TrainJob", "create ConfigMap", "patch TrainingRuntime"),
    ]
    (runtime,) = runtimes(bench)
    (owner,) = runtime["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("TrainJob", bench.api.job()["metadata"]["uid"])
    assert bench.heard("run: ") and bench.heard("done, attempt 1")


def test_a_refused_trainjob_leaves_no_runtime() -> None:
    bench, _ = a_bench()
    create = bench.api.create

    def refuse(body: Any, *, dry_run: bool = False) -> Any:
        if body["kind"] == "TrainJob":
            raise ClusterError("the cluster refused a request", got="422 spec.trainer: Forbidden")
        return create(body, dry_run=dry_run)

    bench.api.create = refuse  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match=r"spec\.trainer: Forbidden"):
        bench.launch()
    assert "create TrainingRuntime" in calls(bench) and bench.api.objects == {}


def test_a_runtime_that_a_dead_launcher_left_is_made_anew() -> None:
    """It may be of another image; the label that its pods carry is of another creation in any case."""
    bench, _ = a_bench()
    launcher = bench.launcher()
    left = launcher._rendered(1).runtime
    assert left is not None
    bench.api.put(RUNTIMES, {**left, "metadata": {**left["metadata"], "labels": {"of": "before"}}})
    launcher.attempts.create(launcher._rendered(1))
    (runtime,) = runtimes(bench)
    mark = bench.api.job()["metadata"]["labels"][names.CREATION]
    assert runtime["metadata"]["labels"][names.CREATION] == mark
    assert "delete TrainingRuntime" in calls(bench)


# ---------------------------------------------------------------- adopted


def test_it_is_adopted_and_what_its_dead_launcher_did_not_give_it_is_given() -> None:
    bench, trainer = made()
    runtimes(bench)[0]["metadata"].pop("ownerReferences")
    taken, _ = a_bench(api=bench.api, run_id="run-2")

    def complete() -> None:
        trainer.condition("Complete")
        taken.done = True

    script(taken, lambda: trainer.pods(0), complete)
    taken.launch()
    assert taken.heard("adopted") and calls(taken).count("create TrainJob") == 1
    assert bench.api.job()["metadata"]["annotations"][names.OWNER] == "run-2"
    assert runtimes(bench)[0]["metadata"]["ownerReferences"][0]["kind"] == "TrainJob"


def test_another_pod_template_under_the_same_name_is_told_by_field() -> None:
    """The TrainJobs are equal: what differs is in the runtime."""
    bench, _ = made()
    cluster = load_cluster("test", ["job_kind=TrainJob", "grace.termination_s=77"])
    taken, _ = a_bench(api=bench.api, run_id="run-2", cluster=cluster)
    with pytest.raises(ClusterError, match="terminationGracePeriodSeconds: wanted 77, found 40"):
        taken.launch()
    assert bench.api.job()["metadata"]["annotations"][names.OWNER] == "run-1"


# ---------------------------------------------------------------- watched


@pytest.mark.parametrize(("code", "attempts"), [(65, 1), (139, 2)])
def test_a_failed_jobset_is_judged_by_what_its_pods_said(code: int, attempts: int) -> None:
    bench, trainer = a_bench()

    def act() -> None:
        if calls(bench).count("create TrainJob") > 1:
            trainer.condition("Complete")
            bench.done = True
            return
        trainer.pod(0, **ended(code, a_record(code, error="MediaError: cut off").model_dump_json()))
        trainer.condition("Failed", reason="FailedJobs", message=FAILED)

    script(bench, act)
    if attempts == 1:
        with pytest.raises(ClusterError, match="MediaError: cut off"):
            bench.launch()
    else:
        bench.launch()
    assert calls(bench).count("create TrainJob") == calls(bench).count("create TrainingRuntime") == attempts


def test_pods_that_the_failed_jobset_deleted_are_judged_by_their_records_in_storage(tmp_path: Path) -> None:
    """Records have a pod's host name; its own name has a part that is made up."""
    bench, trainer = a_bench()

    def fail() -> None:
        host = trainer.pod(0)
        end = a_record(65, error="MediaError: cut off").model_dump_json()
        storage.write_bytes(storage.join(str(tmp_path), "attempts", "0001", f"end-{host}.json"), end.encode())
        trainer.condition("Failed", reason="FailedJobs", message=FAILED)

    script(bench, lambda: trainer.pods(0), fail)
    with pytest.raises(ClusterError, match="MediaError: cut off") as error:
        bench.launch(stage_uri=str(tmp_path))
    assert error.value.code == 65


def test_a_node_whose_heartbeat_stopped_is_found_by_its_host_name() -> None:
    bench, trainer = a_bench()

    def act(count: int) -> None:
        if trainer.collect():
            return
        hosts = [trainer.pod(index) for index in (0, 1)]
        bench.progress = Progress(
            sequence=count, nodes=((hosts[0], NodeBeat(count, count)), (hosts[1], NodeBeat(1, 1)))
        )
        if calls(bench).count("create TrainJob") > 1:
            trainer.condition("Complete")
            bench.done = True

    each_look(bench, act)
    bench.launch()
    assert bench.heard("no heartbeat of") and bench.heard("without nodes node-a")


def test_a_suspension_is_waiting_and_no_attempt() -> None:
    bench, trainer = a_bench()

    def suspended() -> None:
        for key in [key for key in bench.api.objects if key[0] == "pods"]:
            del bench.api.objects[key]
        trainer.condition("Suspended", reason="Suspended", message="TrainJob is suspended")

    def resumed() -> None:
        trainer.condition("Suspended", "False", "Resumed", "TrainJob is resumed", at="2026-11-22T00:01:00Z")
        trainer.pod(0, suffix="fghij")

    def complete() -> None:
        trainer.condition("Complete")
        bench.done = True

    script(bench, lambda: trainer.pods(0), suspended, resumed, complete)
    bench.launch()
    assert bench.heard("queue: suspended") and calls(bench).count("create TrainJob") == 1


def test_a_runtime_that_the_trainer_does_not_know_is_its_own_word() -> None:
    """A condition that the Trainer writes itself: no pod was ever made."""
    bench, trainer = a_bench()
    message = "unsupported runtime: TrainingRuntime.trainer.kubeflow.org"
    script(bench, lambda: trainer.condition("Failed", reason="TrainingRuntimeNotSupported", message=message))
    with pytest.raises(ClusterError, match="unsupported runtime"):
        bench.launch()


def test_an_attempt_that_is_given_up_is_removed_with_its_runtime() -> None:
    bench, trainer = a_bench()

    def act() -> None:
        if trainer.collect():
            return
        if calls(bench).count("create TrainJob") > 1:
            trainer.condition("Complete")
            bench.done = True
            return
        trainer.pod(0)

    script(bench, act)  # and no heartbeat: a hang
    bench.launch()
    assert bench.heard("no progress for") and "delete TrainJob" in calls(bench)
    assert [one["metadata"]["name"][-3:] for one in runtimes(bench)] == ["-a2"]


def test_a_person_suspends_and_stops_it() -> None:
    bench, _ = made()
    assert cleanup.stop(bench.api, out=OUT, kinds=KINDS, suspend=True)
    assert bench.api.job()["spec"]["suspend"] is True
    launcher = a_bench(api=bench.api, run_id="run-2")[0].launcher()
    job, attempt = launcher._newest()
    assert job is not None and (job["spec"]["suspend"], attempt) == (False, 1)
    assert cleanup.stop(bench.api, out=OUT, kinds=KINDS) and bench.api.objects == {}

"""Attempts of a step over time: what is kept of them, what must be gone before the next, who may begin one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k8s import names
from k8s.attempts import never_fits
from k8s.client import QuotaExceeded, Unreachable
from k8s.cluster import load_cluster
from k8s.decide import NodeBeat, Progress
from k8s.mirror import Event
from k8s.names import Owner
from k8s.pytorchjob import differences, render_stage
from tests.k8s.bench import RECIPE, Bench, a_record, another, each_look, nothing, script, under_way
from tests.k8s.memory import ended, waiting
from trainer import storage
from trainer.errors import ClusterError, StorageError

FULL = 'pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu={}, used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8'  # noqa: E501 - as the server writes it


def remove_jobs(bench: Bench) -> None:
    """Their TTL is over."""
    for key in [key for key in bench.api.objects if key[0] in ("pytorchjobs", "pods")]:
        del bench.api.objects[key]


# ---------------------------------------------------------------- history


def test_attempts_whose_jobs_are_gone_are_counted_from_storage(tmp_path: Path) -> None:
    for attempt in (1, 2):
        launcher = Bench().launcher(records=str(tmp_path))
        assert launcher._newest() == (None, attempt)
        launcher._begun(launcher._created(attempt), attempt)  # both are lost here
    stored = sorted(path.name[-11:] for path in tmp_path.glob("sft/*"))
    assert stored == ["0001-1.json", "0001-2.json", "0002-1.json"], "the first with its end"


def test_without_progress_counts_over_launchers_and_removed_jobs(tmp_path: Path) -> None:
    """Three launchers see one attempt fail each, and are lost before the next; none finds a job of the others."""
    for attempt in (1, 2, 3):
        bench = Bench()
        script(bench, bench.fail)
        launcher = bench.launcher(records=str(tmp_path))
        launcher.sleep = _raises(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt if attempt < 3 else ClusterError) as error:
            launcher.launch()
        assert [name[-3:] for name in bench.jobs()] == [f"-a{attempt}"]
        assert ("3 attempts in a row committed nothing" in str(error.value)) is (attempt == 3)


def test_a_job_that_somebody_removed_meanwhile_is_no_attempt(tmp_path: Path) -> None:
    """Stopped and started again four times by a person: more than limits.without_progress allows to failures."""
    for attempt in range(1, 6):
        bench = Bench()
        launcher = bench.launcher(records=str(tmp_path))
        job, number = launcher._newest()
        assert (job, number) == (None, attempt)
        launcher._begun(launcher._created(number), number)
    assert [one.decision for one in launcher.history] == ["preempted"] * 4


def test_the_deadline_covers_launchers_that_were_lost(tmp_path: Path) -> None:
    bench = Bench()
    launcher = bench.launcher(records=str(tmp_path))
    launcher._begun(launcher._created(1), 1)
    later = another(bench, "run-1")
    later.now = bench.cluster.limits.deadline_s + 1.0
    later.progress = Progress(watched=False)
    script(later, lambda: later.api.pod(0))
    with pytest.raises(ClusterError, match="deadline_s"):
        later.launch(records=str(tmp_path))
    assert later.now < bench.cluster.limits.deadline_s + 60
    # a clock that was put back does not end it at once
    early = another(bench, "run-1")
    early.now = -5000.0
    remove_jobs(bench)
    script(early, early.finish)
    early.launch(records=str(tmp_path))


def test_a_suspected_node_stays_left_out_after_its_launcher_was_lost(tmp_path: Path) -> None:
    bench = Bench()
    launcher = bench.launcher(records=str(tmp_path))
    job = launcher._created(1)
    launcher._begun(job, 1)
    bench.fail(139)
    again = another(bench, "run-1")
    script(again, again.finish)
    again.launch(records=str(tmp_path))
    assert bench.api.job()["metadata"]["annotations"][names.EXCLUDED] == "node-a"


def test_records_that_cannot_be_read_stop_the_launcher_and_one_that_cannot_be_written_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = StorageError("storage did not answer")
    bench = Bench()
    with monkeypatch.context() as patched:
        patched.setattr(storage, "list_dir", _raises(down))
        with pytest.raises(StorageError):
            bench.launch(records=str(tmp_path))
    assert bench.jobs() == []
    monkeypatch.setattr(storage, "create_once", _raises(down))
    script(bench, bench.finish)
    bench.launch(records=str(tmp_path))
    assert bench.heard("the record of attempt 1 was not stored") and bench.heard("done, attempt 1")


def _raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


# ---------------------------------------------------------------- one at a time


def test_the_next_attempt_waits_until_the_last_pod_of_the_one_before_has_ended() -> None:
    bench = Bench()
    left = first = 15

    def act() -> None:
        nonlocal left
        if bench.created() > 1:
            bench.finish()
        elif left == first:
            bench.fail(139)
            bench.api.pod(1, deletionTimestamp="x")
        left -= 1
        if left > 0:
            assert bench.created() == 1
        elif left == 0:
            bench.api.pod(1, **ended(144))

    bench.view.act = act
    bench.launch()
    assert left < 0 and bench.created() == 2
    assert bench.heard("waiting for 1 pods")


def one_fails(bench: Bench, code: int, node: str = "node-b") -> None:
    """Worker 0 fails, worker 1 still runs on `node`."""
    bench.api.pod(1, node=node)
    bench.fail(code)


def test_what_the_last_pod_says_can_still_make_the_decision_worse() -> None:
    bench = Bench()
    script(
        bench,
        lambda: one_fails(bench, 139),
        *[nothing] * 10,
        lambda: bench.api.pod(1, **ended(65, a_record(65, rank=1, error="MediaError: cut off").model_dump_json())),
    )
    with pytest.raises(ClusterError, match="MediaError: cut off"):
        bench.launch()
    assert bench.created() == 1 and bench.heard("after its last pod ended")


def test_a_pod_that_outlives_its_grace_is_on_a_node_that_is_left_out() -> None:
    bench = Bench()
    script(
        bench,
        lambda: one_fails(bench, 144, node="node-lost"),
        *[nothing] * 60,
        lambda: bench.finish() if bench.created() > 1 else None,
    )
    bench.launch()
    assert bench.heard("outlive their grace, going on without node-lost")
    assert "node-lost" in bench.api.job()["metadata"]["annotations"][names.EXCLUDED]
    assert bench.now > bench.cluster.grace.termination_s


def test_an_attempt_that_is_given_up_is_removed_and_its_pods_are_waited_for() -> None:
    bench = Bench()
    bench.api.outlive = True
    still_one: list[int] = []
    replaced = (lambda: bench.api.pod(0), lambda: bench.api.pod(0, uid="another"))
    script(bench, *replaced, *[lambda: still_one.append(bench.created())] * 4, lambda: _end(bench))
    bench.launch()
    calls = [call for call in bench.api.calls if call.split()[0] in ("delete", "create") and "PyTorchJob" in call]
    assert [call.split()[0] for call in calls] == ["create", "delete", "create"]
    assert bench.heard("was replaced in the middle") and still_one == [1] * 4


def _end(bench: Bench) -> None:
    for key, one in list(bench.api.objects.items()):
        if key[0] == "pods" and "deletionTimestamp" in one["metadata"]:
            del bench.api.objects[key]
    if bench.created() > 1:
        bench.finish()


# ---------------------------------------------------------------- ownership


def test_a_second_launcher_of_the_same_run_takes_the_job_and_the_first_leaves() -> None:
    bench = under_way()
    first, second = bench.launcher(), bench.launcher()
    (job,) = bench.view.jobs()
    job = first.attempts.adopt(job, first._rendered(1))
    first.attempts.still_ours(job)
    job = second.attempts.adopt(job, second._rendered(1))
    second.attempts.still_ours(job)
    with pytest.raises(ClusterError, match="another run took the job over"):
        first.attempts.still_ours(job)


def test_the_job_of_a_launcher_that_died_before_its_config_map_gets_it_at_adoption() -> None:
    bench = under_way()
    for key in [key for key in bench.api.objects if key[0] == "configmaps"]:
        del bench.api.objects[key]
    script(bench, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    (config_map,) = [one for (plural, _), one in bench.api.objects.items() if plural == "configmaps"]
    assert config_map["metadata"]["ownerReferences"][0]["uid"] == bench.api.job()["metadata"]["uid"]


def test_the_config_map_of_two_attempts_is_owned_by_both() -> None:
    bench = Bench()
    script(bench, bench.fail, bench.finish)
    bench.launch()
    (config_map,) = [one for (plural, _), one in bench.api.objects.items() if plural == "configmaps"]
    assert [owner["name"][-3:] for owner in config_map["metadata"]["ownerReferences"]] == ["-a1", "-a2"]


def test_a_job_whose_config_map_is_refused_does_not_stay() -> None:
    bench = Bench()
    create = bench.api.create

    def refuse(body: Any, *, dry_run: bool = False) -> Any:
        if body["kind"] == "ConfigMap" and not dry_run:
            raise ClusterError("the cluster refused a request", got="403 no more ConfigMaps")
        return create(body, dry_run=dry_run)

    bench.api.create = refuse  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="no more ConfigMaps"):
        bench.launch()
    assert bench.jobs() == []


def test_what_kueue_adds_to_a_job_is_no_difference() -> None:
    cluster = load_cluster("test", ["queue={kind: kueue, name: train}"])
    bench = Bench(cluster=cluster)
    wanted = render_stage(RECIPE, "sft", cluster, bench.task().run).job
    found = json.loads(json.dumps(wanted))
    pod = found["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["nodeSelector"]["cloud.google.com/gke-nodepool"] = "flavour-1"
    pod["tolerations"].insert(0, {"key": "flavour", "operator": "Exists", "effect": "NoSchedule"})
    pod["schedulingGates"] = [{"name": "kueue.x-k8s.io/topology"}]
    found["spec"]["runPolicy"]["suspend"] = False
    assert differences(wanted, found) == []
    pod["tolerations"].pop()
    assert any("tolerations" in line for line in differences(wanted, found))


def test_a_watch_that_is_late_does_not_take_the_job_from_who_adopted_it() -> None:
    """The view still has the annotations of the launcher before."""
    bench = another(under_way(), "run-2")
    launcher = bench.launcher()
    known = {bench.api.job()["metadata"]["name"]: bench.view.jobs()[0]}
    bench.view.jobs = lambda: list(known.values())  # type: ignore[method-assign]
    bench.view.note = lambda kind, found: known.update({found["metadata"]["name"]: found})  # type: ignore[method-assign]

    def finish() -> None:
        bench.finish()
        known.update({bench.api.job()["metadata"]["name"]: bench.api.job()})

    script(bench, lambda: bench.api.pod(0), finish)
    launcher.launch()
    assert bench.heard("adopted") and bench.heard("done, attempt 1")


@pytest.mark.parametrize("ours", [True, False])
def test_an_adopted_job_no_longer_belongs_to_the_workflow_before(ours: bool) -> None:
    bench = under_way()
    bench.api.job()["metadata"]["ownerReferences"] = [Owner("argoproj.io/v1alpha1", "Workflow", "a", "1").reference()]
    owner = Owner("argoproj.io/v1alpha1", "Workflow", "b", "2") if ours else None
    taken = another(bench, "run-2")
    taken.launcher(run=replace(taken.task().run, owner=owner))._newest()
    assert taken.heard("adopted")
    assert bench.api.job()["metadata"].get("ownerReferences", []) == ([owner.reference()] if owner else [])


@pytest.mark.parametrize("code", [65, 143])
def test_a_job_that_failed_after_its_result_was_stored_is_done(code: int) -> None:
    bench = Bench()

    def fail() -> None:
        bench.done = True
        bench.fail(code)

    script(bench, lambda: bench.api.pod(0), fail)
    bench.launch()
    assert bench.heard("done, attempt 1") and bench.created() == 1


def test_an_attempt_that_nobody_watched_is_judged_by_what_its_pods_left_in_storage(tmp_path: Path) -> None:
    """Its launcher was lost; the pods have gone with their node."""
    records, stage = str(tmp_path / "records"), str(tmp_path / "sft")
    bench = Bench()
    launcher = bench.launcher(records=records, stage_uri=stage)
    launcher._newest()
    launcher._begun(launcher._created(1), 1)
    name = f"{bench.jobs()[0]}-worker-0"
    end = a_record(65, error="MediaError: cut off").model_dump_json()
    storage.write_bytes(storage.join(stage, "attempts", "0001", f"end-{name}.json"), end.encode())
    bench.api.condition("Failed")
    with pytest.raises(ClusterError, match="MediaError: cut off") as error:
        another(bench, "run-1").launch(records=records, stage_uri=stage)
    assert error.value.code == 65 and bench.created() == 1


# ---------------------------------------------------------------- waiting


def test_a_quota_without_room_is_waited_for() -> None:
    bench = Bench()
    bench.api.refuse_dry_run = [QuotaExceeded("refused", got=FULL.format(1))] * 3
    script(bench, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    assert bench.heard("no room in the quota") and bench.heard("requests.nvidia.com/gpu") and bench.now >= 60


def test_a_quota_that_stays_full_ends_at_the_limit_of_queues() -> None:
    bench = Bench()
    bench.api.refuse_dry_run = [QuotaExceeded("refused", got=FULL.format(1))] * 1000
    with pytest.raises(QuotaExceeded):
        bench.launch()
    assert bench.cluster.limits.queue_s < bench.now < bench.cluster.limits.queue_s + 60


@pytest.mark.parametrize(("requested", "pods", "want"), [(1, 8, False), (8, 1, False), (8, 2, True), (16, 1, True)])
def test_a_quota_that_is_too_small_altogether_is_not_waited_for(requested: int, pods: int, want: bool) -> None:
    assert never_fits(QuotaExceeded("refused", got=FULL.format(requested)), pods) is want


@pytest.mark.parametrize("name", ["count/pytorchjobs.kubeflow.org", "configmaps"])
def test_a_quota_of_objects_is_not_asked_for_by_every_pod(name: str) -> None:
    text = f"exceeded quota: q, requested: {name}=1, used: {name}=4, limited: {name}=4"
    assert not never_fits(QuotaExceeded("refused", got=text), 8)


def test_events_are_told_once_and_quoted_as_reasons() -> None:
    bench = Bench()
    name = "job"

    def act() -> None:
        nonlocal name
        name = bench.api.job()["metadata"]["name"]
        bench.view.said = [Event("PyTorchJob", name, "FailedCreatePod", "exceeded quota: gpus", True)] * 2

    script(bench, act, nothing, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    assert sum("event:" in line for line in bench.said) == 1
    assert bench.heard("pods have a node: FailedCreatePod: exceeded quota: gpus")


def test_an_api_server_that_is_silent_is_said_once_and_given_up_at_its_limit() -> None:
    bench = Bench()
    bench.progress = Progress(watched=False)
    script(bench, lambda: bench.api.pod(0), lambda: setattr(bench.view, "silent", bench.view.silent or bench.now))
    limits = bench.cluster.limits.model_copy(update={"deadline_s": 10**6, "server_s": 600})
    bench.cluster = bench.cluster.model_copy(update={"limits": limits})
    with pytest.raises(Unreachable, match=r"limits\.server_s 600"):
        bench.launch()
    assert sum("does not answer" in line for line in bench.said) == 1
    assert 600 < bench.now < 700
    assert not [call for call in bench.api.calls if call.startswith("delete")]


def test_storage_that_is_down_at_the_end_of_a_stage_does_not_cost_it() -> None:
    bench = Bench()
    answers: list[Any] = [False, StorageError("down"), StorageError("down"), True]

    def finished() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    script(bench, lambda: bench.api.condition("Succeeded"))
    bench.launch(finished=finished)
    assert answers == [] and bench.created() == 1
    assert bench.heard("storage does not answer, asked again")


def test_storage_that_is_down_while_a_stage_runs_is_no_hang() -> None:
    bench = Bench()

    def act(count: int) -> None:
        bench.api.pod(0)
        bench.progress = StorageError("down") if count < 60 else Progress(sequence=count)
        if count == 70:
            bench.finish()

    each_look(bench, act)
    bench.launch()
    assert bench.now > bench.cluster.limits.silence_s and bench.created() == 1
    assert sum("no heartbeats to be had" in line for line in bench.said) == 1


def test_the_node_whose_heartbeat_stopped_is_left_out() -> None:
    bench = Bench()

    def act(count: int) -> None:
        if bench.created() > 1:
            bench.finish()
            return
        bench.api.pod(0)
        bench.api.pod(1, node="node-b")
        first, second = (f"{bench.jobs()[0]}-worker-{index}" for index in (0, 1))
        bench.progress = Progress(sequence=count, nodes=((first, NodeBeat(count, count)), (second, NodeBeat(1, 1))))

    each_look(bench, act)
    bench.launch()
    assert bench.heard("no heartbeat of") and bench.heard("without nodes node-b")
    assert bench.api.job()["metadata"]["annotations"][names.EXCLUDED] == "node-b"


def test_somebody_is_said_to_watch_every_few_minutes() -> None:
    bench = Bench()
    bench.progress = Progress(watched=False)
    marks: list[str] = []

    def act() -> None:
        bench.api.pod(0)
        mark = bench.api.job()["metadata"]["annotations"][names.RENEWED]
        if mark not in marks:
            marks.append(mark)
        if bench.now > 1000:
            bench.finish()

    bench.view.act = act
    bench.launch()
    assert len(marks) == 1 + 3
    assert bench.now / 60 * 10 > len([call for call in bench.api.calls if call.startswith("patch PyTorchJob")])


def test_a_preemption_by_the_queue_is_no_attempt() -> None:
    bench = Bench()
    moment = 0

    def suspended(value: str) -> None:
        nonlocal moment
        moment += 1
        job = bench.api.job()
        about = {"type": "Suspended", "status": value, "lastTransitionTime": f"t{moment}"}
        job.setdefault("status", {})["conditions"] = [about]
        for key in [key for key in bench.api.objects if key[0] == "pods"]:
            del bench.api.objects[key]

    script(
        bench,
        lambda: bench.api.pod(0),
        lambda: suspended("True"),
        lambda: suspended("False"),
        lambda: bench.api.pod(0, uid="another"),
        bench.finish,
    )
    bench.launch()
    assert bench.created() == 1 and bench.heard("queue: suspended") and bench.heard("done, attempt 1")


def test_a_hopeless_image_is_told_and_nothing_stays() -> None:
    bench = Bench()
    script(bench, lambda: bench.api.pod(0, **waiting("CreateContainerConfigError", 'secret "s3" not found')))
    with pytest.raises(ClusterError, match='secret "s3" not found'):
        bench.launch()
    assert bench.jobs() == [] and bench.view.closed

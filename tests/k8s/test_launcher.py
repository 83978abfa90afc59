"""The launcher's loop on an API in memory: create or adopt, attempts, verification, ownership, clean-up.

The real API server, kubelets and operator come with the test cluster; here only the order of calls and decisions
counts.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k8s import launcher, names
from k8s.client import PYTORCH_JOBS, Conflict
from k8s.cluster import load_cluster
from k8s.decide import Progress
from k8s.job import render_prepare
from k8s.launcher import StepCall
from k8s.names import Run
from k8s.tasks import first_digest, progress_of, task_of
from tests.k8s.bench import OUT, RECIPE, Bench, a_record, another, each_look, script, under_way
from tests.k8s.memory import waiting
from trainer import heartbeat, storage
from trainer.command import PrepareCall, prepare_command
from trainer.errors import ClusterError, UsageError
from trainer.heartbeat import Figures
from trainer.resolve import load_recipe


def test_a_finished_stage_creates_nothing() -> None:
    bench = Bench()
    bench.done = True
    bench.launch()
    assert bench.api.calls == []


def test_a_stage_is_asked_for_before_it_is_created_and_owns_its_config_map() -> None:
    bench = Bench()
    script(bench, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    name = bench.api.job()["metadata"]["name"]
    kinds = [" ".join(call.split()[:2]) for call in bench.api.calls]
    asked = ["dry-run ConfigMap", "dry-run PyTorchJob", "dry-run Pod"]
    assert kinds == [*asked, "create PyTorchJob", "create ConfigMap"]
    (config_map,) = [one for (plural, _), one in bench.api.objects.items() if plural == "configmaps"]
    assert [owner["name"] for owner in config_map["metadata"]["ownerReferences"]] == [name]


def test_what_the_server_refuses_in_the_dry_run_creates_nothing() -> None:
    bench = Bench()
    bench.api.refuse_dry_run = [ClusterError("the cluster refused a request", got="violates PodSecurity")]
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        bench.launch()
    assert bench.api.objects == {}


def test_a_failed_attempt_is_followed_by_another_name() -> None:
    bench = Bench()
    script(bench, bench.fail, bench.finish)
    bench.launch()
    assert [name[-3:] for name in bench.jobs()] == ["-a1", "-a2"]
    assert bench.now >= bench.cluster.limits.backoff_s
    # the segmentation fault's node is left out, and that is recorded
    assert bench.api.job()["metadata"]["annotations"][names.EXCLUDED] == "node-a"


def test_a_permanent_error_ends_the_step_with_the_causes_code() -> None:
    bench = Bench()
    message = a_record(65, rank=1, error="MediaError: cut off").model_dump_json()
    script(bench, lambda: bench.fail(65, message))
    with pytest.raises(ClusterError, match="MediaError: cut off") as error:
        bench.launch()
    assert error.value.code == 65
    assert bench.created() == 1


def test_a_job_that_succeeded_without_a_result_is_not_done() -> None:
    bench = Bench()
    script(bench, lambda: bench.api.condition("Succeeded"))
    with pytest.raises(ClusterError, match="no verified result"):
        bench.launch()
    assert sum(call.startswith("create PyTorchJob") for call in bench.api.calls) == 2


def test_a_job_that_succeeded_without_a_result_tells_what_its_ranks_said(tmp_path: Path) -> None:
    bench = Bench()
    said = storage.join(str(tmp_path), "attempts", "0001", "rank0.log")
    storage.write_bytes(said, b"result not written: bucket is read-only\n")

    def act() -> None:
        bench.done = bench.created() > 1
        bench.api.condition("Succeeded")

    script(bench, act)
    bench.launch(stage_uri=str(tmp_path))
    assert bench.heard("    result not written: bucket is read-only") and bench.heard("last lines of rank 0, attempt 1")


@pytest.mark.parametrize("ran", [True, False])
def test_an_image_that_an_attempt_before_had_is_tried_again_but_not_for_ever(ran: bool, tmp_path: Path) -> None:
    """Also by a launcher that comes after one that was lost; three attempts that get nothing done are enough."""
    first = Bench()
    attempt = first.launcher(records=str(tmp_path))
    attempt._begun(attempt._created(1), 1)
    state = {"running": {}} if ran else {"waiting": {"reason": "ContainerCreating"}}
    seen = {"phase": "Running" if ran else "Pending", "containerStatuses": [{"state": state}]}

    def fails() -> None:
        if "pods" not in {plural for plural, _ in first.api.objects}:
            first.api.pod(0, **seen)
        else:
            first.fail(139)

    attempt.sleep = _lost
    script(first, fails)
    with pytest.raises(KeyboardInterrupt):
        attempt.launch()
    again = another(first, "run-1")
    script(again, lambda: again.api.pod(0, node="node-b", **waiting("ImagePullBackOff", "i/o timeout")))
    with pytest.raises(ClusterError, match=r"without_progress" if ran else "trying again would not help"):
        again.launch(records=str(tmp_path))
    assert again.created() == (3 if ran else 2)
    assert again.heard("which another pod had") is ran


def _lost(seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_hopeless_pod_ends_the_attempt_and_frees_its_gpus() -> None:
    bench = Bench()
    script(bench, lambda: bench.api.pod(0, **waiting("ImagePullBackOff", "no such image")))
    with pytest.raises(ClusterError, match="no such image"):
        bench.launch()
    assert not [one for plural, one in bench.api.objects if plural in ("pytorchjobs", "pods")]


def test_a_hang_ends_the_attempt_and_the_next_one_may_finish() -> None:
    bench = Bench()

    def act() -> None:
        bench.api.pod(0)
        if bench.api.job()["metadata"]["name"].endswith("-a2"):
            bench.finish()

    script(bench, act)
    bench.launch()
    assert bench.heard("no progress for")
    assert any(call.startswith("delete PyTorchJob") and call.endswith("-a1") for call in bench.api.calls)


def test_a_silent_job_that_reports_progress_is_left_alone() -> None:
    bench = Bench()

    def act(count: int) -> None:
        bench.api.pod(0)
        bench.progress = Progress(sequence=count)
        if count == 30:
            bench.finish()

    each_look(bench, act)
    bench.launch()
    assert not bench.heard("no progress")


def test_a_program_without_heartbeats_is_given_its_time_up_to_the_deadline() -> None:
    bench = Bench()
    bench.progress = Progress(watched=False)
    script(bench, lambda: bench.api.pod(0))
    with pytest.raises(ClusterError, match="deadline_s 1800"):
        bench.launch(finished=None)
    assert 1800 < bench.now < 1800 + 60
    assert not bench.heard("no progress")
    assert not [name for plural, name in bench.api.objects if plural == "pytorchjobs"]


def test_how_far_it_is_is_said_once_a_minute() -> None:
    bench = Bench()

    def act(count: int) -> None:
        bench.api.pod(0)
        figures = Figures(num_steps=1000, loss=1.5, tokens_per_s=45_000.0)
        bench.progress = Progress(sequence=count, step=10 * count, committed_step=100, figures=figures)
        if count == 20:
            bench.finish()

    each_look(bench, act)
    bench.launch()
    said = [line for line in bench.said if "tokens/s" in line]
    assert len(said) == bench.now // 60 - 1
    # 10 steps in 15 s, 950 are left
    assert said[0] == "sft: step 50 of 1000, loss 1.5000, 45,000 tokens/s, 24 min left, committed 100"


# ---------------------------------------------------------------- adoption


def test_a_job_under_way_is_adopted_and_changes_its_owner() -> None:
    bench = another(under_way(), "run-2")
    script(bench, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    assert bench.heard("adopted")
    assert sum(call.startswith("create PyTorchJob") for call in bench.api.calls) == 1
    assert bench.api.job()["metadata"]["annotations"][names.OWNER] == "run-2"


def test_another_spec_under_the_same_name_is_told_by_field_and_left_alone() -> None:
    bench = another(under_way(), "run-2")
    bench.cluster = load_cluster("test", ["grace.termination_s=77"])
    with pytest.raises(ClusterError, match="terminationGracePeriodSeconds: wanted 77, found 40"):
        bench.launch()
    assert bench.api.job()["metadata"]["annotations"][names.OWNER] == "run-1"


def test_a_lost_race_for_ownership_is_read_again() -> None:
    bench = another(under_way(), "run-2")
    patch, lost = bench.api.patch, []

    def once(kind: Any, name: str, change: Any) -> Any:
        if kind == PYTORCH_JOBS and not lost:
            lost.append(name)
            raise Conflict(name)
        return patch(kind, name, change)

    bench.api.patch = once  # type: ignore[method-assign]
    script(bench, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    assert lost and bench.api.job()["metadata"]["annotations"][names.OWNER] == "run-2"


def test_the_launcher_whose_job_was_taken_over_leaves_it_alone() -> None:
    bench = Bench()

    def taken() -> None:
        bench.api.pod(0)
        bench.api.job()["metadata"]["annotations"][names.OWNER] = "run-2"

    script(bench, lambda: bench.api.pod(0), taken)
    with pytest.raises(ClusterError, match="another run took the job over"):
        bench.launch()
    assert not any(call.startswith("delete") for call in bench.api.calls)


def test_attempts_that_ended_before_a_lost_launcher_are_counted() -> None:
    bench = under_way()
    bench.api.condition("Failed", "worker failed")
    again = another(bench, "run-1")
    script(again, again.finish)
    again.launch()
    assert bench.api.job()["metadata"]["name"].endswith("-a2")


def test_a_job_of_another_output_is_not_adopted() -> None:
    bench = another(under_way(), "run-2")
    other = Run(out="s3://bucket/other", id="run-2", stage_digest="d")
    script(bench, bench.finish)
    bench.launch(run=other)
    assert len([name for plural, name in bench.api.objects if plural == "pytorchjobs"]) == 2


# ---------------------------------------------------------------- preparation, entry


def test_a_preparation_step_is_a_job_and_done_when_the_job_is() -> None:
    bench = Bench()
    command = prepare_command(PrepareCall("prepare-data", "/etc/qwenvl-train/recipe.json", OUT))
    render = lambda run: render_prepare(RECIPE, "prepare-data", bench.cluster, run, command)  # noqa: E731
    script(bench, lambda: bench.api.pod(0), lambda: bench.api.condition("Complete"))
    bench.launch(step="prepare-data", render=render, finished=None)
    assert bench.api.job()["kind"] == "Job"
    assert bench.heard("done, attempt 1")


def test_the_examples_images_and_a_local_output_are_refused_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "connect", lambda namespace: pytest.fail("connected"))
    with pytest.raises(ClusterError, match=r"images\.trainer, images\.launcher"):
        launcher.run_step(StepCall("train", "test", OUT, stage="sft"))
    own = "\n".join(f"  {name}: r.example/x@sha256:{'1' * 64}" for name in ("trainer", "launcher", "prepare"))
    text = load_text("test").replace(load_text("test").split("images:\n")[1].split("storage:")[0], own + "\n")
    with pytest.raises(UsageError, match="object store"):
        launcher.run_step(StepCall("train", text, "/tmp/out", stage="sft"))


def load_text(name: str) -> str:
    from importlib import resources

    return (resources.files("k8s") / "clusters" / f"{name}.yaml").read_text(encoding="utf-8")


def test_the_launcher_loads_neither_torch_nor_mlflow_nor_data_frames() -> None:
    """With its client and S3 it stays near 100 MB."""
    script = (
        "import sys, s3fs; from kubernetes import client; import k8s.launcher, k8s.reaper;"
        "from tests.memory import peak_kb;"
        "client.ApiClient(client.Configuration());"
        "heavy = {'torch', 'mlflow', 'pandas', 'pyarrow', 'transformers', 'kfp', 'daft'} & sys.modules.keys();"
        "print(sorted(heavy), peak_kb() // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy, _, memory_mb = done.stdout.strip().rpartition(" ")
    assert heavy == "[]" and int(memory_mb) < 150


def test_the_identity_is_the_digest_at_the_first_step(tmp_path: Any) -> None:
    out = str(tmp_path)
    assert first_digest(out, "sft", "one") == "one"
    assert first_digest(out, "sft", "two") == "one"
    assert first_digest(out, "dpo", "two") == "two"


def test_a_task_of_every_step_renders(tmp_path: Any) -> None:
    recipe = load_recipe("qwen2_5_vl_7b_finetune")
    run = Run(out=str(tmp_path), id="r")
    cluster = load_cluster("test")
    steps = {
        "init": None,
        "export": None,
        "evaluate": None,
        "generate": "sft",
        "prepare-data": None,
        "prepare-stage": "sft",
    }
    for what, stage in {**steps, "requests": "dpo", "select": "dpo"}.items():
        task = task_of(what, recipe, cluster, run, stage=stage)
        rendered = task.render(dataclasses.replace(task.run, attempt=2))
        assert rendered.name.endswith("-a2")
    with pytest.raises(UsageError, match="no such step"):
        task_of("dream", recipe, cluster, run)


def test_heartbeats_of_attempts_before_are_read_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long stage has many attempts, each with pods of other names."""
    for attempt in (1, 2, 3):
        beat = heartbeat.Heartbeat(
            node=f"a{attempt}-worker-0", attempt=attempt, sequence=1, step=attempt, phase="train", phase_limit_s=1
        )
        heartbeat.write_heartbeat(str(tmp_path), beat)
    read: list[str] = []
    before = storage.read_each
    monkeypatch.setattr(
        storage, "read_each", lambda uris: read.extend(uri.rsplit("/", 1)[1] for uri in uris) or before(uris)
    )
    old: set[str] = set()
    assert [progress_of(str(tmp_path), 2, old).step for _ in range(2)] == [2, 2]
    assert sorted(read) == [f"a{n}-worker-0.json" for n in (1, 2, 2, 3, 3)]

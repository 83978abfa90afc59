"""qwenvl submit and qwenvl runs, and the kfp CLI itself, against a small server that speaks Kubeflow Pipelines' API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from k8s import names
from k8s.client import Unreachable
from pipelines import remote
from pipelines.cli.main import main
from pipelines.full_recipe import COMPILED, NAME, compile_to
from pipelines.remote import Place
from tests.pipelines.fake_kfp import FakeKfp, serving

OUT = "s3://bucket/run"
STEPS = {"prepare-data": "SUCCEEDED", "stage1": "SUCCEEDED"}
GOOD = [("RUNNING", {"prepare-data": "RUNNING"}), ("RUNNING", {**STEPS, "stage1": "RUNNING"}), ("SUCCEEDED", STEPS)]
BAD = [("RUNNING", {"prepare-data": "RUNNING"}), ("FAILED", {"prepare-data": "FAILED"})]


COMPILED_ONCE: dict[str, str] = {}


def compile_once(path: Path, pods: Any) -> None:
    """Compiled once for each kind of pods: a second of work that every submit would repeat."""
    if repr(pods) not in COMPILED_ONCE:
        compile_to(path, pods)
        COMPILED_ONCE[repr(pods)] = path.read_text()
    path.write_text(COMPILED_ONCE[repr(pods)])


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKfp]:
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    monkeypatch.setattr("pipelines.full_recipe.compile_to", compile_once)
    monkeypatch.setenv("HOME", str(tmp_path))  # the SDK reads a file there
    # kubernetes reads the variable when it is imported, which another test may have done
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    for name in ("KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "KFP_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    with serving(FakeKfp(script=list(GOOD))) as fake:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.url)
        yield fake


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    """The test cluster's file, with images of somebody's."""
    text = (resources.files("k8s") / "clusters" / "test.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("sha256:" + "0" * 64, "sha256:" + "1" * 64))
    return str(path)


def submit(cluster: str, *more: str, recipe: str = "tiny") -> int:
    return main(["submit", recipe, "--out", OUT, "--cluster", cluster, *more])


def kubeconfig(path: Path, url: str) -> None:
    named = [{"name": "fake", "cluster": {"server": url}}], [{"name": "fake", "user": {}}]
    context = [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}]
    content = {"clusters": named[0], "users": named[1], "contexts": context, "current-context": "fake"}
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}))


# ---------------------------------------------------------------- submit


def test_submit_uploads_a_version_starts_a_run_and_tells_every_change(
    kfp: FakeKfp, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(cluster, "--set", "seed=7", "--accept-change", "seed", "--service-account", "launcher") == 0
    (run,), (experiment,) = kfp.runs.values(), kfp.experiments.values()
    sent = run["runtime_config"]["parameters"]
    assert (sent["recipe"], sent["out"], sent["overrides"], sent["accept_changes"]) == (
        "tiny",
        OUT,
        ["seed=7"],
        ["seed"],
    )
    assert yaml.safe_load(sent["cluster"])["name"] == "test", "the cluster file itself: pods cannot read this machine's"
    assert (experiment["display_name"], run["experiment_id"]) == ("tiny", experiment["experiment_id"])
    assert run["service_account"] == "launcher"
    version = kfp.versions[run["pipeline_version_reference"]["pipeline_version_id"]]
    executors = version["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    assert {one["container"]["image"].rsplit("@")[1] for one in executors.values()} == {"sha256:" + "1" * 64}
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == run["run_id"]
    told = [line.split(" ", 1)[1] for line in lines[3:-1]]
    assert told == ["prepare-data: RUNNING", "prepare-data: SUCCEEDED", "stage1: RUNNING", "stage1: SUCCEEDED"]
    assert lines[-1] == f"run {run['run_id']}: SUCCEEDED"


def test_the_same_definition_is_uploaded_once_another_as_a_new_version(kfp: FakeKfp, cluster: str) -> None:
    assert [submit(cluster, "--detach"), submit(cluster, "--detach")] == [0, 0]
    (first, second) = (run["pipeline_version_reference"] for run in kfp.runs.values())
    assert first == second
    assert len(kfp.pipelines) == 1 and len(kfp.experiments) == 1
    path = Path(cluster)
    path.write_text(path.read_text().replace("sha256:" + "1" * 64, "sha256:" + "2" * 64))
    assert submit(cluster, "--detach") == 0
    references = [run["pipeline_version_reference"] for run in kfp.runs.values()]
    assert references[2]["pipeline_id"] == first["pipeline_id"]
    assert references[2]["pipeline_version_id"] != first["pipeline_version_id"]


def test_a_run_that_fails_is_exit_code_1_with_the_steps_message(
    kfp: FakeKfp, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.script = list(BAD)
    assert submit(cluster) == 1
    out = capsys.readouterr().out
    assert "prepare-data: FAILED  prepare-data: This step is in Error state with this message: exit code 1" in out
    assert ": FAILED  run failed with message" in out.splitlines()[-1]


def test_detached_it_does_not_look_at_the_run(kfp: FakeKfp, cluster: str) -> None:
    assert submit(cluster, "--detach") == 0
    assert not [call for call in kfp.calls if call.startswith("GET /apis/v2beta1/runs")]


@pytest.mark.parametrize(
    ("words", "code", "want"),
    [
        (["tiny", "--out", "out/tiny"], 2, "share no folder"),
        (["tinny", "--out", OUT], 2, "did you mean tiny?"),
        (["tiny", "--out", OUT, "--set", "stages.sft.compute.node_pool=moon"], 2, "has no pool 'moon'"),
        (["tiny", "--out", OUT, "--namespace", "team"], 2, "no namespace"),
    ],
)
def test_what_is_wrong_is_told_before_a_run_is_made(
    kfp: FakeKfp, cluster: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, want: str
) -> None:
    assert main(["submit", *words, "--cluster", cluster]) == code
    assert want in capsys.readouterr().err
    assert kfp.runs == {}


def test_example_images_are_refused(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("onprem", recipe="qwen2_5_vl_7b") == 2
    assert "example's images" in capsys.readouterr().err and not kfp.calls


# ---------------------------------------------------------------- a server that is away


@pytest.mark.parametrize("faults", [[503], [502, 429, 500], [0] * 4])  # the client itself asks four times
def test_following_outlives_a_server_that_is_away(
    kfp: FakeKfp, cluster: str, capsys: pytest.CaptureFixture[str], faults: list[int]
) -> None:
    assert submit(cluster, "--detach") == 0
    kfp.faults = list(faults)
    waited: list[float] = []
    (run_id,) = kfp.runs
    assert remote.follow(Place(kfp.url), run_id, sleep=waited.append) == 0
    out = capsys.readouterr().out
    assert out.count("no answer, asking again") == 1 and out.count("it answers again") == 1
    assert kfp.faults == []
    assert waited[0] == 2.0 and sum(waited) > sum(waited[1:])


def test_it_gives_up_when_the_server_stays_away(kfp: FakeKfp, cluster: str) -> None:
    assert submit(cluster, "--detach") == 0
    kfp.faults = [503] * 1000
    (run_id,), moments = kfp.runs, iter(range(0, 100_000, 600))
    with pytest.raises(remote.Unanswered, match="503"):
        remote.follow(Place(kfp.url), run_id, sleep=lambda _: None, clock=lambda: next(moments))
    assert len(kfp.faults) < 1000 and len(kfp.faults) > 990


def test_a_run_that_is_not_there_is_no_reason_to_ask_again(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "status", "nothing"]) == 2
    assert "does not know it" in capsys.readouterr().err
    assert len([call for call in kfp.calls if "runs/nothing" in call]) == 1


def test_a_token_is_sent_and_a_missing_one_told(
    kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.token = "secret"
    assert main(["runs", "list"]) not in (0, 1)
    assert "KFP_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("KFP_TOKEN", "secret")
    assert main(["runs", "list"]) == 0


def test_where_it_answers_must_be_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    assert main(["runs", "list"]) == 2
    assert "KF_PIPELINES_ENDPOINT" in capsys.readouterr().err


# ---------------------------------------------------------------- runs


def test_list_and_status(kfp: FakeKfp, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.script = list(BAD)
    submit(cluster, "--run-name", "mine")
    capsys.readouterr()
    (run_id,) = kfp.runs
    assert main(["runs", "list"]) == 0
    assert f"{run_id}  FAILED      2026-11-22 12:00  mine  {OUT}" in capsys.readouterr().out
    assert main(["runs", "status", run_id]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine: FAILED  run failed with message"
    assert [line.split()[:3] for line in lines[1:]] == [["prepare-data", "FAILED", "5"]], "kfp's own tasks are left out"


def test_retry_starts_a_failed_run_again_and_follows_it(
    kfp: FakeKfp, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.script = list(BAD)
    assert submit(cluster) == 1
    (run_id,) = kfp.runs
    kfp.script = list(GOOD)
    assert main(["runs", "retry", run_id]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run {run_id}: SUCCEEDED"
    assert main(["runs", "retry", run_id]) == 2
    assert "must be Failed" in capsys.readouterr().err


def test_stop_waits_for_the_runs_end_and_removes_what_it_still_owns(
    kfp: FakeKfp, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    assert submit(cluster, "--detach") == 0
    (run_id,) = kfp.runs
    kfp.jobs = [a_job("mine", run_id), a_job("taken-over", "another-run"), a_job("done", run_id, over=True)]
    kubeconfig(tmp_path / "kubeconfig", kfp.url)
    kfp.calls.clear()
    assert main(["runs", "stop", run_id]) == 0
    assert [one["metadata"]["name"] for one in kfp.jobs] == ["taken-over", "done"]
    ended = max(i for i, call in enumerate(kfp.calls) if call == f"GET /apis/v2beta1/runs/{run_id}")
    deleted = next(i for i, call in enumerate(kfp.calls) if call.startswith("DELETE"))
    assert f"POST /apis/v2beta1/runs/{run_id}:terminate" in kfp.calls and deleted > ended
    assert f"{run_id}: FAILED" in capsys.readouterr().out


def test_stop_without_a_kubeconfig_leaves_the_jobs_to_the_runs_exit_task(
    kfp: FakeKfp, cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    assert submit(cluster, "--detach") == 0
    (run_id,) = kfp.runs
    assert main(["runs", "stop", run_id]) == 0
    assert "exit task removes its jobs" in capsys.readouterr().out
    assert f"POST /apis/v2beta1/runs/{run_id}:terminate" in kfp.calls


def test_stop_with_a_cluster_that_does_not_answer_leaves_the_jobs_to_the_exit_task_too(
    kfp: FakeKfp, cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setattr("k8s.cleanup.connect", Mock(side_effect=Unreachable("the API server did not answer")))
    assert submit(cluster, "--detach") == 0
    (run_id,) = kfp.runs
    assert main(["runs", "stop", run_id]) == 0
    assert "exit task removes its jobs" in (text := capsys.readouterr().out) and "did not answer" in text


def a_job(name: str, owner: str, over: bool = False) -> dict[str, Any]:
    conditions = [{"type": "Failed" if over else "Running", "status": "True"}]
    marks = {names.OWNER: owner, names.OUT: OUT}
    labels = {"app.kubernetes.io/managed-by": f"{names.PREFIX}-launcher"}
    template = {"spec": {"containers": [{"name": "pytorch"}]}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "uid": name, "resourceVersion": "1", "annotations": marks, "labels": labels},
        "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 1, "template": template}}},
        "status": {"conditions": conditions},
    }


def test_steps_have_the_pipelines_names_where_a_server_knows_them_by_their_keys() -> None:
    """As a real 2.14.3 answers: keys of tasks, drivers, executors, groups and the workflow itself."""
    stages = {"train": {"taskInfo": {"name": "stage1"}}, "train-2": {"taskInfo": {"name": "stage2"}}}
    group = {"exit-handler-1": {"taskInfo": {"name": "whole-run"}}}
    spec = {"root": {"dag": {"tasks": group}}, "components": {"comp-exit-handler-1": {"dag": {"tasks": stages}}}}
    version = Mock(pipeline_id="p", pipeline_version_id="v")
    keys = ["train-2", "train", "train-driver", "executor(0)", "executor", "exit-handler-1", "root", f"{NAME}-x7k2p"]
    for given in ({"pipeline_spec": spec}, spec):
        details = [Mock(display_name=key, state="RUNNING") for key in keys]
        run = Mock(pipeline_spec=None, pipeline_version_reference=version, run_details=Mock(task_details=details))
        client = Mock(**{"get_pipeline_version.return_value": Mock(pipeline_spec=given)})
        names_of_steps = remote.names_of(Place("http://kfp"), client, run)
        assert [task.display_name for task in remote.tasks(run, names_of_steps)] == ["stage2", "stage1"]
    assert len(remote.tasks(run, {})) == len(keys), "nothing is left out without a definition"


def test_logs_are_the_lines_of_the_steps_own_pods(
    kfp: FakeKfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeconfig(tmp_path / "mine", kfp.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "mine"))  # after the client was imported
    for name, node in (
        ("full-recipe-x1-system-container-impl-1", "full-recipe-x1.root.stage1"),
        ("full-recipe-x1-system-container-driver-2", "full-recipe-x1.root.stage1-driver"),
        ("full-recipe-x1-system-container-impl-3", "full-recipe-x1.root.export"),
    ):
        metadata: dict[str, Any] = {"name": name, "creationTimestamp": "2026-11-22T12:00:00Z"}
        metadata["annotations"] = {"workflows.argoproj.io/node-name": node}
        kfp.pods.append({"metadata": metadata, "status": {"phase": "Succeeded"}})
        kfp.pod_logs[name] = f"lines of {node}"
    assert main(["runs", "logs", "r1"]) == 0
    out = capsys.readouterr().out
    assert "lines of full-recipe-x1.root.stage1\n" in out and "root.export" in out and "driver" not in out
    assert main(["runs", "logs", "r1", "--step", "export"]) == 0
    assert "stage1" not in capsys.readouterr().out
    assert main(["runs", "logs", "r1", "--step", "sft"]) == 2
    assert "no pod of this step is left" in capsys.readouterr().err


# ---------------------------------------------------------------- kfp's own command line


def kfp_cli(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("kfp")), "--endpoint", url, *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=120, check=False)


def test_the_kfp_cli_starts_the_committed_file(kfp: FakeKfp) -> None:
    words = ["run", "create", "-e", "mine", "-f", str(COMPILED), "recipe=tiny", f"out={OUT}", "cluster=test"]
    done = kfp_cli(kfp.url, *words, 'overrides=["seed=7"]')
    assert done.returncode == 0, done.stderr
    (run,), (experiment,) = kfp.runs.values(), kfp.experiments.values()
    assert run["runtime_config"]["parameters"] == {
        "recipe": "tiny",
        "out": OUT,
        "cluster": "test",
        "overrides": ["seed=7"],
    }
    assert experiment["display_name"] == "mine"
    assert run["run_id"] in done.stdout


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["-f", str(COMPILED), "recipy=tiny", f"out={OUT}"], "do not exist"),
        (["-f", str(COMPILED), "recipe=tiny"], "out is not optional"),
        (["-f", str(COMPILED), "recipe=tiny", f"out={OUT}", "overrides=seed"], "requires type LIST"),
        (["-f", str(COMPILED.with_suffix(".py")), "recipe=tiny", f"out={OUT}"], "should end with one of"),
    ],
)
def test_the_kfp_cli_refuses_wrong_parameters_and_a_python_file(kfp: FakeKfp, words: list[str], want: str) -> None:
    done = kfp_cli(kfp.url, "run", "create", "-e", "mine", *words)
    assert done.returncode != 0 and want in done.stdout + done.stderr
    assert kfp.runs == {}


def test_a_pipeline_that_is_uploaded_has_the_definitions_name(kfp: FakeKfp, cluster: str) -> None:
    assert submit(cluster, "--detach") == 0
    assert [one["display_name"] for one in kfp.pipelines.values()] == [NAME]

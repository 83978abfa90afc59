"""The tiny recipe's pipeline on a real Kubeflow Pipelines, with real PyTorchJobs. make test-kfp; see README.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from k8s import names
from k8s.client import PODS
from k8s.cluster import load_cluster
from k8s.seen import read
from pipelines import remote
from pipelines.full_recipe import compile_to
from pipelines.remote import ENDED, client_of, names_of, tasks
from pipelines.step_pods import of_cluster
from tests.kfp.conftest import EXPERIMENT, FIRST, ONE_STAGE, RECIPE, STAGES, RealKfp
from trainer import handover, storage
from trainer.resolve import from_resolved

pytestmark = pytest.mark.kfp

START_S, STOP_S, STEP_S = 900, 60, 1800
LONG = (*ONE_STAGE, f"stages.{FIRST}.schedule.steps=150", f"stages.{FIRST}.checkpoint.every_steps=25")
"""A stage that is still at work when a lost step comes back: Kubeflow Pipelines waits a minute before that."""


def results(kfp: RealKfp, *stages: str) -> dict[str, bytes]:
    """Every stage's result as it lies in storage, each verified down to its digests."""
    uri = storage.join(kfp.out, "recipe.json")
    recipe = from_resolved(storage.read_json(uri), where=uri)
    for stage in stages:
        assert handover.finished(recipe, stage, kfp.out, verify="full") is not None, stage
    return {stage: storage.read_bytes(handover.result_uri(kfp.out, stage)) for stage in stages}


def states(kfp: RealKfp, run_id: str) -> dict[str, str]:
    run = kfp.run(run_id)
    return {task.display_name: task.state for task in tasks(run, names_of(kfp.place, client_of(kfp.place), run))}


def with_kfps_own_command(kfp: RealKfp, folder: Path) -> str:
    """The run's id. Pods cannot read this machine's files, so the cluster file goes into the output."""
    compile_to(folder / "pipeline.yaml", of_cluster(load_cluster(kfp.reached.cluster)))
    cluster = storage.join(kfp.out, "cluster.yaml")
    storage.write_bytes(cluster, kfp.reached.cluster.encode())
    place = {"--endpoint": kfp.place.host, "--namespace": kfp.place.namespace, "--existing-token": kfp.place.token}
    command = [str(Path(sys.executable).with_name("kfp")), "--output", "json"]
    command += [word for name, value in place.items() if value for word in (name, value)]
    command += ["run", "create", "-e", EXPERIMENT, "-f", str(folder / "pipeline.yaml")]
    command += [f"recipe={RECIPE}", f"out={kfp.out}", f"cluster={cluster}"]
    command += [f"overrides={json.dumps(list(kfp.reached.overrides))}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"/runs/details/([0-9a-f-]{36})", done.stdout)  # the experiment's id is printed before it
    assert found is not None, done.stdout
    kfp.started.append(found[1])
    return found[1]


def test_a_whole_run_and_then_one_that_finds_everything_finished(
    kfp: RealKfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run_id = kfp.submit(wait=True)
    assert code == 0
    assert set(states(kfp, run_id).values()) == {"SUCCEEDED"}, states(kfp, run_id)
    first = results(kfp, *STAGES)
    for name in ("report.html", "run.json"):
        assert storage.exists(storage.join(kfp.out, name)), name
    made = kfp.jobs()
    kinds = {job["metadata"]["labels"][names.STEP]: job["kind"] for job in made.values()}
    assert kinds["prepare-data"] == "Job" and {kinds[f"prepare-{stage}"] for stage in STAGES} == {"Job"}
    assert {kinds[step] for step in (*STAGES, "init", "export", "evaluate")} == {"PyTorchJob"}
    assert {read(job, []).outcome for job in made.values()} == {"succeeded"}
    told: list[str] = []
    assert remote.list_runs(kfp.place, say=told.append) == 0 and any(run_id in line for line in told)
    assert remote.status(kfp.place, run_id, say=told.append) == 0
    assert remote.logs(kfp.place, run_id, step=FIRST, say=told.append) == 0
    assert any(f"{FIRST}: done, attempt 1" in text for text in told), told[-1]

    again = with_kfps_own_command(kfp, tmp_path)
    assert remote.follow(kfp.place, again) == 0
    assert results(kfp, *STAGES) == first, "a finished stage is not made again"
    trained = {name for name, job in kfp.jobs().items() if job["metadata"]["labels"][names.STEP] in STAGES}
    assert trained == {name for name, job in made.items() if job["metadata"]["labels"][names.STEP] in STAGES}


def test_terminated_its_job_is_gone_within_a_minute_and_retried_it_goes_on_to_the_end(kfp: RealKfp) -> None:
    _, run_id = kfp.submit(*ONE_STAGE, wait=False)
    before = kfp.wait(f"{FIRST} runs", lambda: kfp.running(FIRST), START_S)
    client_of(kfp.place).terminate_run(run_id)  # as a person does in the UI: only the run's exit task cleans up
    kfp.wait("the job is gone", lambda: not kfp.under_way(), STOP_S)
    kfp.wait("its pods hold no node's resources any more", lambda: not kfp.pods(FIRST), STOP_S)
    kfp.wait("the run has ended", lambda: kfp.run(run_id).state in ENDED, STOP_S)
    assert remote.retry(kfp.place, run_id) == 0
    results(kfp, FIRST)
    after = kfp.job_of(FIRST)
    assert after is not None and after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["metadata"]["labels"][names.IDENTITY] == before["metadata"]["labels"][names.IDENTITY]


def test_stop_leaves_nothing_and_says_that_the_run_has_ended(kfp: RealKfp) -> None:
    _, run_id = kfp.submit(*LONG, wait=False)
    kfp.wait(f"{FIRST} runs", lambda: kfp.running(FIRST), START_S)
    said: list[str] = []
    assert remote.stop(kfp.place, run_id, say=said.append) == 0
    assert not kfp.under_way() and kfp.run(run_id).state in ENDED, said


def test_steps_whose_pods_are_lost_come_back_and_adopt_the_same_job(kfp: RealKfp) -> None:
    _, run_id = kfp.submit(*LONG, wait=False)
    before = kfp.wait(f"{FIRST} runs", lambda: kfp.running(FIRST), START_S)
    lost = kfp.launcher_pods(run_id)
    assert lost, f"{FIRST}'s own step waits for it"
    for pod in lost:
        assert kfp.steps_api.delete(PODS, pod["metadata"]["name"], uid=pod["metadata"]["uid"])
    assert remote.follow(kfp.place, run_id) == 0
    results(kfp, FIRST)
    after = kfp.job_of(FIRST)
    assert after is not None, "kept until its TTL"
    assert after["metadata"]["uid"] == before["metadata"]["uid"], "the same job, not another attempt"

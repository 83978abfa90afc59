"""The tiny recipe's pipeline on a real Kubeflow Pipelines, with real PyTorchJobs. make test-kfp; see README.md."""

from __future__ import annotations

import pytest

from k8s import names
from k8s.client import PODS
from k8s.seen import read
from pipelines import remote
from pipelines.remote import ENDED, client_of, tasks
from tests.kfp.conftest import RECIPE, RealKfp
from trainer import handover, storage
from trainer.resolve import from_resolved, load_recipe

pytestmark = pytest.mark.kfp

STAGES = tuple(load_recipe(RECIPE).stages.named())
START_S, STOP_S, STEP_S = 900, 60, 1800


def results(kfp: RealKfp) -> dict[str, bytes]:
    """Every stage's result as it lies in storage, each verified down to its digests."""
    uri = storage.join(kfp.out, "recipe.json")
    recipe = from_resolved(storage.read_json(uri), where=uri)
    for stage in STAGES:
        assert handover.finished(recipe, stage, kfp.out, verify="full") is not None, stage
    return {stage: storage.read_bytes(handover.result_uri(kfp.out, stage)) for stage in STAGES}


def test_a_whole_run_and_then_one_that_finds_everything_finished(kfp: RealKfp) -> None:
    code, run_id = kfp.submit(wait=True)
    assert code == 0
    states = {task.display_name: task.state for task in tasks(kfp.run(run_id))}
    assert set(states.values()) == {"SUCCEEDED"}, states
    first = results(kfp)
    for name in ("report.html", "run.json"):
        assert storage.exists(storage.join(kfp.out, name)), name
    made = kfp.jobs()
    kinds = {job["metadata"]["labels"][names.STEP]: job["kind"] for job in made.values()}
    assert kinds["prepare-data"] == "Job" and {kinds[f"prepare-{stage}"] for stage in STAGES} == {"Job"}
    assert {kinds[step] for step in (*STAGES, "init", "export", "evaluate")} == {"PyTorchJob"}
    assert {read(job, []).outcome for job in made.values()} == {"succeeded"}

    code, again = kfp.submit(wait=True)
    assert code == 0 and again != run_id
    assert results(kfp) == first, "a finished stage is not made again"
    trained = {name for name, job in kfp.jobs().items() if job["metadata"]["labels"][names.STEP] in STAGES}
    assert trained == {name for name, job in made.items() if job["metadata"]["labels"][names.STEP] in STAGES}


def test_terminated_its_job_is_gone_within_a_minute_and_retried_it_goes_on_to_the_end(kfp: RealKfp) -> None:
    _, run_id = kfp.submit(wait=False)
    before = kfp.wait("stage1 runs", lambda: kfp.running("stage1"), START_S)
    client_of(kfp.place).terminate_run(run_id)  # as a person does in the UI: only the run's exit task cleans up
    kfp.wait("the job is gone", lambda: not kfp.under_way(), STOP_S)
    kfp.wait("its pods hold no GPU any more", lambda: not kfp.pods("stage1"), STOP_S)
    kfp.wait("the run has ended", lambda: kfp.run(run_id).state in ENDED, STOP_S)
    assert remote.retry(kfp.place, run_id) == 0
    results(kfp)
    after = kfp.job_of("stage1")
    assert after is not None and after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["metadata"]["labels"][names.IDENTITY] == before["metadata"]["labels"][names.IDENTITY]


def test_stop_leaves_nothing_and_says_that_the_run_has_ended(kfp: RealKfp) -> None:
    _, run_id = kfp.submit(wait=False)
    kfp.wait("stage1 runs", lambda: kfp.running("stage1"), START_S)
    said: list[str] = []
    assert remote.stop(kfp.place, run_id, say=said.append) == 0
    assert not kfp.under_way() and kfp.run(run_id).state in ENDED, said


def test_steps_whose_pods_are_lost_come_back_and_adopt_the_same_job(kfp: RealKfp) -> None:
    _, run_id = kfp.submit(wait=False)
    before = kfp.wait("stage1 runs", lambda: kfp.running("stage1"), START_S)
    lost = kfp.launcher_pods(run_id)
    assert lost, "stage1's own step waits for it"
    for pod in lost:
        assert kfp.steps_api.delete(PODS, pod["metadata"]["name"], uid=pod["metadata"]["uid"])
    assert remote.follow(kfp.place, run_id) == 0
    results(kfp)
    after = kfp.job_of("stage1")
    assert after is not None, "kept until its TTL"
    assert after["metadata"]["uid"] == before["metadata"]["uid"], "the same job, not another attempt"

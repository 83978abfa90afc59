"""Kueue: a job over quota waits and says so; it goes on when quota is free; a preempted one resumes."""

from __future__ import annotations

import pytest

from k8s import names
from tests.cluster.bench import Bench

pytestmark = pytest.mark.cluster


def queued(bench: Bench, **queue: str) -> Bench:
    content = bench.cluster.model_dump(mode="json")
    content["queue"] = {"kind": "kueue", "name": "train", **queue}
    content["pools"]["gpu"]["fabric_key"] = None
    return Bench(**{**vars(bench), "cluster": type(bench.cluster).model_validate(content)})


def other(bench: Bench) -> Bench:
    return Bench(**{**vars(bench), "out": f"{bench.out}-other"})


def test_a_job_over_quota_waits_and_runs_when_the_quota_is_free(bench: Bench) -> None:
    first_bench = queued(bench)
    first = first_bench.launch({"steps": 20, "step_s": 0.5})
    bench.running()
    second = other(first_bench).launch({"steps": 2}, run_id="run-2")
    bench.until("the second job to wait", lambda: second.heard("queue: suspended"))
    jobs = bench.items("pytorchjobs")
    suspended = {job["metadata"]["annotations"][names.OWNER]: job["spec"]["runPolicy"]["suspend"] for job in jobs}
    assert suspended == {"run-1": False, "run-2": True}
    first.done()
    second.done()
    assert second.when("queue: suspended") < second.when("step 1")


def test_a_job_within_quota_does_not_wait(bench: Bench) -> None:
    launching = queued(bench).launch({"steps": 2})
    launching.done()
    assert launching.heard("step 2")


def test_a_job_that_a_more_urgent_one_suspends_resumes_from_its_commit(bench: Bench) -> None:
    bench_1 = queued(bench)
    low = bench_1.launch({"steps": 30, "step_s": 0.5, "commit_every": 2})
    bench.until("a commit", lambda: 4 in bench_1.commits())
    urgent = other(queued(bench, priority_class="urgent"))
    high = urgent.launch({"steps": 2}, run_id="run-2")
    bench.until("the suspension", lambda: low.heard("queue: suspended"))
    high.done()
    low.done()
    result = bench_1.result()
    assert result["from"] >= 4, "it went on from its last commit"
    assert result["attempt"] == "1", "a suspension is no attempt"

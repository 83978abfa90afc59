"""Kueue: a job over quota waits and says so; it goes on when quota is free; a preempted one resumes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from k8s import names
from tests.cluster.bench import Bench
from tests.cluster.queues import queued, room

pytestmark = pytest.mark.cluster


@pytest.fixture
def queue(bench: Bench) -> Iterator[Bench]:
    """With room for one stage of two GPUs."""
    with room(bench, gpus="2"):
        yield queued(bench)


def test_a_job_over_quota_waits_and_runs_when_the_quota_is_free(queue: Bench) -> None:
    first = queue.launch({"step_s": 0.5})
    queue.running()
    second = queue.other_out().launch({"steps": 2}, run_id="run-2")
    queue.until("the second job to wait", lambda: second.heard("queue: suspended"))
    jobs = queue.items("pytorchjobs")
    suspended = {job["metadata"]["annotations"][names.OWNER]: job["spec"]["runPolicy"]["suspend"] for job in jobs}
    assert suspended == {"run-1": False, "run-2": True}
    queue.let_end()
    first.done()
    second.done()
    assert second.when("queue: suspended") < second.when("step 1")


@pytest.mark.control
def test_a_job_within_quota_does_not_wait(queue: Bench) -> None:
    launching = queue.launch({"steps": 2})
    launching.done()
    assert launching.heard("step 2")


def test_a_job_that_a_more_urgent_one_suspends_resumes_from_its_commit(queue: Bench) -> None:
    low = queue.launch({"step_s": 0.5, "commit_every": 2})
    queue.until("a commit", lambda: 4 in queue.commits())
    urgent = queued(queue, priority_class="urgent").other_out()
    high = urgent.launch({"step_s": 0.5}, run_id="run-2")
    queue.until("the suspension", lambda: low.heard("queue: suspended"))
    urgent.let_end()
    high.done()
    queue.let_end()
    low.done()
    result = queue.result()
    assert result["from"] >= 4, "it went on from its last commit"
    assert result["attempt"] == "1", "a suspension is no attempt"

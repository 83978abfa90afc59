"""A stage of two workers from the launcher to its result: placement, rendezvous by DNS, logs, success, nothing left."""

from __future__ import annotations

import pytest

from tests.cluster.bench import OF_THE_NAMESPACE, Bench

pytestmark = pytest.mark.cluster


@pytest.mark.alone  # all GPUs of both nodes
def test_two_workers_meet_step_and_succeed_and_the_launcher_shows_rank_0s_log(bench: Bench) -> None:
    before = bench.objects()
    launching = bench.launch({"steps": 5, "step_s": 0.5, "gloo": True}, gpus=8)
    pods = bench.running()
    assert {pod["spec"]["nodeName"] for pod in pods} == {"gpu-a-0", "gpu-a-1"}, "one pod a node, in the stage's pool"
    launching.done()
    assert bench.result() == {"attempt": "1", "from": 0, "reduced": 3.0}
    assert [line for line in launching.lines() if line.startswith("step ")] == [f"step {n}" for n in range(1, 6)]
    (job,) = bench.jobs()
    maps = [one for one in bench.items("configmaps") if one["metadata"]["name"] != "kube-root-ca.crt"]
    assert [one["metadata"]["ownerReferences"][0]["name"] for one in maps] == [job["metadata"]["name"]]
    # What the stage leaves goes with its job.
    bench.kubectl("delete", "pytorchjob", job["metadata"]["name"])
    bench.until("no pods, services and ConfigMaps", lambda: not bench.objects() - before - OF_THE_NAMESPACE)


def test_a_finished_stage_is_not_trained_again(bench: Bench) -> None:
    bench.launch({"steps": 1}).done()
    again = bench.launch({"steps": 1}, run_id="run-2")
    again.done(20)
    assert again.heard("done already")
    assert len(bench.jobs()) == 1

"""What goes wrong with workers, nodes and launchers on a real cluster, and what the launcher decides.

Controls: the same stage without the fault, which several rows share, or the same fault where it must lead elsewhere.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from k8s import logs, names
from tests.cluster import nodes
from tests.cluster.bench import PATIENCE, Bench
from tests.cluster.conftest import Reached
from trainer import storage
from trainer.errors import ClusterError, Hang

pytestmark = pytest.mark.cluster

AT_3: dict[str, Any] = {"steps": 6, "commit_every": 2}
ON: dict[str, Any] = {"step_s": 0.5, "commit_every": 2}
"""Until it is told to end."""


def ends(how: object, *, rank: int = 1, attempts: int = 1, step: int = 3) -> dict[str, Any]:
    return {**AT_3, "ends": {str(attempt): {str(rank): [step, how]} for attempt in range(1, attempts + 1)}}


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize("how", ["kill", 137, 143], ids=["sigkill", "137", "143-without-a-sign-of-preemption"])
def test_a_worker_that_was_killed_is_tried_again_from_the_last_commit(bench: Bench, how: object) -> None:
    launching = bench.launch(ends(how))
    launching.done()
    assert bench.result() == {"attempt": "2", "from": 2, "reduced": 3.0}, "the second attempt goes on from step 2"
    assert [job["metadata"]["name"][-3:] for job in bench.jobs()] == ["-a1", "-a2"]


@pytest.mark.parametrize(("how", "code"), [(2, 2), (65, 65)])
def test_an_error_of_one_rank_that_trying_again_cannot_mend_ends_the_stage(bench: Bench, how: int, code: int) -> None:
    error = bench.launch(ends(how)).ended()
    assert isinstance(error, ClusterError) and error.code == code
    assert f"told to end with {how}" in str(error), "the cause is told, not its consequence on the other rank"
    assert len(bench.jobs()) == 1


def test_two_ranks_that_end_differently_the_permanent_code_wins(bench: Bench) -> None:
    payload = {**AT_3, "ends": {"1": {"0": [3, "kill"], "1": [3, 65]}}}
    error = bench.launch(payload).ended()
    assert isinstance(error, ClusterError) and error.code == 65
    assert len(bench.jobs()) == 1


def test_an_unknown_error_is_tried_once_more_and_then_is_permanent(bench: Bench) -> None:
    error = bench.launch(ends(1, attempts=5)).ended()
    assert isinstance(error, ClusterError) and "the same error came back" in str(error)
    assert len(bench.jobs()) == 2


@pytest.mark.control
def test_an_unknown_error_that_does_not_return_is_survived(bench: Bench) -> None:
    bench.launch(ends(1, attempts=1)).done()
    assert bench.result()["attempt"] == "2"


@pytest.mark.control
def test_memory_within_its_limit_is_no_fault(bench: Bench) -> None:
    bench.launch({"steps": 3}, memory="900Mi").done()
    assert bench.result()["attempt"] == "1"


def test_out_of_memory_is_tried_once_more_and_told_as_such(bench: Bench) -> None:
    error = bench.launch(ends("memory", attempts=5), memory="900Mi").ended()
    assert isinstance(error, ClusterError) and error.code == 147, error
    assert len(bench.jobs()) == 2


# ---------------------------------------------------------------- silence


def test_a_rank_that_hangs_is_ended_and_the_next_attempt_resumes(bench: Bench) -> None:
    launching = bench.launch(ends("hang"))
    launching.done()
    codes = {end.code for end in logs.stored_ends(storage.join(bench.out, "sft"), 1).values()}
    assert Hang.code in codes, codes
    assert bench.result() == {"attempt": "2", "from": 2, "reduced": 3.0}


def test_a_pod_whose_heartbeat_stops_ends_the_attempt_and_its_node_is_left_out(bench: Bench, reached: Reached) -> None:
    if not reached.own:
        pytest.skip("a container of KUBECONFIG's cluster cannot be frozen from here")
    launching = bench.limited(silence_s=int(12 * PATIENCE)).launch(ON)
    bench.until("a commit", lambda: 4 in bench.commits())
    frozen = bench.running()[1]
    nodes.task(frozen, "pause")
    try:
        bench.until("the end of the attempt", lambda: launching.heard("attempt 1 ended: no heartbeat of"))
    finally:
        nodes.task(frozen, "resume")  # a frozen process cannot even be killed
    bench.running(attempt=2)
    bench.let_end()
    launching.done()
    assert launching.heard(f"without nodes {frozen['spec']['nodeName']}"), launching.lines()
    assert bench.jobs()[-1]["metadata"]["annotations"][names.EXCLUDED] == frozen["spec"]["nodeName"]
    result = bench.result()
    assert result["attempt"] == "2" and result["from"] >= 4


# ---------------------------------------------------------------- pods taken away


@pytest.mark.parametrize("force", [False, True], ids=["deleted", "force-deleted"])
def test_a_deleted_worker_ends_the_attempt_and_the_next_one_resumes(bench: Bench, force: bool) -> None:
    launching = bench.launch(ON)
    bench.until("a commit", lambda: 4 in bench.commits())
    name = bench.running()[1]["metadata"]["name"]
    bench.kubectl("delete", "pod", name, "--wait=false", *(["--grace-period=0", "--force"] if force else []))
    bench.until("the end of the attempt", lambda: launching.heard("attempt 1 ended"))
    bench.running(attempt=2)
    bench.let_end()
    launching.done()
    result = bench.result()
    assert result["attempt"] == "2" and result["from"] >= 4


def test_an_evicted_worker_is_a_preemption_and_no_attempt_is_counted(bench: Bench) -> None:
    launching = bench.launch(ON)
    bench.until("a commit", lambda: 4 in bench.commits())
    pod = bench.running()[1]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": bench.namespace}}
    path = f"/api/v1/namespaces/{bench.namespace}/pods/{pod}/eviction"
    bench.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(eviction))
    bench.until("the preemption", lambda: launching.heard("attempt 1 ended"))
    bench.running(attempt=2)
    bench.let_end()
    launching.done()
    assert launching.heard("preempted"), launching.lines()
    assert bench.result()["attempt"] == "2"


# ---------------------------------------------------------------- what never starts


def test_an_image_that_is_not_there_is_told_and_nothing_keeps_the_gpus(bench: Bench) -> None:
    missing = f"test.example/none@sha256:{'ab' * 32}"
    error = bench.launch({"steps": 1}, image=missing).ended(120)
    assert isinstance(error, ClusterError) and "the image cannot be pulled" in str(error)
    bench.until("no pods", lambda: bench.items("pods") == [], 60)


def test_a_missing_secret_is_told_by_name(bench: Bench) -> None:
    bench.kubectl("delete", "secret", "qwenvl-train-s3")
    error = bench.launch({"steps": 1}).ended(120)
    assert isinstance(error, ClusterError) and "qwenvl-train-s3" in str(error)


def test_a_stage_that_no_node_can_take_says_why_and_gives_up_in_time(bench: Bench) -> None:
    small = bench.limited(schedule_s=8)
    launching = small.launch({"steps": 1}, nodes=3, gpus=8)
    error = launching.ended(90)
    assert isinstance(error, ClusterError) and "nvidia.com/gpu" in str(error) and "schedule_s" in str(error)
    bench.until("no pods", lambda: bench.items("pods") == [], 60)


@pytest.mark.control
@pytest.mark.alone  # all GPUs of both nodes
def test_a_stage_that_the_nodes_can_take_is_given_the_same_time(bench: Bench) -> None:
    bench.limited(schedule_s=8).launch({"steps": 1}, gpus=8).done()

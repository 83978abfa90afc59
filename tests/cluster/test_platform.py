"""What carries a stage goes away for a while: API server, etcd, operator, a node. The stage goes on or resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from k8s import names
from k8s.cleanup import remove_owned
from tests.cluster import control, nodes, operators, place, programs
from tests.cluster.bench import Bench
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from tests.cluster.processes import pid_of, stop

pytestmark = pytest.mark.cluster
LONG = {"steps": 30, "step_s": 0.5, "commit_every": 2}


@pytest.fixture
def built(reached: Reached) -> programs.Programs:
    if not reached.own:
        pytest.skip("KUBECONFIG's cluster is not ours to disturb")
    return programs.build()


@contextlib.contextmanager
def stopped(name: str) -> Iterator[None]:
    """SIGSTOP for a while: the program is there and does not answer."""
    pid = pid_of(name)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_api_server_that_is_away_for_a_while_costs_no_attempt(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(LONG)
    bench.until("a commit", bench.commits)
    stop("kube-apiserver", signal.SIGKILL)
    time.sleep(8)
    control.start_api_server(built)
    control.api_server_ready()
    launching.done()
    assert bench.result()["attempt"] == "1" and len(bench.jobs()) == 1


def test_an_etcd_that_does_not_answer_for_a_while_costs_no_attempt(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(LONG)
    bench.until("a commit", bench.commits)
    with stopped("etcd"):
        time.sleep(8)
    launching.done()
    assert bench.result()["attempt"] == "1"


def test_an_operator_that_is_away_delays_the_stage(bench: Bench, built: programs.Programs) -> None:
    """Its webhook is asked at every creation, so nothing can be created meanwhile."""
    stop(operators.OPERATOR, signal.SIGKILL)
    try:
        launching = bench.launch({"steps": 2})
        time.sleep(6)
        assert bench.jobs() == []
    finally:
        operators.start_training_operator(built)
        operators.training_operator_ready()
    launching.done()
    assert bench.result()["attempt"] == "1"


def test_an_operator_that_is_restarted_in_the_middle_costs_no_attempt(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(LONG)
    bench.until("a commit", bench.commits)
    stop(operators.OPERATOR, signal.SIGKILL)
    operators.start_training_operator(built)
    operators.training_operator_ready()
    launching.done()
    assert bench.result()["attempt"] == "1"


def test_a_node_that_is_lost_ends_the_attempt_and_the_next_resumes(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(LONG, gpus=4)
    bench.until("a commit", bench.commits)
    # gpus=4: both workers fit on one node, so the next attempt has a place while the other node is away.
    lost = next(node for node in place.NODES if node.name == bench.running()[1]["spec"]["nodeName"])
    stop(nodes.kubelet_name(lost), signal.SIGKILL)
    began = time.monotonic()
    try:
        bench.until("the end of the first attempt", lambda: launching.heard("attempt 1 ended"))
        assert time.monotonic() - began < 60
    finally:
        nodes.start_kubelet(built, lost)
        nodes.node_ready(lost)
    launching.done()
    result = bench.result()
    assert result["attempt"] == "2" and result["from"] >= 2


def test_a_drained_node_is_a_preemption(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(LONG)
    bench.until("a commit", bench.commits)
    node = bench.running()[1]["spec"]["nodeName"]
    try:
        bench.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s")
    finally:
        bench.kubectl("uncordon", node)
    launching.done()
    assert launching.heard("preempted"), launching.lines()
    result = bench.result()
    assert result["attempt"] == "2" and result["from"] >= 2


def test_of_two_launchers_for_one_stage_one_goes_on(bench: Bench) -> None:
    first = bench.launch(LONG)
    second = bench.launch(LONG, run_id="run-2")
    ended = [one.ended() for one in (first, second)]
    assert sum(error is None for error in ended) == 1, ended
    assert "another run took the job over" in str(next(error for error in ended if error is not None))
    assert len(bench.jobs()) == 1 and bench.result()["attempt"] == "1"


def test_a_run_that_is_terminated_leaves_a_job_that_another_run_adopted(bench: Bench) -> None:
    first = bench.launch(LONG)
    bench.until("a commit", bench.commits)
    second = bench.launch(LONG, run_id="run-2")
    bench.until("the adoption", lambda: second.heard("adopted"))
    api = api_of(str(bench.launcher), bench.namespace)
    assert remove_owned(api, out=bench.out, owner="run-1") == []
    assert first.ended(60) is not None
    second.done()
    (job,) = bench.jobs()
    assert job["metadata"]["annotations"][names.OWNER] == "run-2"

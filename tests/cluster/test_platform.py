"""What carries a stage goes away for a while: API server, etcd, operator, a node. The stage goes on or resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s import names
from k8s.cleanup import remove_owned
from tests.cluster import control, nodes, operators, place, programs, sharing
from tests.cluster.bench import PATIENCE, Bench
from tests.cluster.conftest import Reached
from tests.cluster.processes import pid_of, stop

pytestmark = pytest.mark.cluster
ON = {"step_s": 0.5, "commit_every": 2}
"""Until it is told to end."""
AWAY_S = float(os.environ.get("TEST_AWAY_S", "8"))
"""A restart of an API server takes some seconds; make test-cluster-full makes it a minute."""


OUTSIDE = Path("/proc/self/ns/net").stat().st_ino
"""The network of this process before it goes into the cluster's."""


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


def api_server_away(built: programs.Programs) -> None:
    stop("kube-apiserver", signal.SIGKILL)
    time.sleep(AWAY_S)
    control.start_api_server(built)
    control.api_server_ready()


def etcd_away(built: programs.Programs) -> None:
    with stopped("etcd"):
        time.sleep(AWAY_S)


def operator_restarted(built: programs.Programs) -> None:
    stop(operators.OPERATOR, signal.SIGKILL)
    operators.start_training_operator(built)
    operators.training_operator_ready()


@pytest.mark.alone
def test_parts_of_the_control_plane_that_are_away_for_a_while_cost_no_attempt(
    bench: Bench, built: programs.Programs
) -> None:
    """One stage outlives them one after the other; after each it still commits, and its launcher still sees it."""
    launching = bench.launch(ON)
    for disturb in (api_server_away, etcd_away, operator_restarted):
        before = bench.until("a commit", bench.commits)[-1]
        heard = len(launching.lines())
        disturb(built)
        bench.until(f"commits after {disturb.__name__}", lambda last=before: bench.commits()[-1] > last + 4)
        bench.until(
            f"rank 0's log after {disturb.__name__}",
            lambda count=heard: any(line.startswith("step ") for line in launching.lines()[count:]),
        )
        assert [job["metadata"]["labels"][names.ATTEMPT] for job in bench.jobs()] == ["1"], disturb.__name__
    assert remove_owned(bench.api, out=bench.out, owner="run-1") != []
    assert "the job is gone" in str(launching.ended(60)), "it sees what becomes of the job"


@pytest.mark.alone
def test_an_operator_whose_webhook_is_down_delays_the_stage(bench: Bench, built: programs.Programs) -> None:
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


@pytest.mark.alone
def test_a_node_that_is_lost_ends_the_attempt_and_the_next_resumes(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(ON)
    bench.until("a commit", bench.commits)
    lost = next(node for node in place.NODES if node.name == bench.running()[1]["spec"]["nodeName"])
    stop(nodes.kubelet_name(lost), signal.SIGKILL)
    began = time.monotonic()
    try:
        bench.until("the end of the first attempt", lambda: launching.heard("attempt 1 ended"))
        assert time.monotonic() - began < 60 * PATIENCE
    finally:
        nodes.start_kubelet(built, lost)
        nodes.node_ready(lost)
    bench.running(attempt=2)
    bench.let_end()
    launching.done()
    result = bench.result()
    assert result["attempt"] == "2" and result["from"] >= 2


def test_a_drained_node_is_a_preemption(bench: Bench, built: programs.Programs) -> None:
    launching = bench.launch(ON)
    bench.until("a commit", bench.commits)
    node = bench.running()[1]["spec"]["nodeName"]
    ours = f"--pod-selector={names.ATTEMPT}=1,{names.IDENTITY}={bench.jobs()[0]['metadata']['labels'][names.IDENTITY]}"
    options = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s", ours)
    try:
        bench.kubectl("drain", node, *options)
    finally:
        bench.kubectl("uncordon", node)
    bench.until("the preemption", lambda: launching.heard("attempt 1 ended"))
    bench.running(attempt=2)
    bench.let_end()
    launching.done()
    assert launching.heard("preempted"), launching.lines()
    result = bench.result()
    assert result["attempt"] == "2" and result["from"] >= 2


def test_every_program_is_in_the_clusters_network_and_nothing_listens_outside(reached: Reached) -> None:
    if not reached.own:
        pytest.skip("KUBECONFIG's cluster has a network of its own")
    inside = place.NETNS.stat().st_ino
    with sharing.using(alone=False):
        running = control.running()
        assert {"etcd", "kube-apiserver", "kueue", "training-operator", "coredns"} <= {name for name, *_ in running}
        for name, pid, _ in running:
            assert Path(f"/proc/{pid}/ns/net").stat().st_ino == inside != OUTSIDE, name
    # Nor does the cluster reach anything: there is no way out of its network.
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("192.0.2.1", 80)) != 0

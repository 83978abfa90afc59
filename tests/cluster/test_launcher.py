"""Launchers: killed at any moment, two for one stage, a slow API server; and what a quiet one costs."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from k8s import names
from k8s.cleanup import reap, remove_owned
from tests.cluster import place
from tests.cluster.bench import PATIENCE, Bench
from tests.cluster.between import relay
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from trainer.errors import ClusterError

pytestmark = pytest.mark.cluster

ON = {"step_s": 0.5, "commit_every": 2}
"""Until it is told to end."""
CALLS_A_MINUTE = 10
LAUNCHER_BYTES = 150 << 20
QUIET_S = float(os.environ.get("TEST_QUIET_S", "60"))
"""A gigabyte of log takes some 20 minutes."""


@pytest.mark.parametrize(
    ("moment", "jobs", "then"),
    [("before create", 0, "created"), ("after create", 1, "adopted"), ("after success", 1, "done already")],
)
def test_a_launcher_that_is_killed_leaves_a_stage_that_the_next_one_ends(
    bench: Bench, moment: str, jobs: int, then: str
) -> None:
    payload = {"steps": 3}
    with bench.process(payload, die=moment) as process:
        assert process.wait(180 * PATIENCE) == -signal.SIGKILL
    assert len(bench.jobs()) == jobs
    again = bench.launch(payload, run_id="run-2")
    again.done()
    assert again.heard(then), again.lines()
    assert len(bench.jobs()) == 1
    assert bench.result() == {"attempt": "1", "from": 0, "reduced": 3.0}


def test_a_launcher_that_is_killed_while_its_job_runs_is_replaced_and_the_job_is_adopted(bench: Bench) -> None:
    with bench.process(ON) as process:
        bench.running()
        process.send_signal(signal.SIGKILL)
        process.wait()
    uid = bench.jobs()[0]["metadata"]["uid"]
    again = bench.launch(ON, run_id="run-2")
    bench.until("the adoption", lambda: again.heard("adopted"))
    bench.let_end()
    again.done()
    (job,) = bench.jobs()
    assert job["metadata"]["uid"] == uid and job["metadata"]["annotations"][names.OWNER] == "run-2"
    assert bench.result() == {"attempt": "1", "from": 0, "reduced": 3.0}


@pytest.mark.control
def test_another_spec_is_not_adopted_and_its_difference_is_told(bench: Bench) -> None:
    bench.launch(ON)
    bench.running()
    error = bench.launch(ON, run_id="run-2", memory="7Gi").ended(60)
    assert isinstance(error, ClusterError) and "wanted" in str(error) and "7Gi" in str(error)
    (job,) = bench.jobs()
    assert job["metadata"]["annotations"][names.OWNER] == "run-1"


def test_of_two_launchers_for_one_stage_one_goes_on(bench: Bench) -> None:
    """A pipeline's run that was submitted twice."""
    both = [bench.launch(ON, run_id=run) for run in ("run-1", "run-2")]
    bench.until("the end of one", lambda: any(not one.thread.is_alive() for one in both))
    bench.let_end()
    ended = [one.ended() for one in both]
    assert sum(error is None for error in ended) == 1, ended
    assert "another run took the job over" in str(next(error for error in ended if error is not None))
    assert len(bench.jobs()) == 1 and bench.result()["attempt"] == "1"


def test_a_run_that_is_terminated_leaves_a_job_that_another_run_adopted(bench: Bench) -> None:
    first = bench.launch(ON)
    bench.until("a commit", bench.commits)
    second = bench.launch(ON, run_id="run-2")
    bench.until("the adoption", lambda: second.heard("adopted"))
    api = api_of(str(bench.launcher), bench.namespace)
    assert remove_owned(api, out=bench.out, owner="run-1") == []
    assert first.ended(60) is not None
    bench.let_end()
    second.done()
    (job,) = bench.jobs()
    assert job["metadata"]["annotations"][names.OWNER] == "run-2"


@pytest.mark.control
def test_a_run_that_is_terminated_takes_its_own_job_with_it(bench: Bench) -> None:
    launching = bench.launch(ON)
    bench.running()
    api = api_of(str(bench.launcher), bench.namespace)
    assert remove_owned(api, out=bench.out, owner="another-run") == []
    assert len(remove_owned(api, out=bench.out, owner="run-1")) == 1
    assert "the job is gone" in str(launching.ended(60))
    bench.until("no pods", lambda: bench.items("pods") == [], 60)


def test_an_api_server_that_is_slow_and_breaks_connections_off_costs_no_attempt(bench: Bench, reached: Reached) -> None:
    if not reached.own:
        pytest.skip("the way to KUBECONFIG's API server is not ours to disturb")
    with relay(place.GATEWAY, 443) as between:
        between.delay_s = 0.7
        launching = bench.through(between).launch(ON)
        for step in (2, 6, 12):
            bench.until(f"step {step} in rank 0's log", lambda step=step: launching.heard(f"step {step}"))
            between.break_off()
        bench.let_end()
        launching.done()
    assert bench.result()["attempt"] == "1" and len(bench.jobs()) == 1


def test_a_job_that_nobody_watches_is_reaped(bench: Bench) -> None:
    with bench.process(ON) as process:
        bench.running()
        process.send_signal(signal.SIGKILL)
        process.wait()
    api = api_of(str(bench.launcher), bench.namespace)
    (name,) = (job["metadata"]["name"] for job in bench.jobs())
    looks = [list(reap(api, after=2)) for _ in range(3)]
    assert looks[:2] == [[], []] and looks[2][0].startswith(f"removed {name}: owner run-1")
    bench.until("no pods", lambda: bench.items("pods") == [], 60)


def test_a_quiet_stage_costs_few_calls_and_its_launcher_little_memory(bench: Bench, reached: Reached) -> None:
    """While rank 0 prints a megabyte a second, all of which the launcher shows."""
    if not reached.own:
        pytest.skip("the audit log of KUBECONFIG's API server cannot be read")
    with bench.limited(deadline_s=int(QUIET_S) + 900).process({"step_s": 1.0, "log_mb": 1}) as process:
        bench.running()
        bench.until("a heartbeat", lambda: bench.heard("\nstep 3\n"))
        began = datetime.now(UTC).isoformat()
        time.sleep(QUIET_S)
        assert process.poll() is None, "it ended before"
        events = [one for one in bench.audited() if one["requestReceivedTimestamp"] > began]
        shown = bench.told.stat().st_size
        peak = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    calls = [f"{one['verb']} {one['requestURI']}" for one in events]
    print(f"{len(calls)} calls in {QUIET_S:.0f} s, {shown >> 20} MiB shown; {peak}")
    assert len(calls) <= CALLS_A_MINUTE * QUIET_S / 60, calls
    assert shown > QUIET_S / 3 * 2**20, "the log was followed meanwhile"
    assert int(peak.split()[1]) << 10 <= LAUNCHER_BYTES, peak

"""The wall time of a run: the sum over its attempts, killed ones as far as they were recorded."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from pipelines import spent
from pipelines.report.facts import read_facts, run_json
from tests.pipelines.builders import ARun, pids, seconds_until_gone, sleeper
from tests.report.test_report import a_run
from trainer import storage


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_attempts_add_up_and_the_time_between_them_does_not_count(tmp_path: Path) -> None:
    clock, out = Clock(), str(tmp_path)
    assert spent.total_s(out) is None
    with spent.recorded(out, "one", clock=clock):
        clock.now += 30
    clock.now += 86400
    with pytest.raises(ZeroDivisionError), spent.recorded(out, "two", clock=clock):
        clock.now += 12
        assert spent.total_s(out, "two", clock=clock) == 42
        raise ZeroDivisionError
    clock.now += 5
    assert spent.total_s(out, clock=clock) == 42


def test_a_running_attempt_is_written_again_and_again(tmp_path: Path) -> None:
    with spent.recorded(str(tmp_path), "one", every_s=0.02):
        time.sleep(0.3)
        assert storage.read_json(str(tmp_path / "runs/one.json"))["wall_s"] > 0.05, "what a kill would leave"
        assert storage.read_json(str(tmp_path / "runs/one.json"))["state"] == "running"
    assert storage.read_json(str(tmp_path / "runs/one.json"))["state"] == "ended"


def test_the_report_counts_attempts_and_not_the_age_of_the_output(tmp_path: Path) -> None:
    out = a_run(str(tmp_path))
    assert run_json(read_facts(out))["wall_s"] == 160, "without records: the programs' own seconds"
    for name, wall_s in (("one", 100.0), ("two", 20.5)):
        storage.write_json(f"{out}/runs/{name}.json", {"began": 0.0, "wall_s": wall_s, "state": "ended"})
    assert run_json(read_facts(out))["wall_s"] == 120.5


def test_a_run_records_every_attempt_also_one_that_was_killed(tmp_path: Path) -> None:
    run = ARun(tmp_path, {"stage1": sleeper("stage1.pids")})
    process = run.start()
    found = pids(run, "stage1.pids")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    seconds_until_gone([process.pid, *found])
    (first,) = [json.loads(path.read_text()) for path in (run.out / "runs").iterdir()]
    assert first["state"] == "running"
    ended = ARun(tmp_path, {"stage1": "pass"}).finish()
    assert ended.code == 0, ended.stderr
    records = {path.name: json.loads(path.read_text()) for path in (run.out / "runs").iterdir()}
    assert sorted(record["state"] for record in records.values()) == ["ended", "running"]
    assert all(0 <= record["wall_s"] < 120 for record in records.values())

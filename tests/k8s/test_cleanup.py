"""Removing jobs: only what a run still owns, what a person stops, what nobody watches any more."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from k8s import cleanup, names, reaper
from k8s.attempts import NEVER
from k8s.client import Conflict, Json, Kind
from k8s.cluster import load_cluster
from tests.k8s.bench import OUT, Bench, another, script, under_way
from tests.k8s.memory import MemoryApi
from trainer.errors import ClusterError, UsageError


@pytest.mark.parametrize(
    ("owner", "out", "condition", "removed"),
    [
        ("run-1", OUT, None, 1),
        ("run-1", OUT + "/", None, 1),
        ("run-2", OUT, None, 0),
        ("run-1", "s3://bucket/other", None, 0),
        ("run-1", OUT, "Succeeded", 0),
    ],
)
def test_clean_up_removes_what_the_run_owns_and_nothing_else(
    owner: str, out: str, condition: str | None, removed: int
) -> None:
    bench = under_way()
    if condition:
        bench.api.condition(condition)
    assert len(cleanup.remove_owned(bench.api, out=out, owner=owner)) == removed
    assert len([name for plural, name in bench.api.objects if plural == "pytorchjobs"]) == 1 - removed


def test_a_job_that_another_run_took_over_survives_the_first_runs_clean_up() -> None:
    bench = under_way()
    taken = another(bench, "run-2")
    taken.launcher()._newest()
    assert taken.heard("adopted")
    assert cleanup.remove_owned(bench.api, out=OUT, owner="run-1") == []
    assert len(cleanup.remove_owned(bench.api, out=OUT, owner="run-2")) == 1


def test_a_job_that_is_taken_over_between_the_list_and_the_deletion_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = under_way()
    listed = bench.api.list

    def adopted_after(kind: Kind, labels: Mapping[str, str]) -> list[Json]:
        found = listed(kind, labels)
        monkeypatch.undo()
        another(bench, "run-2").launcher()._newest()
        return found

    monkeypatch.setattr(bench.api, "list", adopted_after)
    assert cleanup.remove_owned(bench.api, out=OUT, owner="run-1") == [] and bench.jobs()


@pytest.mark.parametrize(("condition", "removed"), [("Running", 1), ("Succeeded", 0)])
def test_a_job_whose_status_changes_meanwhile_is_removed_unless_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, condition: str, removed: int
) -> None:
    bench = under_way()
    listed = bench.api.list

    def busy(kind: Kind, labels: Mapping[str, str]) -> list[Json]:
        found = listed(kind, labels)
        if found:
            bench.api.condition(condition)
        return found

    monkeypatch.setattr(bench.api, "list", busy)
    assert len(cleanup.remove_owned(bench.api, out=OUT, owner="run-1")) == removed
    assert len(bench.jobs()) == 1 - removed


def test_the_exit_task_of_a_run_leaves_what_a_person_took_over(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = under_way()
    another(bench, cleanup.default_run_id(OUT)).launcher()._newest()
    monkeypatch.setattr(cleanup, "connect", lambda namespace: bench.api)
    cleanup.clean_up("test", out=OUT, run_id="run-1")
    assert bench.jobs()
    cleanup.clean_up("test", out=OUT, run_id="")
    assert not bench.jobs()


# ---------------------------------------------------------------- stop


@pytest.mark.parametrize(
    ("out", "step", "want"), [(OUT, None, 1), (OUT + "/", "sft", 1), (OUT, "dpo", 0), ("s3://bucket/other", None, 0)]
)
def test_a_person_stops_a_step_whoever_owns_it(out: str, step: str | None, want: int) -> None:
    bench = under_way(run_id="somebody")
    assert len(cleanup.stop(bench.api, out=out, step=step)) == want
    assert len(bench.jobs()) == 1 - want


def test_a_suspended_job_is_kept_and_resumed_by_the_next_launcher() -> None:
    bench = under_way()
    assert cleanup.stop(bench.api, out=OUT, suspend=True) == bench.jobs()
    job = bench.api.job()
    assert job["spec"]["runPolicy"]["suspend"] is True and names.SUSPENDED in job["metadata"]["annotations"]
    again = another(bench, "run-2")
    script(again, lambda: again.api.pod(0), again.finish)
    again.launch()
    job = bench.api.job()
    assert job["spec"]["runPolicy"]["suspend"] is False and names.SUSPENDED not in job["metadata"]["annotations"]
    assert again.created() == 1


def test_a_launcher_leaves_a_job_that_a_person_suspends() -> None:
    bench = Bench()

    def suspend() -> None:
        cleanup.stop(bench.api, out=OUT, suspend=True)

    script(bench, lambda: bench.api.pod(0), suspend)
    with pytest.raises(ClusterError, match="suspended by a person"):
        bench.launch()
    assert len(bench.jobs()) == 1


def test_a_job_in_a_queue_is_not_suspended() -> None:
    bench = under_way(cluster=load_cluster("test", ["queue={kind: kueue, name: train}"]))
    with pytest.raises(UsageError, match="Kueue decides"):
        cleanup.stop(bench.api, out=OUT, suspend=True)


# ---------------------------------------------------------------- reaper


def looks(api: MemoryApi, count: int, after: int = 3) -> list[str]:
    return [line for _ in range(count) for line in cleanup.reap(api, after=after)]


def test_a_job_that_nobody_watches_is_removed_after_so_many_looks() -> None:
    bench = under_way()
    assert looks(bench.api, 3) == []
    (line,) = looks(bench.api, 1)
    assert "owner run-1, not watched for 3 looks" in line and bench.jobs() == []


def test_a_job_whose_launcher_says_so_stays_for_ever() -> None:
    bench = under_way()
    launcher = bench.launcher()
    job = launcher.attempts.adopt(bench.view.jobs()[0], launcher._rendered(1))
    for _ in range(20):
        assert looks(bench.api, 3) == []
        launcher.attempts.renew(job)
    assert bench.jobs()


def test_a_job_that_was_taken_over_in_the_last_moment_stays() -> None:
    bench = under_way()
    assert looks(bench.api, 3) == []
    taken = another(bench, "run-2").launcher()
    taken.attempts.adopt(bench.view.jobs()[0], taken._rendered(1))
    assert looks(bench.api, 3) == [] and bench.jobs()


@pytest.mark.parametrize("condition", ["Succeeded", "Failed"])
def test_a_job_that_has_ended_is_left_to_its_ttl(condition: str) -> None:
    bench = under_way()
    bench.api.condition(condition)
    assert looks(bench.api, 20) == [] and bench.jobs()


def test_a_job_that_nobody_promised_to_watch_is_left_alone() -> None:
    bench = under_way()
    bench.api.job()["metadata"]["annotations"][names.RENEWED] = NEVER
    assert looks(bench.api, 20) == [] and bench.jobs()


def test_a_job_that_a_person_suspended_is_left_alone() -> None:
    bench = under_way()
    cleanup.stop(bench.api, out=OUT, suspend=True)
    assert looks(bench.api, 20) == [] and bench.jobs()


def test_a_dry_run_removes_and_remembers_nothing() -> None:
    bench = under_way()
    looks(bench.api, 3)
    before = len(bench.api.calls)
    (line,) = cleanup.reap(bench.api, after=3, dry_run=True)
    assert line.startswith("would remove") and bench.jobs() and len(bench.api.calls) == before


def test_a_job_that_goes_while_the_reaper_looks_is_no_error() -> None:
    bench = under_way()

    def gone(*_: object) -> None:
        raise Conflict("gone")

    bench.api.patch = gone  # type: ignore[method-assign,assignment]
    assert looks(bench.api, 1) == []


def test_the_reapers_entry_prints_what_it_did(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    bench = under_way()
    monkeypatch.setattr(reaper, "connect", lambda namespace: bench.api)
    for _ in range(3):
        assert reaper.main(["--namespace", "qwenvl", "--after", "2"]) == 0
    assert "removed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reaper.main(["--namespace", "qwenvl", "--after", "0"])

"""What two launchers do to one job at the same moment: who took it over keeps it, and `job create` takes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from k8s import names
from k8s.attempts import NEVER
from k8s.cluster import load_cluster
from k8s.decide import Progress
from k8s.loop import Launcher
from tests.k8s.bench import Bench, another, nothing, script, under_way
from trainer.errors import ClusterError


def before(bench: Bench, method: str, act: Callable[[], Any], *, when: Callable[..., bool]) -> None:
    """Something happens on the cluster just before a call of the launcher reaches it, once."""
    call, left = getattr(bench.api, method), [act]

    def first(*args: Any, **more: Any) -> Any:
        if left and when(*args, **more):
            left.pop()()
        return call(*args, **more)

    setattr(bench.api, method, first)


def is_a_job(body: Any, *, dry_run: bool = False) -> bool:
    return body["kind"] == "PyTorchJob" and not dry_run


def marks(bench: Bench) -> dict[str, str]:
    return bench.api.job()["metadata"]["annotations"]


# ---------------------------------------------------------------- removal


@pytest.mark.parametrize("who", ["another run", "another launcher of this run"])
def test_a_job_that_was_taken_over_between_the_last_look_and_its_removal_stays(who: str) -> None:
    """A hang is found, and in that moment somebody adopts the job: it is theirs, with its GPUs."""
    bench = Bench()
    other = another(bench, "run-2" if who == "another run" else "run-1")
    before(bench, "delete", lambda: other.launcher()._newest(), when=lambda *_, **__: True)
    script(bench, lambda: bench.api.pod(0))
    with pytest.raises(ClusterError, match="another run took the job over"):
        bench.launch()
    assert len(bench.jobs()) == 1 and other.heard("adopted") and bench.created() == 1


def test_a_job_whose_status_changes_in_that_moment_is_removed_all_the_same() -> None:
    bench = Bench()
    before(bench, "delete", lambda: bench.api.condition("Running"), when=lambda *_, **__: True)
    script(bench, *[lambda: bench.api.pod(0)] * 3, lambda: bench.finish() if bench.created() > 1 else nothing())
    bench.launch()
    assert bench.heard("no progress for") and any(call.startswith("delete") for call in bench.api.calls)


def test_a_job_that_ends_in_that_moment_stays_to_be_read() -> None:
    bench = Bench()
    before(bench, "delete", lambda: bench.fail(139), when=lambda *_, **__: True)

    def act() -> None:
        if bench.created() > 1:
            bench.finish()
        elif "status" not in bench.api.job():
            bench.api.pod(0)

    script(bench, act)
    bench.launch()
    assert [name[-3:] for name in bench.jobs()] == ["-a1", "-a2"]
    assert not any(call.startswith("delete") for call in bench.api.calls)


# ---------------------------------------------------------------- job create


def creator(bench: Bench) -> Launcher:
    """`qwenvl job create`."""
    launcher = another(bench, "run-1").launcher()
    launcher.launcher = launcher.attempts.launcher = NEVER
    launcher.say = bench.said.append
    return launcher


def test_job_create_leaves_a_job_that_a_launcher_created_in_that_moment() -> None:
    """Taken over, it would have nobody who watches it, and the launcher that does would leave it."""
    bench = Bench()
    watching = another(bench, "run-2")
    launcher = watching.launcher()
    before(bench, "create", lambda: launcher.attempts.create(launcher._rendered(1)), when=is_a_job)
    creator(bench).create()
    assert bench.heard("is under way already") and watching.heard("created")
    assert marks(bench)[names.LAUNCHER] == launcher.launcher != NEVER and marks(bench)[names.OWNER] == "run-2"
    launcher.attempts.still_ours(bench.api.job())


def test_job_create_says_when_that_job_is_another_one() -> None:
    bench = Bench()
    watching = another(bench, "run-2")
    watching.cluster = load_cluster("test", ["grace.termination_s=77"])
    launcher = watching.launcher()
    before(bench, "create", lambda: launcher.attempts.create(launcher._rendered(1)), when=is_a_job)
    with pytest.raises(ClusterError, match="terminationGracePeriodSeconds: wanted 40, found 77"):
        creator(bench).create()
    assert marks(bench)[names.OWNER] == "run-2"


def test_a_launcher_that_watches_takes_what_job_create_made_in_that_moment() -> None:
    bench = Bench()
    bench.progress = Progress(watched=False)
    before(bench, "create", lambda: creator(bench).create(), when=is_a_job)
    script(bench, lambda: bench.api.pod(0), bench.finish)
    bench.launch()
    assert bench.heard("adopted") and len(bench.jobs()) == 1 and marks(bench)[names.LAUNCHER] != NEVER


def test_what_job_create_made_is_there_and_left() -> None:
    bench = Bench()
    creator(bench).create()
    assert marks(bench)[names.LAUNCHER] == marks(bench)[names.RENEWED] == NEVER
    creator(bench).create()
    assert bench.heard("is under way already") and bench.created() == 1
    assert under_way().jobs() == bench.jobs()

"""The mirror and the whole launcher against real HTTP with watches: what a server does to them, what they ask it."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from k8s import mirror as mirrors
from k8s import names
from k8s.client import PODS, PYTORCH_JOBS, Gone, Unreachable
from k8s.cluster import load_cluster
from k8s.decide import Progress
from k8s.loop import Launcher
from k8s.mirror import Mirror
from k8s.names import Run
from k8s.pytorchjob import render_stage
from k8s.tasks import Task
from tests.k8s.memory import MemoryApi, ended
from tests.k8s.server import ApiServer
from trainer.errors import ClusterError
from trainer.resolve import load_recipe

RECIPE = load_recipe("tiny")
CLUSTER = load_cluster("test")
RUN = Run(out="s3://bucket/out", id="run-1", stage_digest="d")
LABELS = {names.IDENTITY: RUN.identity, names.STEP: "sft"}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    made = ApiServer()
    yield made
    made.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-offs of the mirror, shorter than a person's patience."""
    monkeypatch.setattr(mirrors, "AGAIN_S", 0.05)
    monkeypatch.setattr(mirrors, "MAX_SILENT_S", 0.2)


def until(true: Callable[[], Any], what: str, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.01)


def a_mirror(server: ApiServer) -> Mirror:
    return Mirror(server.api(), PYTORCH_JOBS, LABELS, lambda name: f"-sft-{RUN.identity}-a" in name).ready(10)


def a_job(server: ApiServer) -> str:
    job = render_stage(RECIPE, "sft", CLUSTER, RUN).job
    server.change(lambda memory: memory.put(PYTORCH_JOBS, job))
    return job["metadata"]["name"]


def phases(mirror: Mirror) -> dict[str, str]:
    return {pod["metadata"]["name"][-1]: pod["status"]["phase"] for pod in mirror.pods()}


# ---------------------------------------------------------------- the mirror


def test_changes_come_by_themselves_and_only_our_own(server: ApiServer) -> None:
    mirror = a_mirror(server)
    assert mirror.jobs() == []
    name = a_job(server)
    other = render_stage(RECIPE, "sft", CLUSTER, Run(out="s3://bucket/other", id="x", stage_digest="d")).job
    server.change(lambda memory: memory.put(PYTORCH_JOBS, other))
    until(mirror.jobs, "the job")
    assert [job["metadata"]["name"] for job in mirror.jobs()] == [name]
    server.event(f"{name}-worker-0", "FailedScheduling", "0/2 nodes:\n no room")
    server.event("somebody-else", "FailedScheduling", "not ours")
    until(mirror.events, "the event")
    assert [str(event) for event in mirror.events()] == [f"Pod {name}-worker-0: FailedScheduling: 0/2 nodes: no room"]
    server.change(lambda memory: memory.delete(PYTORCH_JOBS, name, uid=mirror.jobs()[0]["metadata"]["uid"]))
    until(lambda: not mirror.jobs(), "the deletion")
    mirror.close()


def test_a_version_that_is_too_old_is_listed_again_and_what_went_meanwhile_is_gone(
    server: ApiServer, quick: None
) -> None:
    a_job(server)
    server.change(lambda memory: memory.pod(0))
    server.change(lambda memory: memory.pod(1))
    mirror = a_mirror(server)
    until(lambda: len(mirror.pods()) == 2, "both pods")

    def unseen(memory: MemoryApi) -> None:
        del memory.objects["pods", next(name for plural, name in memory.objects if plural == "pods")]
        server.oldest = memory._count + 1

    lists = sum("watch" not in path and "/pods" in path for _, _, path in server.asked)
    with server.lock:
        server.epoch += 1  # watches break off, and nobody tells of the deletion
        unseen(server.memory)
        server._seen = {key: value for key, value in server._seen.items() if key in server.memory.objects}
    until(lambda: len(mirror.pods()) == 1, "the pod that went unseen")
    assert sum("watch" not in path and "/pods" in path for _, _, path in server.asked) > lists
    mirror.close()


def test_watches_that_break_off_go_on_where_they_were(server: ApiServer, quick: None) -> None:
    a_job(server)
    mirror = a_mirror(server)
    until(mirror.jobs, "the job")
    lists = listed(server)
    for index in range(5):
        server.epoch += 1
        server.change(lambda memory, index=index: memory.pod(index))
        until(lambda index=index: len(mirror.pods()) == index + 1, f"pod {index}")
    assert listed(server) == lists  # nothing was listed again
    mirror.close()


def listed(server: ApiServer) -> list[str]:
    """What was listed, but for the one object that comes with the server's version."""
    return [path for _, _, path in server.asked if "watch" not in path and not path.endswith("limit=1")]


@pytest.mark.parametrize("restored", [True, False])
def test_a_server_that_was_restored_from_a_backup_is_listed_again(
    server: ApiServer, quick: None, restored: bool
) -> None:
    """Its versions begin again behind ours: it would send nothing until they have caught up, and what we know would
    count as newer than all that it says. A store that only starts again forgets nothing."""
    job = a_job(server)
    server.change(lambda memory: memory.pod(0))
    mirror = a_mirror(server)
    backup, version = copy.deepcopy(server.memory.objects), server.memory._count
    server.change(lambda memory: memory.pod(1))
    for _ in range(50):
        server.change(lambda memory: memory.condition("Running", "later"))
    until(lambda: len(mirror.pods()) == 2 and "status" in mirror.jobs()[0], "what the backup has not")
    lists = listed(server)
    with server.lock:
        if restored:
            server.memory.objects, server.memory._count = backup, version
            server._seen, server.changes = {}, []
            server._record()
        server.epoch += 1
    if restored:
        seen: list[int] = []
        until(lambda: seen.append(len(mirror.jobs())) or "status" not in mirror.jobs()[0], "what the backup has")
        until(lambda: len(mirror.pods()) == 1, "its pod")
        assert set(seen) == {1}, "never none in between: that would mean that somebody deleted it"
        server.change(lambda memory: memory.condition("Failed", "after the restore"))
        until(lambda: "after the restore" in str(mirror.jobs()), "news")
        assert [one["metadata"]["name"] for one in mirror.jobs()] == [job]
    else:
        server.change(lambda memory: memory.pod(2))
        until(lambda: len(mirror.pods()) == 3, "news")
    assert (listed(server) != lists) is restored
    mirror.close()


def test_events_of_before_are_asked_for_by_object_and_never_the_namespaces(server: ApiServer) -> None:
    name = a_job(server)
    server.change(lambda memory: memory.pod(0, phase="Pending"))
    server.change(lambda memory: memory.pod(1))
    server.event("somebody-else", "FailedScheduling", "not ours")
    server.event(name, "FailedCreatePod", "exceeded quota", kind="PyTorchJob")
    server.event(f"{name}-worker-0", "FailedScheduling", "0/2 nodes")
    server.event(f"{name}-worker-1", "Started", "of a pod that runs", warning=False)
    mirror = a_mirror(server)
    assert {one.reason for one in mirror.events()} == {"FailedCreatePod", "FailedScheduling"}
    asked = [path.partition("?")[2] for _, _, path in server.asked if "/events" in path and "watch" not in path]
    assert len(asked) == 3 and all("fieldSelector=involvedObject.name" in one for one in asked if one != "limit=1")
    mirror.close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_waited_for_and_that_is_known(server: ApiServer, quick: None, status: int) -> None:
    a_job(server)
    mirror = a_mirror(server)
    server.fault = lambda method, path, query: (status, {"message": "later"}) if "watch" in query else None
    server.epoch += 1
    until(mirror.silent_since, "silence")
    server.fault = lambda *_: None
    server.change(lambda memory: memory.pod(0))
    until(mirror.pods, "the pod")
    until(lambda: mirror.silent_since() is None, "an answer")
    mirror.close()


def test_half_an_answer_does_not_blind_the_launcher(server: ApiServer, quick: None) -> None:
    a_job(server)
    mirror = a_mirror(server)
    server.fault = lambda method, path, query: (200, '{"type": "ADDED", "obj') if "watch" in query else None
    server.epoch += 1
    until(mirror.silent_since, "that it is known")
    server.fault = lambda *_: None
    server.change(lambda memory: memory.pod(0))
    until(mirror.pods, "the pod")
    assert all(thread.is_alive() for thread in mirror._threads)
    mirror.close()


def test_an_api_server_that_restarts_costs_nothing(server: ApiServer, quick: None) -> None:
    a_job(server)
    mirror = a_mirror(server)
    until(mirror.jobs, "the job")
    server.restart(1.0)
    server.change(lambda memory: memory.pod(0))
    until(mirror.pods, "the pod")
    assert len(mirror.jobs()) == 1
    mirror.close()


def test_what_the_server_forbids_ends_the_wait(server: ApiServer, quick: None) -> None:
    server.fault = lambda method, path, query: (403, {"message": "cannot watch events"}) if "events" in path else None
    with pytest.raises(ClusterError, match="cannot watch events"):
        a_mirror(server)


@pytest.mark.parametrize(("rules_s", "ends"), [(60.0, False), (0.5, True)])
def test_what_was_allowed_and_is_forbidden_for_a_moment_is_waited_for(
    server: ApiServer, quick: None, monkeypatch: pytest.MonkeyPatch, rules_s: float, ends: bool
) -> None:
    """A server that starts answers 403 until it has read its roles."""
    monkeypatch.setattr(mirrors, "RULES_S", rules_s)
    a_job(server)
    mirror = a_mirror(server)
    server.fault = lambda method, path, query: (403, {"message": "no role yet"}) if "watch" in query else None
    server.epoch += 1
    until(mirror.silent_since, "that it is known")
    time.sleep(1.0)
    server.fault = lambda *_: None
    server.change(lambda memory: memory.pod(0))
    if ends:
        with pytest.raises(ClusterError, match="no role yet"):
            mirror.wait(5)
    else:
        until(mirror.pods, "the pod")
    mirror.close()


def test_a_server_that_never_lists_is_given_up(server: ApiServer) -> None:
    server.fault = lambda *_: (503, {"message": "later"})
    with pytest.raises(Unreachable, match="silence"):
        Mirror(server.api(), PYTORCH_JOBS, LABELS, lambda name: True).ready(0.3)
    now = iter(range(0, 10**6, 50))
    api = server.api(clock=lambda: next(now), sleep=lambda _: None)
    mirror = Mirror(api, PYTORCH_JOBS, LABELS, lambda name: True)
    until(mirror.silent_since, "that it is told")
    with pytest.raises(Unreachable, match="503: later"):
        mirror.ready(0.1)


def test_what_our_own_call_returned_is_not_overwritten_by_older_news(server: ApiServer) -> None:
    mirror = a_mirror(server)
    job = render_stage(RECIPE, "sft", CLUSTER, RUN).job
    newer = {**job, "metadata": {**job["metadata"], "uid": "u", "resourceVersion": "70"}}
    older = {**job, "metadata": {**newer["metadata"], "resourceVersion": "69", "annotations": {}}}
    mirror.note(PYTORCH_JOBS, newer)
    mirror.note(PYTORCH_JOBS, older)
    assert mirror.jobs()[0]["metadata"]["resourceVersion"] == "70"
    mirror.close()


def test_what_was_deleted_does_not_come_back_by_an_older_answer(server: ApiServer) -> None:
    mirror = a_mirror(server)
    name = a_job(server)
    until(mirror.jobs, "the job")
    (renewed,) = mirror.jobs()
    server.change(lambda memory: memory.delete(PYTORCH_JOBS, name, uid=renewed["metadata"]["uid"]))
    until(lambda: not mirror.jobs(), "its deletion")
    mirror.note(PYTORCH_JOBS, renewed)
    assert mirror.jobs() == []
    mirror.close()


def test_a_list_of_several_pages_that_grew_too_old_begins_again(server: ApiServer) -> None:
    left = [410]

    def fault(method: str, path: str, query: dict[str, str]) -> Any:
        if "continue" in query:
            return (left.pop(), {"message": "expired"}) if left else (200, {"items": [{"n": 2}], "metadata": {}})
        return 200, {"items": [{"n": 1}], "metadata": {"continue": "more"}}

    server.fault = fault
    assert server.api().list(PODS, {}) == [{"n": 1}, {"n": 2}]
    assert len(server.asked) == 4


def test_a_watch_from_a_version_that_is_too_old_says_so(server: ApiServer) -> None:
    server.oldest = 5
    with pytest.raises(Gone):
        next(server.api().watch(PODS, {}, "1"))


# ---------------------------------------------------------------- the whole launcher over HTTP


class Running:
    """A launcher in a thread of its own, on the real client."""

    def __init__(self, server: ApiServer, *, name: str = "launcher-1", **more: Any):
        self.done, self.progress = False, Progress(sequence=1)
        self.said: list[str] = []
        self.error: BaseException | None = None
        task = Task(
            "sft",
            RUN,
            lambda run: render_stage(RECIPE, "sft", CLUSTER, run),
            lambda: self.done,
            lambda attempt: self.progress,
        )
        self.launcher = Launcher(server.api(), CLUSTER, task, say=self.said.append, name=name, **more)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.launcher.launch()
        except BaseException as error:
            self.error = error

    def heard(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in self.said)

    def join(self) -> None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error


def test_a_stage_from_creation_to_its_result_and_a_quiet_job_asks_nothing(server: ApiServer) -> None:
    server.log = "2026-11-22T00:00:00Z step 1\n"
    run = Running(server)
    until(run.heard("created"), "creation")
    server.change(lambda memory: memory.pod(0))
    until(run.heard("run:"), "running")
    until(run.heard("step 1"), "rank 0's log")
    time.sleep(1.0)
    before = len(server.asked)
    time.sleep(6.0)
    quiet = server.asked[before:]
    # The log's container has ended here, so it alone is asked for again (after 5, 10, 20, ... s).
    assert [path for _, _, path in quiet if "/log" not in path] == []
    assert len(quiet) <= 1
    run.done = True
    told = time.monotonic()
    server.change(lambda memory: memory.condition("Succeeded"))
    until(run.heard("done, attempt 1"), "the end")
    assert time.monotonic() - told < 5
    run.join()


def test_a_failure_is_decided_on_within_seconds_and_the_next_attempt_begins(server: ApiServer) -> None:
    run = Running(server, follow=False)
    until(run.heard("created"), "creation")
    server.change(lambda memory: memory.pod(0))
    until(run.heard("run:"), "running")

    def fail(memory: MemoryApi) -> None:
        memory.pod(0, **ended(139))
        memory.condition("Failed")

    told = time.monotonic()
    server.change(fail)
    until(run.heard("attempt 1 ended"), "the decision")
    assert time.monotonic() - told < 5
    until(run.heard("-a2"), "the next attempt")
    run.done = True
    server.change(lambda memory: memory.condition("Succeeded"))
    run.join()


def test_a_restart_of_the_api_server_in_the_middle_of_a_stage_is_waited_for(server: ApiServer, quick: None) -> None:
    run = Running(server, follow=False)
    until(run.heard("created"), "creation")
    server.change(lambda memory: memory.pod(0))
    until(run.heard("run:"), "running")
    server.restart(2.0)
    run.done = True
    server.change(lambda memory: memory.condition("Succeeded"))
    run.join()
    assert run.heard("done, attempt 1")()
    assert sum(call.startswith("create PyTorchJob") for call in server.memory.calls) == 1


def test_of_two_launchers_of_one_run_the_last_to_come_goes_on(server: ApiServer) -> None:
    first = Running(server, name="launcher-1", follow=False)
    until(first.heard("created"), "creation")
    server.change(lambda memory: memory.pod(0))
    until(first.heard("run:"), "running")
    second = Running(server, name="launcher-2", follow=False)
    until(second.heard("adopted"), "the take-over")
    with pytest.raises(ClusterError, match="another run took the job over"):
        first.join()
    second.done = True
    server.change(lambda memory: memory.condition("Succeeded"))
    second.join()
    assert not [call for call in server.memory.calls if call.startswith("delete")]
    assert sum(call.startswith("create PyTorchJob") for call in server.memory.calls) == 1


def test_two_launchers_at_once_make_one_job(server: ApiServer) -> None:
    runs = [Running(server, name=f"launcher-{number}", follow=False) for number in (1, 2)]
    until(lambda: any(run.error for run in runs), "one that leaves")
    server.change(lambda memory: memory.pod(0))
    (stays,) = [run for run in runs if not run.error]
    until(stays.heard("run:"), "running")
    stays.done = True
    server.change(lambda memory: memory.condition("Succeeded"))
    stays.join()
    assert len([name for plural, name in server.memory.objects if plural == "pytorchjobs"]) == 1
    assert all("another run took the job over" in str(run.error) for run in runs if run.error)

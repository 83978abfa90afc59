"""The launcher while S3 does not answer, with a real S3 server (SeaweedFS) and the API over HTTP: what the API shows is
decided on, no record is lost, nothing waits beyond its limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import pytest

from k8s import asking, loop
from k8s.cluster import load_cluster
from k8s.decide import Progress
from k8s.launcher import StepCall, prepared
from k8s.loop import Launcher
from k8s.names import Run
from k8s.pytorchjob import render_stage
from k8s.record import Record, Records
from k8s.tasks import Task, committed_of, progress_of
from tests.k8s.bench import RECIPE
from tests.k8s.memory import ended
from tests.k8s.server import ApiServer
from tests.state.weed import BUCKET, program, s3_process
from trainer import heartbeat, storage, tries
from trainer.errors import StorageError
from trainer.resolve import resolved

SIGN_TO_DECISION_S = 10.0


@dataclass
class Away:
    """A stage whose heartbeats and records are in an S3 server that tests stop."""

    s3: subprocess.Popen[bytes]
    out: str
    server: ApiServer = field(default_factory=ApiServer)
    said: list[str] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def launcher(self, *limits: str) -> Launcher:
        cluster = load_cluster("test", ["limits.backoff_s=0", *limits])
        uri = storage.join(self.out, "sft")
        task = Task(
            "sft",
            Run(out=self.out, id="run-1", stage_digest="d"),
            lambda run: render_stage(RECIPE, "sft", cluster, run),
            lambda: storage.exists(storage.join(uri, "result.json")),
            lambda attempt: progress_of(uri, attempt),
            committed=lambda: committed_of(uri),
            stage_uri=uri,
            records=storage.join(self.out, "launches"),
        )
        return Launcher(self.server.api(), cluster, task, say=self.said.append, follow=False)

    def start(self, launcher: Launcher) -> threading.Thread:
        def run() -> None:
            try:
                launcher.launch()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        return self.thread

    def running(self) -> None:
        """The attempt's pod runs and its first heartbeat was seen."""
        self.until(self.jobs, "the job")
        beat = heartbeat.Heartbeat(
            node=f"{self.jobs()[-1]}-worker-0", attempt=1, sequence=1, step=3, phase="train", phase_limit_s=600
        )
        heartbeat.write_heartbeat(storage.join(self.out, "sft"), beat)
        self.server.change(lambda memory: memory.pod(0))
        self.until(lambda: self.heard("run: train, step 3"), "the first heartbeat")

    def fail(self) -> None:
        def act(memory: object) -> None:
            self.server.memory.pod(0, **ended(139, ""))
            self.server.memory.condition("Failed")

        self.server.change(act)

    def hang(self) -> None:
        """The server takes requests and answers none, from here on."""
        self.s3.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.s3.pid, os.WSTOPPED)

    def jobs(self) -> list[str]:
        with self.server.lock:
            return [name for plural, name in self.server.memory.objects if plural == "pytorchjobs"]

    def records(self) -> list[Record]:
        return records_of(self.out, Run(out=self.out, id="run-1", stage_digest="d").identity)

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.said)

    def until(self, true: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while not true():
            assert self.error is None, f"{what}: {self.error!r} {self.said}"
            assert time.monotonic() < end, f"not within {limit_s} s: {what}; {self.said}"
            time.sleep(0.02)

    def end(self) -> None:
        """A launcher whose job is deleted ends."""
        self.server.change(lambda memory: memory.objects.clear())
        if self.thread is not None:
            self.thread.join(60)
        self.server.stop()


def records_of(out: str, identity: str) -> list[Record]:
    """As the next launcher reads them."""
    return Records(storage.join(out, "launches"), "sft", identity, say=print).read()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """The server that runs; a new one after a test that killed it."""
    if program() is None:
        pytest.skip("SeaweedFS (dev extra) is not installed")
    with contextlib.ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []

        def running() -> subprocess.Popen[bytes]:
            if not started or started[-1].poll() is not None:
                stack.close()
                started.append(stack.enter_context(s3_process(tmp_path_factory.mktemp("weed")))[1])
            return started[-1]

        yield running


@pytest.fixture
def away(s3: Callable[[], subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    monkeypatch.setattr(asking, "AGAIN_S", 0.2)
    monkeypatch.setattr(loop, "LOOK_S", 0.3)
    monkeypatch.setattr(loop, "CALL_S", 2.0)
    made = Away(s3(), f"s3://{BUCKET}/{tmp_path.name}")
    yield made
    if made.s3.poll() is None:
        made.s3.send_signal(signal.SIGCONT)
    made.end()


def in_the_middle_of_a_look(launcher: Launcher, away: Away) -> None:
    """A read of heartbeats has been under way for longer than any that storage answers."""
    looking = launcher._heartbeats

    def hangs() -> bool:
        before = looking._thread
        time.sleep(0.5)
        return before is not None and looking._thread is before and before.is_alive()

    away.until(hangs, "a read that hangs")


@pytest.mark.parametrize("bounded", [True, False])
def test_a_pod_that_fails_while_storage_hangs_is_decided_on_and_its_record_comes_later(
    away: Away, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bounded:  # the control: a launcher that waits for storage sees nothing else
        monkeypatch.setattr(asking, "WAIT_S", 600.0)
        monkeypatch.setattr(asking, "CALL_S", 600.0)
    launcher = away.launcher()
    away.start(launcher)
    away.running()
    away.hang()
    in_the_middle_of_a_look(launcher, away)
    away.fail()
    if not bounded:
        time.sleep(3)
        assert not away.heard("attempt 1 ended")
        return
    away.until(lambda: away.heard("attempt 1 ended: exit code 139"), "the decision", SIGN_TO_DECISION_S)
    away.until(lambda: away.heard("storage does not answer, asked again"), "the launcher to wait")
    assert len(away.jobs()) == 1, "no attempt begins before it is known what was committed"
    away.s3.send_signal(signal.SIGCONT)
    away.until(lambda: len(away.jobs()) == 2, "the next attempt")
    first, *_ = away.records()
    assert first.attempt == 1 and first.end is not None and first.end.code == 139


@pytest.mark.parametrize("first", ["the task", "the attempt that is created and left"])
def test_the_first_calls_of_a_launcher_wait_for_storage_that_hangs_and_no_longer_than_its_limit(
    away: Away, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k8s.launcher.CALL_S", 1.0)
    storage.write_json(storage.join(away.out, "recipe.json"), resolved(RECIPE))
    text = (resources.files("k8s") / "clusters" / "test.yaml").read_text(encoding="utf-8").replace("0" * 64, "1" * 64)
    made: list[object] = []

    def ask(storage_s: int) -> threading.Thread:
        def run() -> None:
            try:
                if first == "the task":
                    cluster = text.replace("limits: {", f"limits: {{storage_s: {storage_s}, ")
                    made.append(prepared(StepCall("prepare-data", cluster, away.out), say=away.said.append))
                else:
                    away.launcher(f"limits.storage_s={storage_s}").create()
                    made.append("created")
            except BaseException as error:
                away.error = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    away.hang()
    ask(storage_s=1).join(60)
    assert isinstance(away.error, StorageError) and made == [], "a launcher that storage holds up ends"
    away.error, away.said[:] = None, []
    thread = ask(storage_s=600)
    away.until(lambda: away.heard("storage does not answer, asked again"), "the word")
    away.s3.send_signal(signal.SIGCONT)
    thread.join(60)
    assert len(made) == 1 and away.error is None


def test_a_record_that_could_not_be_stored_is_caught_up_and_never_forgotten(away: Away) -> None:
    said: list[str] = []
    records = Records(storage.join(away.out, "launches"), "sft", "d", say=said.append)
    away.hang()
    with tries.patience(0.5):
        records.begin(1, job="j", uid="u", run="r")
        assert "not stored yet" in said[0]
        records.catch_up()
        with pytest.raises(StorageError):
            records.end(1, loop.Ended("retry", 139, "x"), closed=False)
    away.s3.send_signal(signal.SIGCONT)
    records_of(away.out, "d")  # the server answers again
    time.sleep(1)  # it may still take the writes that were given up
    records.catch_up()
    (stored,) = records_of(away.out, "d")
    assert stored.uid == "u" and stored.end is not None and stored.end.code == 139


@pytest.mark.parametrize("takes", ["before the next", "after the next", "after the next, without its condition"])
def test_a_write_that_was_given_up_and_is_taken_late_replaces_no_newer_record(
    away: Away, takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a hung server does when it goes on; whether it takes a stopped one's writes is not for a test to choose."""
    records = Records(storage.join(away.out, "launches"), "sft", "d", say=away.said.append)
    late: list[tuple[str, bytes]] = []

    def hangs(uri: str, data: bytes) -> bool:
        late.append((uri, data))
        raise StorageError("storage did not create")

    with monkeypatch.context() as hanging:
        hanging.setattr(storage, "create_once", hangs)
        records.begin(1, job="j", uid="u", run="r")
    (given_up,) = late
    if takes == "before the next":
        storage.create_once(*given_up)
    records.end(1, loop.Ended("retry", 139, "x"), closed=False)
    if takes == "after the next":
        with pytest.raises(FileExistsError):
            storage.create_once(*given_up)
    elif takes != "before the next":
        storage.write_bytes(*given_up)  # the control
    (stored,) = records_of(away.out, "d")
    assert (stored.end is not None) is ("without" not in takes)


def test_storage_that_is_gone_for_too_long_ends_the_launcher_with_its_word(away: Away) -> None:
    thread = away.start(away.launcher("limits.storage_s=1"))
    away.running()
    away.s3.kill()
    away.until(lambda: away.heard("no heartbeats to be had, storage does not answer"), "the complaint")
    away.fail()
    away.until(lambda: away.heard("attempt 1 ended: exit code 139"), "the decision", SIGN_TO_DECISION_S)
    thread.join(60)
    assert isinstance(away.error, StorageError) and "in " in away.error.what
    assert len(away.jobs()) == 1


def test_what_a_slow_read_finds_is_as_old_as_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "WAIT_S", 0.01)
    may_end, seconds = threading.Event(), [7.0]

    def read(attempt: int) -> Progress:
        may_end.wait(60)
        return Progress(step=3)

    looking = asking.Heartbeats(read, clock=lambda: seconds[0])
    assert looking.newest(1).progress is None
    seconds[0] = 11.0
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "heartbeats":
            thread.join(60)
    assert looking.newest(1) == asking.Look(1, Progress(step=3), at=7.0)

"""Run the pipeline on this machine: the definition in full_recipe.py, through kfp.local.

    validate -> lock OUT -> settle the recipe -> steps, one process each -> summary

Nothing is written before the recipe is known to be valid. The same command again skips what is finished and goes on
with what was interrupted. One process, the top, holds the lock, the session folder (pipelines/session.py) and, for
runs on CPU, the warm server that programs are forked from (trainer/warm.py); when it ends, however it ends,
everything below it ends.

kfp.local is kept to what it is good at, the order of the steps: its own lines are held back (progress.Relay), its
retries are for clusters and taken out, its folders lie in the session and go with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines import left, lock, processes, session, spent, tracking
from pipelines.progress import Progress, Relay
from pipelines.session import Failure, Session
from pipelines.settle import asked_recipe, settle
from pipelines.summary import summary
from pipelines.work import DEVICE, LOCAL
from trainer import storage
from trainer.command import StageCall, stage_command
from trainer.errors import UNKNOWN, Preempted, UsageError, meaning
from trainer.observe.gpu import Gpu
from trainer.recipe import Recipe

STOP_LIMIT_S = session.STOP_GRACE_S + 15


@dataclass(frozen=True)
class RunCall:
    """`qwenvl run` as asked for."""

    recipe: str
    out: str
    overrides: tuple[str, ...] = ()
    base_model: str = ""
    accept_changes: tuple[str, ...] = ()
    device: str = "cpu"

    def arguments(self) -> dict[str, Any]:
        """The pipeline's parameters."""
        return {
            "recipe": self.recipe,
            "out": self.out,
            "cluster": LOCAL,
            "overrides": list(self.overrides),
            "base_model": self.base_model,
            "accept_changes": list(self.accept_changes),
        }

    def command(self) -> str:
        """As typed into a shell."""
        words = [*program(), "run", self.recipe, "--out", self.out]
        words += [word for one in self.overrides for word in ("--set", one)]
        words += ["--base-model", self.base_model] * bool(self.base_model)
        words += [word for one in self.accept_changes for word in ("--accept-change", one)]
        words += ["--device", self.device] * (self.device != "cpu")
        return shlex.join(words)


def program() -> list[str]:
    """Words that start this command again in this shell: by its name where that is found, else as it was called."""
    called = Path(sys.argv[0])
    if called.name != "qwenvl":
        return [sys.executable, "-m", "pipelines.cli.main"]
    found = shutil.which(called.name)
    return [called.name if found and called.exists() and os.path.samefile(found, called) else str(called)]


def run_here(call: RunCall) -> int:
    """Run every step; the exit code.

    Raises:
        RecipeError, UsageError, StageMismatch, OutputInUse: before any step has begun.
    """
    recipe = asked_recipe(call.recipe, call.overrides, call.base_model)
    if call.device not in ("cpu", "cuda"):
        raise UsageError("no such device", where=f"--device {call.device}", expected="cpu or cuda")
    if call.device == "cuda" and not Gpu().is_there:
        raise UsageError(
            "no GPU on this machine",
            where="--device cuda",
            expected="one that NVIDIA's driver shows (nvidia-smi)",
            do="leave --device out to train on the CPU, or qwenvl submit to train on a cluster",
        )
    processes.become_subreaper()
    with _session_folder() as folder, lock.held(call.out, str(folder)):
        settle(call.recipe, call.overrides, base_model=call.base_model, accept=call.accept_changes, out=call.out)
        top = _Top(Session(folder), Progress(recipe, sys.stdout, left=left.look(recipe, call.out)))
        try:
            record = spent.recorded(call.out, top.session.name)
            with top.signals(), record, _environment(call, folder), _warm_server(call, folder):
                top.run(call.arguments())
        finally:
            top.progress.close()
            processes.end_descendants(grace_s=0)
        return top.conclude(call, recipe)


class _Top:
    """The state of a run: its session, its progress, and whether somebody asked it to stop."""

    def __init__(self, opened: Session, progress: Progress):
        self.session, self.progress = opened, progress
        self.stopped_by: int | None = None
        self.relay = Relay(progress)

    def run(self, arguments: dict[str, Any]) -> None:
        if self.stopped_by is None:
            with _quiet_kfp(self.relay):
                _run_pipeline(arguments, self.session.folder)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """First signal: let the running step save and end. Second one: end everything now."""
        if self.stopped_by is not None:
            processes.end_all_and_leave(128 + signum)
        self.stopped_by = signum
        name = signal.Signals(signum).name
        self.progress.line(f"{name}: stopping; a stage saves a checkpoint first (again: stop at once)")
        self.session.fail(Failure(self.progress.current or "", 128 + signum, f"by {name}"))
        if (pid := self.session.running()) is not None:
            processes.send([pid], signal.SIGTERM)
        timer = threading.Timer(
            STOP_LIMIT_S, lambda: processes.send(processes.descendants(os.getpid()), signal.SIGKILL)
        )
        timer.daemon = True
        timer.start()

    def conclude(self, call: RunCall, recipe: Recipe) -> int:
        """Say how it went; the exit code."""
        failure = self.session.failure()
        if failure is None and (lost := self.progress.lost or self.progress.current):
            failure = Failure(lost, UNKNOWN, "the step was killed, or died without saying why")
        if failure is None and "report" not in self.progress.ended:
            failure = Failure("", UNKNOWN, "kfp.local did not run every step:\n" + "\n".join(self.relay.kept[-30:]))
        if failure is not None:
            where = f" in {failure.step}" if failure.step else ""
            stopped = self.stopped_by is not None or failure.code == Preempted.code
            if self.stopped_by is not None:  # a signal to the whole group may have reached the step first
                failure = replace(failure, message=f"by {signal.Signals(self.stopped_by).name}")
            told = f"stopped{where}: {failure.message}" if stopped else f"error{where}: {failure.message}"
            print(told, file=sys.stderr)
            kept = ", a stage from its last checkpoint" if stopped else ""
            mended = "once that is mended, " if meaning(failure.code) == "permanent" else ""
            again = f"{mended}the same command goes on from what is finished{kept}: {call.command()}"
            print(again, file=sys.stderr)
            tracking.start(recipe, call.out, "KILLED" if self.stopped_by else "FAILED").wait(10)
            return failure.code
        print(summary(recipe, call.out, wall_s=self.progress.clock() - self.progress.began))
        return 0


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=session.PREFIX))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(call: RunCall, folder: Path) -> Iterator[None]:
    """What the steps inherit; kfp gives its subprocesses this process's environment."""
    added = {
        session.SESSION: str(folder),
        session.TOP: str(os.getpid()),
        DEVICE: call.device,
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(folder / "tmp"),  # kfp leaves a folder behind for every step
    }
    (folder / "tmp").mkdir()
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _warm_server(call: RunCall, folder: Path) -> Iterator[None]:
    """Importing torch, transformers and DeepSpeed once for all programs of the run, while the data is prepared."""
    from trainer import warm

    if call.device != "cpu" or storage.local_path(call.out) is None or warm.VARIABLE in os.environ:
        yield
        return
    path = str(folder / "warm.sock")
    env = stage_command(StageCall(recipe="", stage="stage1", out=call.out, device="cpu")).env
    # a group of its own: Ctrl-C in a terminal must not end the ranks before they have saved; it dies with this process
    server = subprocess.Popen([sys.executable, "-m", "trainer.warm", path], env={**os.environ, **env}, process_group=0)
    os.environ[warm.VARIABLE] = path
    try:
        yield
    finally:
        os.environ.pop(warm.VARIABLE, None)
        server.kill()
        server.wait()


def _run_pipeline(arguments: dict[str, Any], folder: Path) -> None:
    _import_kfp()
    from kfp import local
    from kfp.local import pipeline_orchestrator

    from pipelines.full_recipe import full_recipe

    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "kfp"),
        workspace_root=str(folder / "kfp-workspace"),
        raise_on_error=False,
    )
    spec = full_recipe.pipeline_spec
    for dag in [spec.root.dag, *(component.dag for component in spec.components.values())]:
        for task in dag.tasks.values():
            task.ClearField("retry_policy")
    pipeline_orchestrator.run_local_pipeline(spec, arguments)


def _import_kfp() -> None:
    """Import kfp without its API client, which pulls in the whole Kubernetes client: 0.5 s instead of 2.0 (kfp 2.17.0).

    This is the variable that kfp sets for its own executor; it is looked at once more inside kfp.dsl, for which it is
    taken away again.
    """
    if "kfp" not in sys.modules:
        os.environ["_KFP_RUNTIME"] = "true"
        try:
            import kfp  # noqa: F401
        finally:
            del os.environ["_KFP_RUNTIME"]


@contextlib.contextmanager
def _quiet_kfp(relay: Relay) -> Iterator[None]:
    """Only the steps' own lines come through; kfp's log lines and warnings about what it ignores here do not. Its
    errors are kept by the relay, for a step that dies before it can speak."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(relay):  # type: ignore[type-var]
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)

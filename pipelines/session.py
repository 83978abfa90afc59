"""What passes between `qwenvl run` and its steps: start, end, errors, and the top's death.

A step of the pipeline is a process that kfp.local starts (on a cluster: a pod). `step` wraps the function that its body
calls. Below `qwenvl run`, which names a folder in QWENVL_SESSION and its own pid in QWENVL_TOP, it
  - marks its first and last line, so that everything kfp itself prints around them can be left out (pipelines/run.py),
  - leaves an error as a record, so that the top shows one message and exits with its code,
  - ends with everything below it when the top is gone,
  - does nothing if another step of the run has failed: kfp.local goes on with steps that do not need the failed one.
On a cluster there is no session: the error is printed and the exit code says what happened.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines import processes
from trainer.errors import FULL, REFUSED, UNKNOWN, Preempted, QwenVLError, of_system

SESSION, TOP = "QWENVL_SESSION", "QWENVL_TOP"
PREFIX = "qwenvl-session-"
MARK = "\x1e"
STOP_GRACE_S = 60.0  # a stopped stage saves a checkpoint first

DONE, WAS_DONE, NOT_HERE = "done", "was done before", "not in this recipe"
FAILED, STOPPED = "failed", "stopped"


class Stopped(BaseException):
    """SIGTERM, raised in the step's main thread; no Exception, so that nothing on the way takes it for an error."""


@dataclass(frozen=True)
class Mark:
    """First or last line of a step."""

    event: str  # begin, end
    step: str
    state: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        return MARK + json.dumps(asdict(self))

    @staticmethod
    def read(line: str) -> Mark | None:
        return Mark(**json.loads(line[1:])) if line.startswith(MARK) else None


@dataclass(frozen=True)
class Failure:
    """A step's error as the top shows it."""

    step: str
    code: int
    message: str


class Session:
    """The folder of one `qwenvl run`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @staticmethod
    def of_environment() -> Session | None:
        folder = os.environ.get(SESSION)
        return Session(folder) if folder else None

    @property
    def name(self) -> str:
        """What no other run is called."""
        return self.folder.name

    def enter(self, step: str) -> None:
        """Say who runs, so that the top can stop it."""
        self._write("step.json", {"step": step, "pid": os.getpid()})

    def leave(self) -> None:
        (self.folder / "step.json").unlink(missing_ok=True)

    def running(self) -> int | None:
        """pid of the step that runs now."""
        found = self._read("step.json")
        return found and found["pid"]

    def fail(self, failure: Failure) -> None:
        """Keep the first failure of the run."""
        if self.failure() is None:
            self._write("failure.json", asdict(failure))

    def failure(self) -> Failure | None:
        found = self._read("failure.json")
        return Failure(**found) if found else None

    def _write(self, name: str, value: Any) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(value))
        temporary.replace(self.folder / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return None


def step(name: str) -> Callable[[Callable[..., str | None]], Callable[..., None]]:
    """Make a function the body of a pipeline step.

    Args:
        name: may use the function's arguments: "prepare-{stage}". The function returns how it went (DONE, WAS_DONE,
            NOT_HERE, or a short text); None is DONE.
    """

    def wrap(function: Callable[..., str | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            _run(name.format(**arguments), functools.partial(function, **arguments))

        return run

    return wrap


def _run(name: str, call: Callable[[], str | None]) -> None:
    logging.getLogger().handlers.clear()  # kfp's executor shows every library's INFO lines
    logging.getLogger().setLevel(logging.WARNING)
    session = Session.of_environment()
    if session is not None:
        if session.failure() is not None:
            sys.exit(UNKNOWN)
        _tie_to_top()
        session.enter(name)
        _say(Mark("begin", name))
    began = time.monotonic()
    try:
        state = call() or DONE
    except (Exception, Stopped) as error:
        failure = _failure(name, error)
        if session is not None:
            session.fail(failure)
            state = STOPPED if failure.code == Preempted.code else FAILED
            _say(Mark("end", name, state, time.monotonic() - began))
            session.leave()
        else:
            print(f"error in {name}: {failure.message}", file=sys.stderr, flush=True)
        processes.end_descendants(grace_s=0)
        _leave(failure.code)
    if session is not None:
        _say(Mark("end", name, state, time.monotonic() - began))
        session.leave()
    else:
        print(f"{name}: {state}", flush=True)


def _failure(name: str, error: BaseException) -> Failure:
    if isinstance(error, Stopped):
        return Failure(name, Preempted.code, "stopped from outside")
    if isinstance(error, QwenVLError):
        return Failure(name, error.code, str(error))
    if isinstance(error, OSError) and error.errno in (*FULL, *REFUSED):  # the machine's fault, and no trace would help
        told = of_system(error)
        return Failure(name, told.code, str(told))
    trace = "".join(traceback.format_exception(error))
    return Failure(name, UNKNOWN, f"{type(error).__name__}: {error}\n{trace}")


def _leave(code: int) -> None:
    """Exit without kfp's executor, threads of libraries or exit hooks adding words or waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(mark: Mark) -> None:
    sys.stderr.flush()
    print(mark.line(), flush=True)


def _tie_to_top() -> None:
    processes.become_subreaper()
    processes.watch(int(os.environ[TOP]), lambda: processes.end_all_and_leave(UNKNOWN))
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C reaches the top too, which then stops us


def _stop(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)
    raise Stopped


def take_signals() -> None:
    """Set the handlers again, after a library (torchx) has set its own."""
    if Session.of_environment() is not None:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, lambda *_: None)

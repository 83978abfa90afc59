"""A stage or a program on this machine, as children of the step that asks for it.

A stage goes through torchx's local_cwd scheduler, the same AppDef that `torchx run` makes. A program of one process
is forked from the warm server if the run has one (trainer/warm.py), else started plainly. Both ways their lines come
out as this process's own, and a failure is raised as the error that the program itself recorded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
import threading
from typing import Any

from pipelines import processes, session
from trainer import errors, storage
from trainer.command import ProgramCall, StageCall, merged, program_command, stage_command
from trainer.errors import QwenVLError

POLL_S = 0.1


class Lines:
    """A program's lines on their way out. From its first line `error: ...` on they are kept back: the error is raised
    from its record and told once, by the top; the lines are shown only if there is no record."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self._partial = ""

    def write(self, text: str) -> None:
        *whole, self._partial = (self._partial + text).split("\n")
        for line in whole:
            line = line.rstrip("\r").rpartition("\r")[2]  # of a bar that was redrawn, its last state
            if self.kept or line.startswith("error: "):
                self.kept = [*self.kept[-60:], line]
            else:
                print(line, flush=True)

    def close(self) -> None:
        if self._partial:
            self.write("\n")

    def show(self) -> None:
        for line in self.kept:
            print(line, flush=True)

    def message(self) -> str:
        """The last error in the lines that were kept back."""
        starts = [at for at, line in enumerate(self.kept) if line.startswith("error: ")]
        return "\n".join(self.kept[starts[-1] :]).removeprefix("error: ").strip() if starts else ""


def run_stage(call: StageCall) -> None:
    """Train one stage; returns when it has ended well.

    Raises:
        QwenVLError: of the kind that the stage itself ended with.
    """
    from torchx.runner import get_runner
    from torchx.specs import AppState

    from trainer.component import app_of

    logging.getLogger("torchx").setLevel(logging.ERROR)
    seen, lines = set(_endings(call.out, call.stage)), Lines()
    with tempfile.TemporaryDirectory(prefix="qwenvl-torchx-") as logs, get_runner() as runner:
        try:
            app = app_of(call.stage, stage_command(call))
            handle = runner.run(app, scheduler="local_cwd", cfg={"log_dir": logs})
            session.take_signals()  # torchx has set its own
            relay = threading.Thread(target=_relay, args=(runner, handle, call.stage, lines), daemon=True)
            relay.start()
            status = runner.wait(handle, wait_interval=POLL_S)
            relay.join(timeout=5)
        except session.Stopped:
            processes.end_descendants(grace_s=session.STOP_GRACE_S)
            raise
    if status is None or status.state != AppState.SUCCEEDED:
        raise _ended(call, seen, lines)


def _relay(runner: Any, handle: str, role: str, lines: Lines) -> None:
    with contextlib.suppress(RuntimeError, ValueError):  # ended without a word
        for chunk in runner.log_lines(handle, role, 0, should_tail=True):
            lines.write(chunk)
    lines.close()


def _endings(out: str, stage: str) -> list[str]:
    """What launchers have left about how attempts ended, oldest first (trainer/heartbeat.py)."""
    attempts = storage.join(out, stage, "attempts")
    found = []
    for attempt in sorted(storage.list_dir(attempts)):
        folder = storage.join(attempts, attempt)
        found += [storage.join(folder, name) for name in sorted(storage.list_dir(folder)) if name.startswith("end-")]
    return found


def _ended(call: StageCall, seen: set[str], lines: Lines) -> QwenVLError:
    """The error of the attempt that has just failed."""
    from trainer.heartbeat import Termination

    for uri in reversed(_endings(call.out, call.stage)):
        if uri in seen:
            break
        end = Termination.model_validate(storage.read_json(uri))
        if end.code:
            told = end.error or lines.message() or f"{call.stage} ended with exit code {end.code}"
            place = f"rank {end.rank}, phase {end.phase or 'start'}, step {end.step}, exit code {end.code}"
            logs = uri.rpartition("/")[0]
            return error_of(end.code, f"{told}\n  attempt {end.attempt}: {place}; logs in {logs}")
    lines.show()
    return error_of(errors.UNKNOWN, f"{call.stage} ended without a record; its last lines are above")


def run_program(call: ProgramCall) -> None:
    """Run a program of one process; its own lines tell what it does.

    Raises:
        QwenVLError: with the program's exit code.
    """
    from trainer import warm

    made = program_command(call)
    env = merged(os.environ, made)
    read, write = os.pipe()
    program = warm.start(made.argv[2], made.argv[3:], env=env, output=write)
    os.close(write)
    lines = Lines()
    try:
        with os.fdopen(read, errors="replace", newline="\n") as stream:
            for line in stream:
                lines.write(line)
        lines.close()
        code = program.wait()
    except session.Stopped:
        program.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(timeout=session.STOP_GRACE_S)
        raise
    if code == 0:
        lines.show()  # an early `error: ` line was none
        return
    raise error_of(code, lines.message() or f"{call.program} ended with exit code {code}; its last lines are above")


def error_of(code: int, message: str) -> QwenVLError:
    """An error of the class that ends a process with `code`; for a code of no class, one that carries it."""
    for kind in _classes(QwenVLError):
        if kind.code == code and kind is not errors.RecipeError:
            return kind(message)
    error = QwenVLError(message)
    error.code = code if code > 0 else 128 - code
    return error


def _classes(kind: type[QwenVLError]) -> list[type[QwenVLError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _classes(child))]

"""A stage or a program on this machine, as children of the step that asks for it.

A stage goes through torchx's local_cwd scheduler, the same AppDef that `torchx run` makes. A program of one process
is forked from the warm server if the run has one (trainer/warm.py), else started plainly. Both ways their lines come
out as this process's own, and a failure is raised as the error that the program itself recorded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
from typing import Any

from pipelines import processes, session
from trainer import errors, storage
from trainer.command import ProgramCall, StageCall, merged, program_command, stage_command
from trainer.errors import QwenVLError

POLL_S = 0.1


def run_stage(call: StageCall) -> None:
    """Train one stage; returns when it has ended well.

    Raises:
        QwenVLError: of the kind that the stage itself ended with.
    """
    from torchx.runner import get_runner
    from torchx.specs import AppState

    from trainer.component import app_of

    logging.getLogger("torchx").setLevel(logging.ERROR)
    seen = set(_endings(call.out, call.stage))
    with tempfile.TemporaryDirectory(prefix="qwenvl-torchx-") as logs, get_runner() as runner:
        try:
            app = app_of(call.stage, stage_command(call))
            handle = runner.run(app, scheduler="local_cwd", cfg={"log_dir": logs})
            session.take_signals()  # torchx has set its own
            relay = threading.Thread(target=_relay, args=(runner, handle, call.stage), daemon=True)
            relay.start()
            status = runner.wait(handle, wait_interval=POLL_S)
            relay.join(timeout=5)
        except session.Stopped:
            processes.end_descendants(grace_s=session.STOP_GRACE_S)
            raise
    if status is None or status.state != AppState.SUCCEEDED:
        raise _ended(call, seen)


def _relay(runner: Any, handle: str, role: str) -> None:
    with contextlib.suppress(RuntimeError, ValueError):  # ended without a word
        for chunk in runner.log_lines(handle, role, 0, should_tail=True):
            sys.stdout.write(chunk)
            sys.stdout.flush()


def _endings(out: str, stage: str) -> list[str]:
    """What launchers have left about how attempts ended, oldest first (trainer/heartbeat.py)."""
    attempts = storage.join(out, stage, "attempts")
    found = []
    for attempt in sorted(storage.list_dir(attempts)):
        folder = storage.join(attempts, attempt)
        found += [storage.join(folder, name) for name in sorted(storage.list_dir(folder)) if name.startswith("end-")]
    return found


def _ended(call: StageCall, seen: set[str]) -> QwenVLError:
    """The error of the attempt that has just failed."""
    from trainer.heartbeat import Termination

    for uri in reversed(_endings(call.out, call.stage)):
        if uri in seen:
            break
        end = Termination.model_validate(storage.read_json(uri))
        if end.code:
            where = f"rank {end.rank}, {end.phase or 'start'}, step {end.step}"
            return error_of(end.code, end.error or f"{call.stage} ended with exit code {end.code} ({where})")
    return error_of(errors.UNKNOWN, f"{call.stage} ended without saying why; its last lines are above")


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
    last: list[str] = []
    try:
        with os.fdopen(read, errors="replace") as lines:
            for line in lines:
                last = [*last[-40:], line]
                print(line, end="", flush=True)
        code = program.wait()
    except session.Stopped:
        program.send_signal(15)
        with contextlib.suppress(Exception):
            program.wait(timeout=session.STOP_GRACE_S)
        raise
    if code:
        raise error_of(code, _message(last) or f"{call.program} ended with exit code {code}; its last lines are above")


def _message(lines: list[str]) -> str:
    """The error that a program printed last: from its line `error: ...` on."""
    starts = [at for at, line in enumerate(lines) if line.startswith("error: ")]
    return "".join(lines[starts[-1] :]).removeprefix("error: ").strip() if starts else ""


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

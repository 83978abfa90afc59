"""Hang watchdog of one rank: when nothing got done within the phase's limit, write all stacks and end with 145.

What counts as progress is the rank's own pulse (trainer/heartbeat.py): each step, each file loaded, each phase. The
thread needs the interpreter lock; a rank that hangs while holding it is ended by the launcher, which sees the same
pulse from outside.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

from trainer.errors import Hang
from trainer.heartbeat import Ending, Pulse, utc, write_ending

LOOK_EVERY_S = 1.0


class Watch:
    """Looks at a pulse from a thread of its own; `on_hang` ends the process."""

    def __init__(self, pulse: Pulse, *, on_hang: Callable[[Pulse], None] | None = None, every_s: float = LOOK_EVERY_S):
        self.pulse, self.on_hang, self.every_s = pulse, on_hang or end_process, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="qwenvl-watch")

    def start(self) -> Watch:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(self.every_s):
            if self.pulse.overdue_s() > 0:
                self.on_hang(self.pulse)
                return


def hang_of(pulse: Pulse) -> Hang:
    state = pulse.state
    return Hang(
        "no progress within the phase's limit",
        where=f"rank {state.rank}, phase {state.phase}, step {state.step}",
        expected=f"a step or a new phase within {state.phase_limit_s:.0f} s",
        got=f"nothing for {state.phase_limit_s + pulse.overdue_s():.0f} s",
        do="the stacks of all threads are in this rank's log; the attempt is started again",
    )


def end_process(pulse: Pulse) -> None:
    """Stacks into the log, the record for the launcher, exit code 145."""
    error, state = hang_of(pulse), pulse.state
    print(f"error: {error}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    write_ending(
        Ending(
            rank=state.rank,
            code=Hang.code,
            error=str(error),
            kind="Hang",
            phase=state.phase,
            step=state.step,
            committed_step=state.committed_step,
            time=utc(),
        )
    )
    os._exit(Hang.code)


_WATCH: Watch | None = None


def start(pulse: Pulse) -> Watch:
    """Watch this process's pulse."""
    global _WATCH  # noqa: PLW0603 - one watchdog a process
    _WATCH = Watch(pulse).start()
    return _WATCH


def stop() -> None:
    if _WATCH is not None:
        _WATCH.stop()

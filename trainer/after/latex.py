"""Do two pieces of LaTeX mean the same? Decided by sympy in a process of its own (latex_worker.py), which is ended when
one comparison takes too long or too much memory: what a model or a file wrote never hangs or harms the caller.

No code is evaluated: text becomes expressions by sympy's ANTLR grammar alone, never by sympify or eval. Considered (on
48 forms of answers, sympy 1.14): ANTLR fails on sets, tuples, matrices and percent signs, which the worker takes
apart before; Lark also on \\pi, on degrees and on texts, gives forests where its grammar is ambiguous
(\\sin^2 x + \\cos^2 x), and computes 2^{10} while it parses. Against ANTLR: its runtime must be 4.11 exactly.
math-verify reads more forms, some of them by sympy's parse_expr, which evaluates, and stops by a signal, which reaches
no other thread and no computation inside one integer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

from trainer.errors import UsageError

CPU_S = 5
"""Of one comparison. Seconds of the processor, so that a busy machine decides as an idle one does."""
WALL_S = 60.0
"""When a worker is given up whatever it computes: it sleeps, or the machine stands still."""
START_S = 60.0
MAX_CHARACTERS = 1000
MAX_BYTES = 2 * 1024**3


class Undecided(Exception):
    """Not decided within the limits."""


class _Worker:
    """A process that compares, restarted when one comparison was too much. Used by one thread at a time. A fork of its
    owner begins without it: its pipes are the parent's, and so is the thread that holds the lock just then."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, one: str, other: str) -> bool:
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            line = json.dumps({"one": one, "other": other, "cpu_s": CPU_S}).encode() + b"\n"
            try:
                process.stdin.write(line)
                process.stdin.flush()
                found = self._line(process, WALL_S)
            except BrokenPipeError:
                found = None
            if found is None or found["same"] is None:  # the next one begins with all of its memory
                self.stop()
                raise Undecided
            return bool(found["same"])

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            self.stop()
            program = str(Path(__file__).with_name("latex_worker.py"))
            self.process = subprocess.Popen(
                [sys.executable, "-I", program, str(MAX_BYTES)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                bufsize=0,  # a fork between writing and flushing would write it twice
            )  # fmt: skip
            if self._line(self.process, START_S) is None:
                self.stop()
                raise UsageError(
                    "the process that compares LaTeX does not start",
                    where=program,
                    expected="sympy and antlr4-python3-runtime 4.11 beside this package",
                    do="install the extra prepare or train; `python PROGRAM 2000000000` says what is missing",
                )
        return self.process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> dict | None:
        """The next line, None where the process ended or took longer. Its lines are shorter than a pipe's buffer and
        written at once."""
        assert process.stdout is not None
        ready = select.poll()  # select.select knows no descriptor above 1023
        ready.register(process.stdout, select.POLLIN)
        line = process.stdout.readline() if ready.poll(seconds * 1000) else b""
        return json.loads(line) if line.endswith(b"\n") else None


_worker = _Worker()
atexit.register(_worker.stop)


def same(one: str, other: str) -> bool:
    """Whether two answers in LaTeX are the same: equal expressions (x^2+2x+1 and (x+1)^2), equations and inequalities
    turned round, tuples, intervals and matrices element by element, sets and lists in any order. Units and the signs of
    degrees and percent are not compared. What cannot be read is the same as nothing but its own text.

    Raises:
        Undecided: longer than MAX_CHARACTERS, or not decided within CPU_S and MAX_BYTES.
    """
    if one.strip() == other.strip():
        return True
    if max(len(one), len(other)) > MAX_CHARACTERS:
        raise Undecided
    return _worker.ask(one, other)

"""A process that runs one function of a module, one call after the other: what ends it ends that call alone, and the
next call starts another one.

Started afresh (spawn), since this process has threads, whose locks a fork would copy; it knows nothing of what is
called here before the first call. Considered: concurrent.futures.ProcessPoolExecutor, which breaks as a whole, does not
say by which signal, and ends no call that lasts too long.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import resource
import signal
from multiprocessing.connection import Connection
from typing import Any

from trainer.errors import UsageError

START_S = 120.0


class Ended(Exception):
    """The process ended, or was ended, before it answered."""


class Worker:
    """`module` and `name`: of a function whose arguments and answers can be pickled, and that raises nothing that is
    no fault of its own. Used by one thread at a time, and not by a fork of this process."""

    def __init__(self, module: str, name: str, *, limit_s: float):
        self.module, self.name, self.limit_s = module, name, limit_s
        self._process: Any = None
        self._pipe: Connection | None = None

    def call(self, *args: Any, **named: Any) -> Any:
        """
        Raises:
            Ended: by a signal, with an error, or after limit_s. UsageError: it does not start.
        """
        process, pipe = self._running()
        try:
            pipe.send((args, named))
            if pipe.poll(self.limit_s):
                return pipe.recv()
            told = f"no answer within {self.limit_s:g} s"
        except (EOFError, OSError):
            process.join(START_S)
            told = f"its process ended {_by(process.exitcode)}"
        self.stop()
        raise Ended(told)

    def stop(self) -> None:
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is not None and pipe is not None:
            pipe.close()
            process.kill()
            process.join()

    def _running(self) -> tuple[Any, Connection]:
        if self._process is not None and self._process.is_alive() and self._pipe is not None:
            return self._process, self._pipe
        self.stop()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.module, self.name), daemon=True)
        self._process.start()
        theirs.close()
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(START_S) and self._pipe.recv():
                return self._process, self._pipe
        self._process.join(1)
        got = f"it ended {_by(self._process.exitcode)}" if self._process.exitcode is not None else "nothing"
        self.stop()
        do = f"`python -c 'import {self.module}'` says what is missing; a script needs its `if __name__ == '__main__'`"
        raise UsageError("a process does not start", where=f"{self.module}.{self.name}",
                         expected=f"ready within {START_S:g} s", got=got, do=do)  # fmt: skip


def _by(code: int | None) -> str:
    if code is None or code >= 0:
        return f"with exit code {code}"
    return f"by {signal.Signals(-code).name}"


def _serve(pipe: Connection, module: str, name: str) -> None:
    """The other process: it ends when nobody is left who could ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function = getattr(importlib.import_module(module), name)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(True)
        while True:
            args, named = pipe.recv()
            pipe.send(function(*args, **named))

"""One run at a time writes into an output: OUT/.lock on this machine's file system.

The kernel holds the lock (flock), so it is free the moment its holder is gone, however it ended; what is written in
the file only names the holder. Processes of a run that was killed may live a moment longer than its top: they carry
its session in their environment and are waited for, then ended. An output in object storage has no such lock: there
the create-once objects of the stages keep two runs from mixing, and nothing names the other run. Shards that are
ingested there have one of their own kind (pipelines/lease.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pipelines import processes, session
from trainer import storage
from trainer.errors import OutputInUse, UsageError

NAME = ".lock"
GONE_LIMIT_S = 10.0


@contextlib.contextmanager
def held(out: str, session_folder: str = "", *, name: str = NAME, stays: bool = True) -> Iterator[None]:
    """Hold the output for this process; a run has a session folder, a command of its own has none.

    Args:
        name: of the lock's file in the output.
        stays: whether the file is there afterwards, empty; if not, a folder with nothing else goes with it.

    Raises:
        OutputInUse: another run lives in it; the message names its pid and host.
        UsageError: OUT is a file, or cannot be made.
    """
    path = storage.local_path(out)
    if path is None:
        yield
        return
    with _locked(path, name, out) as file:
        _end_leftovers(_holder(file.name))
        file.seek(0)
        file.truncate()
        json.dump({**about(), "session": session_folder}, file)
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()
            if not stays:
                Path(file.name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # there is something else in it
                    os.rmdir(path)


def about() -> dict:
    """Who holds a lock, for whoever finds it taken."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _locked(path: str, name: str, out: str) -> TextIO:
    """The lock's file, locked. One that its last holder removed while this process opened it is no lock."""
    while True:
        try:
            file = (_folder(path) / name).open("a+", encoding="utf-8")
        except FileNotFoundError:  # the folder went with it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise _in_use(file.name, out) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
                return file
        file.close()


def _folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError("the output is not a folder", where=path, do="name a folder with --out") from None
    except OSError as error:
        raise UsageError(
            "the output cannot be made", where=path, got=error.strerror, do="name a folder that can be written"
        ) from None
    return folder


def _holder(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}


def _in_use(path: str, out: str) -> OutputInUse:
    return in_use(_holder(path), out)


def in_use(holder: dict, out: str) -> OutputInUse:
    return OutputInUse(
        "another run lives in this output",
        where=out,
        got=f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}",
        do=f"wait for it, stop it (kill {holder.get('pid', 'PID')}), or use another --out",
    )


def _end_leftovers(holder: dict) -> None:
    """See to it that no process of a run that was killed still writes; remove its session folder."""
    if not holder.get("session"):
        return

    def gone() -> bool:
        return not processes.with_environment(session.SESSION, holder["session"])

    if not processes.wait_until(gone, GONE_LIMIT_S):
        processes.send(processes.with_environment(session.SESSION, holder["session"]), signal.SIGKILL)
        processes.wait_until(gone, GONE_LIMIT_S)
    if Path(holder["session"]).name.startswith(session.PREFIX):
        shutil.rmtree(holder["session"], ignore_errors=True)

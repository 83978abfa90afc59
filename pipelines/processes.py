"""The process tree of a run on this machine: nothing of it outlives its top.

    qwenvl run (top) -> sh -> step (kfp's executor) -> torchx -> trainer.launch -> ranks

A parent-death signal does not reach through this chain: kfp.local starts a step below a shell, and the signal is
about the direct parent. So a step watches the top itself through a pidfd, which becomes readable the moment the top
is gone, however it ended, and then ends everything below itself. Top and steps are child subreapers: what loses its
parent in between (a launcher whose step was killed) comes up to them and is ended with the rest.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PROC = Path("/proc")


def become_subreaper() -> None:
    """Orphans below this process become its children instead of init's. Linux only; elsewhere nothing happens."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        return


def _parents() -> dict[int, int]:
    """pid -> parent of every process."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # ended meanwhile
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(entry.name)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, children first."""
    parents = _parents()
    below: list[int] = []
    front = [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        below += front
    return below


def send(pids: Iterable[int], signum: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def end_descendants(*, grace_s: float, first: Callable[[], Iterable[int]] | None = None) -> None:
    """SIGTERM, then SIGKILL after `grace_s`, for everything below this process; returns when all are gone.

    Args:
        first: who gets the SIGTERM; default: the direct children, which pass it on.
    """
    own = os.getpid()
    if grace_s > 0:
        parents = _parents()
        send(first() if first else [pid for pid, parent in parents.items() if parent == own], signal.SIGTERM)
        wait_until(lambda: not descendants(own), grace_s)
    for _ in range(50):  # a killed parent's children come up only once it is dead
        left = descendants(own)
        if not left:
            return
        send(left, signal.SIGKILL)
        reap()
        time.sleep(0.02)


def reap() -> None:
    """Collect ended children that nobody waits for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def wait_until(true: Callable[[], bool], limit_s: float, every_s: float = 0.05) -> bool:
    end = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True


def alive(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def with_environment(name: str, value: str) -> list[int]:
    """Processes of this user that carry NAME=VALUE in their environment, this one apart."""
    wanted = f"{name}={value}".encode()
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def watch(pid: int, then: Callable[[], None]) -> None:
    """Call `then` in a thread when process `pid` has ended; at once if it is gone already."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        then()
        return

    def wait() -> None:
        select.select([pidfd], [], [])
        then()

    threading.Thread(target=wait, name="watch-top", daemon=True).start()


def end_all_and_leave(code: int) -> None:
    """SIGKILL everything below this process and leave at once: for a process whose run is gone."""
    for _ in range(20):
        left = descendants(os.getpid())
        if not left:
            break
        send(left, signal.SIGKILL)
        time.sleep(0.02)
    os._exit(code)

"""One process at a time writes shards to an address, a folder's or an object store's.

    with lease.held(uri): ...

A folder is locked by the kernel (pipelines/lock.py). An object store has no locks that end with their holder, so there
the holder keeps a record alive: URI/.tmp-lease/NNNNNN.json, written once (create_once) and again every BEAT_S seconds
with another `beat`. Who comes and finds the newest record released takes the next number at once. Where it is not, he
looks for PATIENCE_S whether its beat goes on: if so, the address is in use; if not, its holder is gone (killed, its
machine lost) and he takes the next number, which only one of several can create. Clocks are never compared. A holder
that stood still for so long (a laptop asleep) and finds a newer record ends at once: the address is not his any more.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pipelines import lock, processes
from trainer import storage
from trainer.errors import OutputInUse, QwenVLError

NAME = f"{storage.TEMPORARY}lease"
BEAT_S = 10.0
PATIENCE_S = 45.0
LOOK_S = 2.0


@contextlib.contextmanager
def held(uri: str) -> Iterator[None]:
    """Hold the address for this process.

    Raises:
        OutputInUse: another process writes there; the message names its pid and host.
        UsageError: a folder that cannot be made. StorageError
    """
    if storage.local_path(uri) is not None:
        with lock.held(uri, name=NAME, stays=False):
            yield
        return
    record = _taken(uri)
    ended = threading.Event()
    beats = threading.Thread(target=record.beats, args=(ended,), name="lease", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        record.release()


class _Record:
    """This process's record, the newest one of the address."""

    def __init__(self, uri: str, number: int):
        self.uri, self.number = uri, number
        self.at = storage.join(uri, NAME, _name(number))
        self.content: dict[str, Any] = {**lock.about(), "holder": uuid.uuid4().hex, "beat": 0}

    def create(self) -> bool:
        """False when another process was first."""
        try:
            storage.create_once(self.at, storage.json_bytes(self.content))
        except FileExistsError:
            return False
        return True

    def beats(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(QwenVLError):  # the next one may get through
                if newer := [name for name in _names(self.uri) if name > _name(self.number)]:
                    self._lost(newer[-1])
                self.content["beat"] += 1
                storage.write_json(self.at, self.content)

    def _lost(self, name: str) -> None:
        other = _read(self.uri, name) or {}
        told = lock.in_use(other, self.uri)
        print(f"error: this process stood still, and another took its place\n{told}", file=sys.stderr, flush=True)
        processes.end_all_and_leave(OutputInUse.code)

    def release(self) -> None:
        """What cannot be written is found without a beat."""
        with contextlib.suppress(QwenVLError):
            storage.write_json(self.at, {**self.content, "released": True})


def _taken(uri: str) -> _Record:
    while True:
        names = _names(uri)
        if names and (holder := _living(uri, names[-1])) is not None:
            raise lock.in_use(holder, uri)
        record = _Record(uri, int(names[-1].partition(".")[0]) + 1 if names else 0)
        if record.create():
            for name in names:  # the newest stays, so that numbers only grow
                storage.remove(storage.join(uri, NAME, name))
            return record


def _living(uri: str, name: str) -> dict[str, Any] | None:
    """Who holds the record, None when it is released or nobody keeps it alive."""
    first = _read(uri, name)
    if first is None or first.get("released"):
        return None
    print(f"{uri}: looking whether process {first['pid']} on {first['host']} still writes there", flush=True)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        found = _read(uri, name)
        if found is None or found.get("released"):
            return None
        if found != first:
            return found
    return None


def _read(uri: str, name: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(storage.join(uri, NAME, name))
    except FileNotFoundError:
        return None


def _names(uri: str) -> list[str]:
    return [name for name in storage.list_dir(storage.join(uri, NAME)) if name.endswith(".json")]


def _name(number: int) -> str:
    return f"{number:06d}.json"

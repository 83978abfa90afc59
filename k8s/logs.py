"""What the ranks print: rank 0's log as long as its container runs, and every rank's last lines from storage after.

Follower(api, pod, container, say, uid=...).start()     reconnects, and says every line once
stored_ends(stage_uri, attempt)                         pod -> how its ranks ended, as the node wrote it
tell_last_lines(stage_uri, attempt, say)                when pods are gone
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from pydantic import ValidationError

from k8s.client import Api, Disconnected, Unreachable
from trainer import storage
from trainer.errors import ClusterError, StorageError
from trainer.heartbeat import Termination

AGAIN_S, MAX_AGAIN_S = 5.0, 60.0
NUM_RANKS, NUM_LINES = 8, 15
TAIL_BYTES = 16 * 1024
NUM_CALLS = 16
"""To storage at a time."""

T = TypeVar("T")


class Follower:
    """A thread that prints what one container writes. It never ends or delays the launcher: a log that cannot be had
    is said once and tried again.

    Args:
        uid: of the pod, for whoever asks whether this is still the right one.
    """

    def __init__(self, api: Api, pod: str, container: str, say: Callable[[str], None], *, uid: str = ""):
        self._api, self._pod, self._container, self._say = api, pod, container, say
        self.uid = uid
        self._stop = threading.Event()
        self._last = ""
        self._at_last = 0
        self._thread = threading.Thread(target=self._run, name=f"log-{pod}", daemon=True)

    def start(self) -> Follower:
        self._thread.start()
        return self

    def stop(self, patience_s: float = 3.0) -> None:
        """Let it read what is left, at most so long."""
        self._stop.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        told, pause = "", AGAIN_S
        while True:
            last_round, before = self._stop.is_set(), (self._last, self._at_last)
            try:
                self.follow_once()
            except Disconnected:
                pass  # connected again below
            except Exception as error:  # whatever a log stream does must not end the launcher
                known = isinstance(error, ClusterError | Unreachable)
                text = f"(log of {self._pod} not to be had: {error.args[0].splitlines()[0] if known else error!r})"
                if text != told and not last_round:
                    told = text
                    self._say(text)
            pause = AGAIN_S if (self._last, self._at_last) != before else min(pause * 2, MAX_AGAIN_S)
            if last_round:
                return
            self._stop.wait(pause)

    def follow(self) -> None:
        """Until the container has ended, in this thread: whatever breaks off is taken up again.

        Raises:
            ClusterError: there is no such log, or it may not be read.
        """
        while True:
            try:
                self.follow_once()
                return
            except Disconnected:
                time.sleep(AGAIN_S)

    def follow_once(self) -> None:
        """One connection. The server resumes at a whole second, so lines up to the last one said are left out.

        Several lines may carry one time stamp: those already said are counted.
        """
        skip_at, skip = self._last, self._at_last
        for moment, line in self._api.log(self._pod, self._container, since=self._last or None):
            if moment < skip_at:
                continue
            if moment == skip_at and skip > 0:
                skip -= 1
                continue
            self._at_last = self._at_last + 1 if moment == self._last else 1
            self._last = moment
            self._say(line)


# ---------------------------------------------------------------- from storage


def attempt_uri(stage_uri: str, attempt: int) -> str:
    return storage.join(stage_uri, "attempts", f"{attempt:04d}")


def stored_ends(stage_uri: str, attempt: int) -> dict[str, Termination]:
    """How each node of the attempt ended; what is damaged is left out.

    Raises:
        StorageError: it does not answer; without its records a decision may be wrong.
    """
    uri = attempt_uri(stage_uri, attempt)
    return _ends(uri, attempt, storage.list_dir(uri))


def _ends(uri: str, attempt: int, names: Iterable[str]) -> dict[str, Termination]:
    def read(name: str) -> Termination | None:
        with contextlib.suppress(ValidationError, FileNotFoundError):
            return Termination.model_validate_json(storage.read_bytes(storage.join(uri, name)))
        return None

    ends = [name for name in names if name.startswith("end-") and name.endswith(".json")]
    read_ends = zip(ends, _together(partial(read, name) for name in ends), strict=True)
    return {
        name[len("end-") : -len(".json")]: end for name, end in read_ends if end is not None and end.attempt == attempt
    }


def _together(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Answers of storage in the order of the calls, NUM_CALLS at a time, each with the patience of this thread.

    The first call that fails is raised, and what has not begun by then is never asked.
    """
    with ThreadPoolExecutor(NUM_CALLS, thread_name_prefix="storage") as pool:
        asked = [pool.submit(copy_context().run, call) for call in calls]
        try:
            return [one.result() for one in asked]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def last_lines(stage_uri: str, attempt: int) -> tuple[dict[int, list[str]], int]:
    """(rank -> its last lines, how many more ranks or nodes left some): of its whole log where that was stored, else of
    what its node wrote once a minute.

    At most NUM_RANKS, those that failed first: of 512 ranks on 64 nodes one list, 64 records and at most 3 x NUM_RANKS
    other calls, NUM_CALLS at a time.
    """
    uri = attempt_uri(stage_uri, attempt)
    names = storage.list_dir(uri)
    ends = _ends(uri, attempt, names)
    failed = {rank for end in ends.values() for rank, code in end.codes.items() if code}
    node_of = {rank: node for node, end in ends.items() for rank in end.codes}
    logs = {int(match[1]): name for name in names if (match := re.fullmatch(r"rank(\d+)\.log", name))}
    parts = {name[len("last-lines-") : -len(".txt")]: name for name in names if name.startswith("last-lines-")}

    def order(rank: int) -> tuple[bool, int]:
        return rank not in failed, rank

    asked = sorted({*logs, *failed}, key=order)[:NUM_RANKS]
    # Nodes of failed ranks without a whole log; then any, where nobody said how it ended.
    nodes = dict.fromkeys(node_of[rank] for rank in asked if rank not in logs and node_of.get(rank) in parts)
    if len(asked) < NUM_RANKS:
        nodes |= dict.fromkeys(sorted(parts))
    read = [partial(_sections, storage.join(uri, parts[node])) for node in list(nodes)[:NUM_RANKS]]
    found: dict[int, list[str]] = {}
    for sections in _together(read):
        found |= sections
    whole = [rank for rank in asked if rank in logs]
    tails = _together(partial(_tail, storage.join(uri, logs[rank])) for rank in whole)
    found |= dict(zip(whole, tails, strict=True))
    shown = sorted(found, key=order)[:NUM_RANKS]
    left = len({*found, *logs, *node_of} - set(shown)) or max(0, len(parts) - len(nodes))
    return {rank: found[rank] for rank in shown}, left


def _tail(uri: str) -> list[str]:
    size = storage.size(uri)
    tail = storage.read_bytes(uri, max(0, size - TAIL_BYTES), size) if size else b""
    return tail.decode(errors="replace").splitlines()[-NUM_LINES:]


def _sections(uri: str) -> dict[int, list[str]]:
    """Of last-lines-NODE.txt: `==> rank3.log`, then its lines."""
    found: dict[int, list[str]] = {}
    current: list[str] = []
    for line in storage.read_bytes(uri).decode(errors="replace").splitlines():
        if match := re.fullmatch(r"==> rank(\d+)\.log", line):
            current = found.setdefault(int(match[1]), [])
        else:
            current.append(line)
    return {rank: lines[-NUM_LINES:] for rank, lines in found.items()}


def tell_last_lines(stage_uri: str, attempt: int, say: Callable[[str], None]) -> None:
    """Say them, and that they come from storage; failed ranks first when there are too many."""
    uri = attempt_uri(stage_uri, attempt)
    try:
        found, left = last_lines(stage_uri, attempt)
    except (StorageError, FileNotFoundError) as error:
        say(f"(last lines of attempt {attempt} not to be had from {uri}: {error.args[0]})")
        return
    for rank, lines in found.items():
        say(f"==> last lines of rank {rank}, attempt {attempt}, from storage ({uri})")
        for line in lines:
            say(f"    {line}")
    if left:
        say(f"({left} more ranks in {uri})")

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
from collections.abc import Callable

from pydantic import ValidationError

from k8s.client import Api, Disconnected, Unreachable
from trainer import storage
from trainer.errors import ClusterError, StorageError
from trainer.heartbeat import Termination

AGAIN_S, MAX_AGAIN_S = 5.0, 60.0
NUM_RANKS, NUM_LINES = 8, 15
TAIL_BYTES = 16 * 1024


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
    """How each node of the attempt ended; what cannot be had or read is left out."""
    found, uri = {}, attempt_uri(stage_uri, attempt)
    with contextlib.suppress(StorageError, FileNotFoundError):
        for name in storage.list_dir(uri):
            if name.startswith("end-") and name.endswith(".json"):
                with contextlib.suppress(ValidationError, FileNotFoundError):
                    end = Termination.model_validate_json(storage.read_bytes(storage.join(uri, name)))
                    if end.attempt == attempt:
                        found[name[len("end-") : -len(".json")]] = end
    return found


def last_lines(stage_uri: str, attempt: int) -> dict[str, list[str]]:
    """By rank, its last lines: of its whole log where that was stored, else of what its node wrote once a minute."""
    uri = attempt_uri(stage_uri, attempt)
    names = storage.list_dir(uri)
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("last-lines-"):
            found |= _sections(storage.read_bytes(storage.join(uri, name)).decode(errors="replace"))
    for name in names:
        if match := re.fullmatch(r"rank(\d+)\.log", name):
            at = storage.join(uri, name)
            size = storage.size(at)
            tail = storage.read_bytes(at, max(0, size - TAIL_BYTES), size) if size else b""
            found[f"rank {int(match[1])}"] = tail.decode(errors="replace").splitlines()[-NUM_LINES:]
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _sections(text: str) -> dict[str, list[str]]:
    """Of last-lines-NODE.txt: `==> rank3.log`, then its lines."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"==> rank(\d+)\.log", line):
            current = found.setdefault(f"rank {int(match[1])}", [])
        else:
            current.append(line)
    return {rank: lines[-NUM_LINES:] for rank, lines in found.items()}


def tell_last_lines(stage_uri: str, attempt: int, say: Callable[[str], None]) -> None:
    """Say them, and that they come from storage; failed ranks first when there are too many."""
    uri = attempt_uri(stage_uri, attempt)
    try:
        found = last_lines(stage_uri, attempt)
    except (StorageError, FileNotFoundError) as error:
        say(f"(last lines of attempt {attempt} not to be had from {uri}: {error.args[0]})")
        return
    failed = {
        f"rank {rank}" for end in stored_ends(stage_uri, attempt).values() for rank, code in end.codes.items() if code
    }
    shown = sorted(found, key=lambda rank: (rank not in failed, len(rank), rank))[:NUM_RANKS]
    for rank in shown:
        say(f"==> last lines of {rank}, attempt {attempt}, from storage ({uri})")
        for line in found[rank]:
            say(f"    {line}")
    if len(found) > len(shown):
        say(f"({len(found) - len(shown)} more ranks in {uri})")

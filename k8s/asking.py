"""Asking storage that may be away: the launcher's one thread also watches jobs, pods and its deadline.

    looking = Heartbeats(task.progress, clock=clock)
    looking.newest(attempt)        what is known, at most WAIT_S later: a pod that fails is seen while S3 hangs
    answers = Answers(limits.storage_s, tell=..., clock=clock, sleep=sleep)
    answers.of(call)               where nothing runs and nothing may be decided without it: asked again, up to a limit

Each read of heartbeats has a thread of its own, which the next looks do not wait for. One that hangs keeps nobody from
leaving: it is a daemon, and its calls end after CALL_S.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from k8s.decide import Progress
from trainer import tries
from trainer.errors import StorageError

AGAIN_S = 5.0
"""Between two reads: not for every change on the cluster."""
WAIT_S = 1.0
"""For a read to end that a look began: enough for storage that answers, and of the 10 s from a sign in the API to the
decision 5 s belong to the other pods (k8s/decide.py)."""
CALL_S = 10.0
"""Of each call of a launcher to storage, all tries together. More would only delay the word that storage is away:
whoever needs an answer asks again, for limits.storage_s."""
STALE_S = 3 * CALL_S
"""So long what was read before counts while a read is under way: from then on silence is nobody's fault."""
FIRST_PAUSE_S, MAX_PAUSE_S = 2.0, 30.0
"""Between two calls of Answers."""

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What a read found; neither before the first has ended.

    `at` is when it began: what stood still until then has stood still, what came since is not known.
    """

    attempt: int
    progress: Progress | None = None
    error: StorageError | None = None
    at: float = 0.0


class Heartbeats:
    """What the heartbeats of an attempt say.

    Args:
        read: the progress of an attempt, from storage.
        clock: seconds; a read begins AGAIN_S after the one before.
    """

    def __init__(self, read: Callable[[int], Progress], *, clock: Callable[[], float]):
        self._read, self._clock = read, clock
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._looked = Look(0)
        self._wrong: Exception | None = None
        self._lock = threading.Lock()

    def newest(self, attempt: int) -> Look:
        """The last read that ended; one is begun, and waited for a moment, unless one is under way.

        While it is under way the one before counts, for STALE_S. What a read raises beside StorageError is raised here.
        """
        another = self._looked.attempt != attempt
        if another:
            with self._lock:
                self._looked, self._wrong = Look(attempt), None
        under_way = self._thread is not None and self._thread.is_alive()
        if another or (not under_way and self._clock() - self._began >= AGAIN_S):
            self._began = self._clock()
            self._thread = threading.Thread(
                target=self._look, args=(attempt, self._began), name="heartbeats", daemon=True
            )
            self._thread.start()
            self._thread.join(WAIT_S)
        if self._wrong is not None:
            raise self._wrong
        if self._thread is not None and self._thread.is_alive() and self._clock() - self._began > STALE_S:
            return Look(attempt)
        return self._looked

    def _look(self, attempt: int, began: float) -> None:
        try:
            with tries.patience(CALL_S):
                found = Look(attempt, self._read(attempt), at=began)
        except StorageError as error:
            found = Look(attempt, error=error, at=began)
        except Exception as error:
            found = error
        with self._lock:
            if self._looked.attempt != attempt:
                return  # of an attempt that is over
            if isinstance(found, Look):
                self._looked = found
            else:
                self._wrong = found


class Answers:
    """What storage answers, however long that takes.

    Args:
        limit_s: without any answer; then the last StorageError goes on.
        tell: given what is wrong, and an empty text when it is over.
    """

    def __init__(
        self,
        limit_s: float,
        *,
        tell: Callable[[str], None],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ):
        self._limit_s, self._tell, self._clock, self._sleep = limit_s, tell, clock, sleep
        self._away_since: float | None = None

    def of(self, call: Callable[[], T]) -> T:
        """
        Raises:
            StorageError: no call has been answered for the limit; calls after that are made once.
        """
        pause = FIRST_PAUSE_S
        while True:
            began = self._clock()
            try:
                found = call()
                self._away_since = None
                self._tell("")
                return found
            except StorageError as error:
                self._away_since = began if self._away_since is None else self._away_since
                if self._clock() - self._away_since > self._limit_s:
                    raise
                self._tell(f"storage does not answer, asked again: {error.what}")
            self._sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_S)

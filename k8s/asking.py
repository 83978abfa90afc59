"""Asking storage that may be away: the launcher's one thread also watches jobs, pods and its deadline.

    looking = Heartbeats(task.progress, clock=clock)
    looking.newest(attempt)        what is known, at most WAIT_S later: a pod that fails is seen while S3 hangs
    answers = Answers(limits.storage_s, tell=..., clock=clock, sleep=sleep)
    answers.of(call)               where nothing runs and nothing may be decided without it: asked again, up to a limit

Whatever asks does so within `tries.patience(CALL_S)`.

Each read of heartbeats has a thread of its own, which the next looks do not wait for. One that hangs keeps nobody from
leaving: it is a daemon, and its calls end after CALL_S.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from k8s.decide import Progress
from trainer import storage, tries
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
"""So long what was read before counts while a read is under way: from then on silence is nobody's fault. Of an object
store a read is two calls."""
FIRST_PAUSE_S, MAX_PAUSE_S = 2.0, 30.0
"""Between two calls of Answers."""
REFUSED_S = 60.0
"""For storage that refuses what it allowed before: changed rights and keys reach all its servers within seconds, and
nothing else of it passes. What expires and is renewed is no refusal (trainer/storage.py)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What a read found; neither before the first has ended.

    `at` is when it began: what stood still until then has stood still, what came since is not known. `late`: a read has
    been under way for longer than STALE_S.
    """

    attempt: int
    progress: Progress | None = None
    error: StorageError | None = None
    at: float = 0.0
    late: bool = False

    @property
    def trouble(self) -> str:
        """Why hangs are not seen now; empty when they are."""
        if self.late:
            return f"reading the heartbeats takes longer than {STALE_S:.0f} s, hangs are not seen meanwhile"
        if self.error is None:
            return ""
        what = "refuses" if isinstance(self.error, storage.Refused) else "does not answer"
        return f"no heartbeats to be had, storage {what}: {self.error.what}"


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
            return Look(attempt, late=True)
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
        tell: given what is wrong, once.
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
        self._refused_since: float | None = None
        self._answered = False
        self._told = ""

    def of(self, call: Callable[[], T]) -> T:
        """
        Raises:
            StorageError: no call has been answered for the limit; calls after that are made once.
            Refused: storage refuses: at once if it never allowed anything, else for REFUSED_S.
        """
        pause = FIRST_PAUSE_S
        while True:
            began = self._clock()
            try:
                found = call()
            except StorageError as error:
                if self._over(error, began):
                    raise
                self._say(error)
            else:
                self._away_since = self._refused_since = None
                self._answered, self._told = True, ""
                return found
            self._sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_S)

    def _over(self, error: StorageError, began: float) -> bool:
        """Whether an error of a call that began then is one too many."""
        now = self._clock()
        if not isinstance(error, storage.Refused):
            self._refused_since = None
        elif self._refused_since is None:
            self._refused_since = began
        if self._away_since is None:
            self._away_since = began
        refused = self._refused_since is not None and (not self._answered or now - self._refused_since > REFUSED_S)
        return refused or now - self._away_since > self._limit_s

    def _say(self, error: StorageError) -> None:
        refused = isinstance(error, storage.Refused)
        what = "storage refuses what it allowed before" if refused else "storage does not answer"
        if what != self._told:
            self._told = what
            self._tell(f"{what}, asked again: {error.what}")

"""What became of a step's attempts, in storage: a launcher that is lost, and jobs that are removed, take no history
with them.

    OUT/launches/STEP/IDENTITY-0001.json     written when attempt 1 has been created, again when it has ended

One writer: the launcher that owns the job. An attempt is counted from what stands here first, from the jobs that are
still there second. A launcher that gives a step up closes its history: whoever starts the step again begins to count
anew, but never takes a number twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from k8s.decide import Ended
from trainer import storage
from trainer.errors import ClusterError, StorageError
from trainer.heartbeat import utc

FORMAT = 1
FOLDER = "launches"
MAX_CAUSE = 4000
GIVEN_UP_S = 900.0
"""So long a pipeline's own retries find a step given up: it starts a failed step again whatever that failed of."""


class Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Record(Stored):
    format: Literal[1] = FORMAT
    step: str
    attempt: int
    job: str
    uid: str
    run: str
    """Who asked."""
    begun_at: str
    begun_s: float
    """Seconds since 1970 by the launcher's clock: the step's deadline covers launchers that were lost."""
    exclude_nodes: tuple[str, ...] = ()
    end: Ended | None = None
    ended_at: str = ""
    """UTC, for people."""
    ended_s: float = 0.0
    """Seconds since 1970 by the launcher's clock."""
    closed: bool = False
    """The launcher gave the step up after this attempt, or the step was done."""


class Records:
    """Attempts of one step with one identity. `uri` None keeps them in this process only."""

    def __init__(
        self,
        uri: str | None,
        step: str,
        identity: str,
        *,
        say: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ):
        self.uri, self.step, self.identity = uri, step, identity
        self._say, self._now = say, now
        self._known: dict[int, Record] = {}
        self._behind: set[int] = set()
        """Attempts whose record in storage is older than what is known."""

    def read(self) -> list[Record]:
        """All of them, by attempt.

        Raises:
            StorageError: they cannot be had; to go on without them would count from one again.
        """
        if self.uri is not None:
            folder = storage.join(self.uri, self.step)
            for name in storage.list_dir(folder):
                if name.startswith(f"{self.identity}-") and name.endswith(".json"):
                    record = _record(storage.join(folder, name))
                    if record is not None:
                        self._known[record.attempt] = record
        return [self._known[number] for number in sorted(self._known)]

    def knows(self, attempt: int) -> bool:
        return attempt in self._known

    def begin(self, attempt: int, *, job: str, uid: str, run: str, exclude_nodes: Sequence[str] = ()) -> None:
        """Storage that does not answer is told, for catch_up(); until then the job on the cluster is the memory."""
        now = self._now()
        record = Record(
            step=self.step,
            attempt=attempt,
            job=job,
            uid=uid,
            run=run,
            begun_at=utc(now),
            begun_s=now,
            exclude_nodes=tuple(exclude_nodes),
        )
        try:
            self._write(record)
        except StorageError as error:
            self._say(f"{self.step}: the record of attempt {attempt} is not stored yet: {error.what}")

    def catch_up(self) -> None:
        """Store what could not be stored before, if storage answers now."""
        with contextlib.suppress(StorageError):
            for attempt in sorted(self._behind):
                self._write(self._known[attempt])

    def end(self, attempt: int, ended: Ended, *, closed: bool) -> None:
        """
        Raises:
            StorageError: it is not stored; to go on without it would forget the attempt with its job.
        """
        known = self._known.get(attempt)
        if known is None:
            return  # adopted while storage did not answer
        now = self._now()
        kept = replace(ended, cause=ended.cause[:MAX_CAUSE], settled=True)
        self._write(known.model_copy(update={"end": kept, "ended_at": utc(now), "ended_s": now, "closed": closed}))

    def _write(self, record: Record) -> None:
        self._known[record.attempt] = record
        if self.uri is None:
            return
        self._behind.add(record.attempt)
        uri = storage.join(self.uri, self.step, f"{self.identity}-{record.attempt:04d}.json")
        storage.write_json(uri, record.model_dump(mode="json"))
        self._behind.discard(record.attempt)


def refuse_given_up(records: Sequence[Record], run: str, *, now: float) -> None:
    """
    Raises:
        ClusterError: this run gave the step up less than GIVEN_UP_S ago; with the code of what it failed of.
    """
    last = records[-1] if records else None
    if last is None or last.end is None or not last.closed or last.end.decision == "done" or last.run != run:
        return
    left = GIVEN_UP_S - (now - last.ended_s)
    if 0 < left <= GIVEN_UP_S:
        error = ClusterError(
            "this run gave the step up a moment ago",
            where=f"{last.step}, attempt {last.attempt}",
            got=last.end.cause,
            do=f"mend the cause, then start it again: qwenvl runs retry in {left:.0f} s, or qwenvl job watch now",
        )
        error.code = last.end.code if last.end.code > 0 else error.code
        raise error


def _record(uri: str) -> Record | None:
    """One record; None for what this version cannot read, which must not keep a step from running."""
    try:
        return Record.model_validate_json(storage.read_bytes(uri))
    except (ValidationError, FileNotFoundError):
        return None


def series(records: Sequence[Record]) -> list[Record]:
    """The attempts that count: those after the last that closed the step's history."""
    last = max((index for index, one in enumerate(records) if one.closed), default=-1)
    return list(records[last + 1 :])

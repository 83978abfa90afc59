"""What became of a step's attempts, in storage: a launcher that is lost, and jobs that are removed, take no history
with them.

    OUT/launches/STEP/IDENTITY-0001-1.json     written when attempt 1 has been created
    OUT/launches/STEP/IDENTITY-0001-2.json     when it has ended; of several the highest number counts

None is overwritten: a write that was given up, and that a server takes late, must not replace a newer record. One
writer: the launcher that owns the job. An attempt is counted from what stands here first, from the jobs that are
still there second. A launcher that gives a step up closes its history: whoever starts the step again begins to count
anew, but never takes a number twice.
"""

from __future__ import annotations

import contextlib
import itertools
import re
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
        self._numbers: dict[int, int] = {}
        """The highest number of an attempt's records in storage."""

    def read(self) -> list[Record]:
        """All of them, by attempt.

        Raises:
            StorageError: they cannot be had; to go on without them would count from one again.
        """
        if self.uri is not None:
            folder = storage.join(self.uri, self.step)
            named = {key: name for name in storage.list_dir(folder) if (key := self._attempt_and_number(name))}
            order = sorted(named)
            contents = storage.read_each([storage.join(folder, named[key]) for key in order])
            for (attempt, number), content in zip(order, contents, strict=True):
                self._numbers[attempt] = number
                if (record := _record(content)) is not None:
                    self._known[attempt] = record
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
        content = storage.json_bytes(record.model_dump(mode="json"))
        for number in itertools.count(self._numbers.get(record.attempt, 0) + 1):
            name = f"{self.identity}-{record.attempt:04d}-{number}.json"
            with contextlib.suppress(FileExistsError):  # an earlier write, given up and taken late
                storage.create_once(storage.join(self.uri, self.step, name), content)
                self._numbers[record.attempt] = number
                break
        self._behind.discard(record.attempt)

    def _attempt_and_number(self, name: str) -> tuple[int, int] | None:
        """Of an object's name; older records have no number."""
        match = re.fullmatch(rf"{re.escape(self.identity)}-(\d+)(?:-(\d+))?\.json", name)
        return (int(match[1]), int(match[2] or 0)) if match else None


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


def _record(content: bytes | None) -> Record | None:
    """None for what this version cannot read, which must not keep a step from running."""
    if content is None:
        return None
    try:
        return Record.model_validate_json(content)
    except ValidationError:
        return None


def series(records: Sequence[Record]) -> list[Record]:
    """The attempts that count: those after the last that closed the step's history."""
    last = max((index for index, one in enumerate(records) if one.closed), default=-1)
    return list(records[last + 1 :])

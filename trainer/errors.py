"""Every error the system raises on purpose, and the exit code each one ends a process with.

    QwenVLError
    ├── UsageError             2    wrong arguments
    │   └── RecipeError        2    the recipe or an override; lists every problem
    ├── DataError             64    a source file, a sample, a placeholder without its media
    │   ├── MediaError        65    an image or video that cannot be read, or is not what its digest says
    │   ├── ShardError        66    a shard, index or column file whose bytes or columns are not what was written
    │   └── PlanError         67    nothing fits the packing length, counts differ from the plan's
    ├── CheckpointError       68    a checkpoint that is incomplete, damaged or of another format
    │   └── StageMismatch     69    the stored stage differs from the one asked for, or its parent changed
    ├── ModelError            70    missing, extra or wrong-shaped weights, unknown family
    ├── NumericsError         71    a loss or gradient that is not finite
    │   ├── FreezeError       72    a frozen parameter changed, or a trained group did not move
    │   └── CountMismatch     73    target tokens encoded differ from the plan's
    ├── OutputInUse           74    another run lives in the same output
    ├── ClusterError          75    the cluster refused an object, or has no such node pool
    ├── Preempted            143    stopped from outside after a commit
    ├── PeerLost             144    another rank or node went away
    ├── Hang                 145    no progress within the phase's limit
    ├── StorageError         146    storage did not answer after all retries; a disk is full, a file cannot be written
    └── OutOfMemory          147    host or device memory ran out

What a code means to whoever started the process is one table, `MEANING`, read by trainer/launch.py and k8s/launcher.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Literal

DONE = 0
UNKNOWN = 1


class QwenVLError(Exception):
    """What happened, where, what was expected, what was found and what to do about it, in one message.

    `where` is a path, field, step, rank or sample id; parts that do not apply are left out.
    """

    code = UNKNOWN
    sample_id: str | None = None
    """source/id of the sample that the loader was at, if it was at one."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        do: str | None = None,
    ):
        self.what, self.where, self.expected, self.got, self.do = what, where, expected, got, do
        parts = [what]
        parts += [
            f"  {name}: {value}"
            for name, value in (("where", where), ("expected", expected), ("got", got), ("do", do))
            if value is not None
        ]
        super().__init__("\n".join(parts))


class UsageError(QwenVLError):
    code = 2


class RecipeError(UsageError):
    """Every problem of a recipe (or of another file that `subject` names) at once, as (field path, message) pairs."""

    def __init__(self, problems: list[tuple[str, str]], *, where: object = None, subject: str = "the recipe"):
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = [f"    {path}: {message}" if path else f"    {message}" for path, message in problems]
        super().__init__("\n".join([f"{subject} has {count}", *lines]), where=where)


class DataError(QwenVLError):
    code = 64


class MediaError(DataError):
    code = 65


class ShardError(DataError):
    code = 66


class PlanError(DataError):
    code = 67


class CheckpointError(QwenVLError):
    code = 68


class StageMismatch(CheckpointError):
    code = 69


class ModelError(QwenVLError):
    code = 70


class NumericsError(QwenVLError):
    code = 71


class FreezeError(NumericsError):
    code = 72


class CountMismatch(NumericsError):
    code = 73


class OutputInUse(QwenVLError):
    code = 74


class ClusterError(QwenVLError):
    code = 75


class Preempted(QwenVLError):
    code = 143


class PeerLost(QwenVLError):
    code = 144


class Hang(QwenVLError):
    code = 145


class StorageError(QwenVLError):
    code = 146


def of_system(error: OSError) -> StorageError:
    """What the operating system refused, as a process's edge tells it."""
    where = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    got = error.strerror or f"{type(error).__name__}: {error}"
    return StorageError("a file could not be read or written", where=where or None, got=got, do=remedy(error))


FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def remedy(error: OSError) -> str | None:
    """What a person does about it."""
    if error.errno in FULL:
        return "free space (TMPDIR names the folder of temporary files), and repeat the command"
    if error.errno in REFUSED:
        return "name a folder that can be written, or change its permissions"
    return "name a file or folder that is there and can be used" if error.filename is not None else None


class OutOfMemory(QwenVLError):
    code = 147


Decision = Literal["done", "permanent", "preempted", "retry", "retry-once"]


def meaning(code: int) -> Decision:
    """What one process's exit code asks of whoever started it."""
    if code == DONE:
        return "done"
    if code == UsageError.code or 64 <= code <= 79:
        return "permanent"
    if code == Preempted.code:
        return "preempted"
    if code in (PeerLost.code, Hang.code):
        return "retry"
    if code == OutOfMemory.code:
        return "retry-once"
    if code >= 128 or code < 0:  # killed by a signal: 128 + n from a shell, -n from subprocess
        return "retry"
    return "retry-once"  # 1 and everything undefined: permanent if the same error returns at the same step


def decide(codes: Iterable[int]) -> Decision:
    """The decision over all ranks: any permanent code wins, then preemption, then retry.

    PeerLost and Hang are consequences, so they never hide another rank's code; a code that allows a
    single retry wins over one that allows several.
    """
    seen = {meaning(code) for code in codes}
    for verdict in ("permanent", "preempted", "retry-once", "retry"):
        if verdict in seen:
            return verdict
    return "done"


def first_cause(codes: dict[int, int]) -> tuple[int, int]:
    """(rank, code) of the rank whose code explains the failure; (-1, 0) when all ended well.

    A rank that only lost its peer (144, 145, or killed by a signal) is named only if no rank says more.
    """
    if not any(codes.values()):
        return -1, DONE
    rank = {"permanent": 0, "preempted": 1, "retry-once": 2, "retry": 3, "done": 4}
    consequence = {PeerLost.code, Hang.code}
    order = sorted(codes, key=lambda r: (rank[meaning(codes[r])], codes[r] in consequence, codes[r] < 0, r))
    return order[0], codes[order[0]]

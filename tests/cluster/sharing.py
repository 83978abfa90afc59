"""One cluster for all test processes of a session, and the tests that must have it to themselves.

Tests run side by side in several processes (pytest -n). Who needs the cluster first starts it; what it is, is written
down for the others; the process that started the session removes it. A test marked `alone` disturbs nodes or programs
that others use: it waits until none of them runs, and they wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import place
from trainer.errors import UsageError

SESSION = "QWENVL_TEST_SESSION"
STARTING = place.HOME / f".tests{place.WHICH}"
USING = place.HOME / f".using{place.WHICH}"
SHARED = place.RUN / "session.json"


@dataclass(frozen=True)
class Shared:
    """What the processes of a session have in common."""

    session: str
    image: str
    """Digest of what pods run: edits of the checkout during a session concern none of its tests."""
    kept: bool
    """Up before the session, and to stay."""


def begin() -> None:
    """In the process that pytest was started as; those that it starts inherit the environment."""
    os.environ[SESSION] = uuid.uuid4().hex


def shared(start: Callable[[str], Shared]) -> Shared:
    """This session's cluster; `start` is called by the first process that asks, with the session's name.

    Raises:
        UsageError: the session has no name, so that nobody would remove the cluster.
    """
    session = os.environ.get(SESSION)
    if session is None:
        raise UsageError(
            "nobody would remove the cluster", do="name tests/cluster to pytest, as make test-cluster does"
        )
    with locked(STARTING):
        found = _read()
        if found is None or found.session != session:
            found = start(session)
            SHARED.write_text(json.dumps(asdict(found)))
        return found


def to_remove() -> bool:
    """Whether this session started the cluster."""
    found = _read()
    return found is not None and found.session == os.environ.get(SESSION) and not found.kept


def _read() -> Shared | None:
    try:
        return Shared(**json.loads(SHARED.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def using(*, alone: bool) -> Iterator[None]:
    """The cluster, beside others or alone."""
    with locked(USING, exclusive=alone):
        yield


@contextlib.contextmanager
def locked(path: Path, *, exclusive: bool = True) -> Iterator[None]:
    """Waits; gone with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield

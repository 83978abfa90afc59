"""What the cluster shows of one step, kept up to date by watches: a list, then changes as they come.

    mirror = Mirror(api, JOBS, step labels, job names)    three threads: jobs, pods, events of the namespace
    mirror.jobs(), mirror.pods(job)                       the newest that is known
    mirror.events()                                       what has not been said yet
    mirror.wait(seconds)                                  until something changes

A quiet job costs a watch renewed every WATCH_S for each of the three, with a call before it, and nothing else: polling
would cost a call for every look. A watch that breaks off goes on from the version that was seen last; one that is too
old (410) lists again, and so does one of a server that has gone back behind what we saw (etcd was restored from a
backup): it would send nothing until it gets there again. Of events only those about our own objects are listed, a
bounded number: a namespace has 10,000 of them, and the API selects those of one object. An API server that does not
answer is waited for: the job goes on without it. What it forbids is raised by wait().
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from k8s.client import EVENTS, PODS, Api, Gone, Json, Kind, Unreachable
from trainer.errors import ClusterError

AGAIN_S = 1.0
MAX_SILENT_S = 5.0
"""Between two tries while the API server does not answer."""
MAX_SHORT_S = 20.0
"""Between two watches that the server ends within SHORT_S without a change."""
SHORT_S = 30.0
READY_S = 180.0
QUEUE = "kueue.x-k8s.io/queue-name"
RULES_S = 60.0
MAX_EVENTS = 200
MAX_ASKED, MAX_EACH = 20, 50
"""Of how many objects events of before are asked for, and how many of each."""
WORKLOADS = 500


@dataclass(frozen=True)
class Event:
    """Something that a part of Kubernetes said about one of our objects."""

    kind: str
    name: str
    reason: str
    message: str
    warning: bool
    version: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}: {self.message}"


class View(Protocol):
    """What the launcher's loop looks at."""

    def jobs(self) -> list[Json]: ...

    def pods(self) -> list[Json]: ...

    def events(self) -> list[Event]:
        """All that are known, oldest first."""
        ...

    def note(self, kind: Kind, found: Json) -> None:
        """What a call of ours returned: a watch may show it later."""
        ...

    def wait(self, seconds: float) -> None: ...

    def silent_since(self) -> float | None:
        """Since when the API server has not answered, on the clock; None while it does."""
        ...

    def close(self) -> None: ...


class Mirror:
    """View over the real API. `about(name)` says whether an event's object is one of ours."""

    def __init__(
        self,
        api: Api,
        kind: Kind,
        labels: Mapping[str, str],
        about: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._api, self._kind, self._about, self._clock = api, kind, about, clock
        self._changed = threading.Condition()
        self._changes = 0
        self._found: dict[Kind, dict[str, Json]] = {kind: {}, PODS: {}}
        self._events: dict[tuple[str, str, str], Event] = {}
        self._deleted: set[str] = set()
        """Uids of jobs: what a call of ours returned may be older than their deletion."""
        self._ready: set[Kind] = set()
        self._silent: dict[Kind, float] = {}
        self._error: ClusterError | None = None
        self._trouble = ""
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, args=(one, selected), name=f"watch-{one.plural}", daemon=True)
            for one, selected in ((kind, labels), (PODS, labels), (EVENTS, {}))
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------ View

    def jobs(self) -> list[Json]:
        with self._changed:
            return list(self._found[self._kind].values())

    def pods(self) -> list[Json]:
        with self._changed:
            return list(self._found[PODS].values())

    def events(self) -> list[Event]:
        with self._changed:
            return list(self._events.values())

    def note(self, kind: Kind, found: Json) -> None:
        with self._changed:
            if found["metadata"]["uid"] in self._deleted:
                return
        self._put(kind, found)

    def wait(self, seconds: float) -> None:
        """Raises ClusterError: the API server forbids what the launcher needs."""
        with self._changed:
            before = self._changes
            self._changed.wait_for(lambda: self._changes != before or self._error, seconds)
            if self._error:
                raise self._error

    def ready(self, seconds: float = READY_S) -> Mirror:
        """Wait for the first lists."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) == len(self._threads) or self._error, seconds)
            if self._error:
                raise self._error
            if len(self._ready) < len(self._threads):
                got = self._trouble or f"{seconds:.0f} s of silence"
                raise Unreachable("the API server did not answer", where="first lists", got=got)
        return self

    def silent_since(self) -> float | None:
        with self._changed:
            return min(self._silent.values(), default=None)

    def close(self) -> None:
        """Threads that wait for the server end when it lets their watch end."""
        self._stop.set()

    # ------------------------------------------------------------ threads

    def _follow(self, kind: Kind, labels: Mapping[str, str]) -> None:
        """List and watch until closed; whatever happens is waited for, but for what is forbidden."""
        version, pause = "", AGAIN_S
        while not self._stop.is_set():
            began, before, longest = self._clock(), self._changes, MAX_SHORT_S
            try:
                back = bool(version) and self._went_back(kind, version)
                if back or not version:
                    version = self._list(kind, labels, anew=back)
                news = self._api.watch(kind, labels, version)
                self._heard(kind)
                for what, found in news:
                    if self._stop.is_set():
                        return
                    version = found["metadata"].get("resourceVersion", version)
                    self._take(kind, what, found)
            except Gone:
                version = ""
            except ClusterError as error:
                longest = MAX_SILENT_S
                if not self._may_pass(kind, error):
                    return
            except Exception as error:  # Disconnected, Unreachable, half an answer: a thread that ends sees no more
                longest = MAX_SILENT_S
                with self._changed:
                    self._trouble = str(error) or repr(error)
                    self._silent.setdefault(kind, self._clock())
            if self._clock() - began >= SHORT_S or self._changes != before:
                pause = AGAIN_S
            self._stop.wait(min(pause, longest))
            pause = min(pause * 2, longest)

    def _may_pass(self, kind: Kind, error: ClusterError) -> bool:
        """A server that has just started may forbid what it allowed before, until it knows its rules again."""
        with self._changed:
            self._trouble = str(error)
            since = self._silent.setdefault(kind, self._clock())
            if kind in self._ready and self._clock() - since <= RULES_S:
                return True
            self._error = error
            self._changed.notify_all()
            return False

    def _heard(self, kind: Kind) -> None:
        with self._changed:
            self._silent.pop(kind, None)

    def _went_back(self, kind: Kind, version: str) -> bool:
        """Whether the server knows less than we: then what we know is of a life that it has forgotten. Asked before a
        watch is renewed, which ends when a server or its store starts again."""
        _, now = self._api.snapshot(kind, {}, most=0)
        return bool(now) and _number(now) < _number(version)

    def _events_of_before(self) -> tuple[list[Json], str]:
        """About what is there: our jobs, the pods that do not run yet, and what a queue says of the jobs."""
        _, version = self._api.snapshot(EVENTS, {}, most=0)
        with self._changed:
            self._changed.wait_for(lambda: {self._kind, PODS} <= self._ready or self._stop.is_set(), READY_S)
            jobs, pods = (list(self._found[kind].values()) for kind in (self._kind, PODS))
        waiting = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
        found: list[Json] = []
        for one in [*reversed(jobs), *waiting][:MAX_ASKED]:
            about = {"involvedObject.name": one["metadata"]["name"]}
            found += self._api.snapshot(EVENTS, {}, about, MAX_EACH)[0]
        if any(QUEUE in job["metadata"].get("labels", {}) for job in jobs):
            found += self._api.snapshot(EVENTS, {}, {"involvedObject.kind": "Workload"}, WORKLOADS)[0]
        return sorted(found, key=_version), version

    def _list(self, kind: Kind, labels: Mapping[str, str], *, anew: bool) -> str:
        """Take everything; the version that it is of. `anew`: versions known so far are of another life and say nothing
        about which is newer."""
        found, version = self._events_of_before() if kind == EVENTS else self._api.snapshot(kind, labels)
        with self._changed:
            if anew and kind != EVENTS:
                self._found[kind] = {one["metadata"]["name"]: one for one in found}
                if kind == self._kind:
                    self._deleted.clear()  # they may be there again
            elif kind != EVENTS:
                kept = {one["metadata"]["name"] for one in found}
                for name, one in list(self._found[kind].items()):
                    # What a call of ours returned after the list was made is newer than the list.
                    if name not in kept and _number(version) >= _version(one):
                        del self._found[kind][name]
            self._ready.add(kind)
            self._silent.pop(kind, None)
            self._tell()
        for one in found:
            self._take(kind, "ADDED", one)
        return version

    def _take(self, kind: Kind, what: str, found: Json) -> None:
        if what == "BOOKMARK":
            return
        if kind == EVENTS:
            if what != "DELETED":
                self._add_event(found)
        elif what == "DELETED":
            self._drop(kind, found)
        else:
            self._put(kind, found)

    def _put(self, kind: Kind, found: Json) -> None:
        name = found["metadata"]["name"]
        with self._changed:
            known = self._found[kind].get(name)
            if known is None or _version(found) >= _version(known):
                self._found[kind][name] = found
                self._tell()

    def _drop(self, kind: Kind, found: Json) -> None:
        name = found["metadata"]["name"]
        with self._changed:
            if kind == self._kind:
                self._deleted.add(found["metadata"]["uid"])
            known = self._found[kind].get(name)
            if known is not None and known["metadata"]["uid"] == found["metadata"]["uid"]:
                del self._found[kind][name]
                self._tell()

    def _add_event(self, found: Json) -> None:
        event = event_of(found)
        if not self._about(event.name):
            return
        with self._changed:
            key = (event.name, event.reason, event.message)
            self._events.pop(key, None)  # said again: it moves to the end
            self._events[key] = event
            while len(self._events) > MAX_EVENTS:
                del self._events[next(iter(self._events))]
            self._tell()

    def _tell(self) -> None:
        """With the lock held."""
        self._changes += 1
        self._changed.notify_all()


def event_of(found: Json) -> Event:
    about = found.get("involvedObject", {})
    return Event(
        kind=about.get("kind", ""),
        name=about.get("name", ""),
        reason=found.get("reason", ""),
        message=" ".join((found.get("message") or "").split()),
        warning=found.get("type") == "Warning",
        version=_version(found),
    )


def _version(found: Json) -> int:
    return _number(found["metadata"].get("resourceVersion", ""))


def _number(version: str) -> int:
    """Versions of one server are ordered numbers (Kubernetes 1.35 says so; etcd's always were); others count as new."""
    with contextlib.suppress(ValueError):
        return int(version)
    return 1 << 62

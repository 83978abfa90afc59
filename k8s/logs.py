"""Rank 0's log, line by line, as long as its container runs: reconnects, and says every line once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from k8s.client import Api, Unreachable
from trainer.errors import ClusterError

AGAIN_S = 5.0


class Follower:
    """A thread that prints what one container writes. It never ends or delays the launcher: a log that cannot be had
    is said once and tried again."""

    def __init__(self, api: Api, pod: str, container: str, say: Callable[[str], None]):
        self._api, self._pod, self._container, self._say = api, pod, container, say
        self._stop = threading.Event()
        self._last = ""
        self._at_last = 0
        self._thread = threading.Thread(target=self._run, name=f"log-{pod}", daemon=True)

    def start(self) -> Follower:
        self._thread.start()
        return self

    def stop(self, patience_s: float = 5.0) -> None:
        """Let it read what is left, at most so long."""
        self._stop.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        told = ""
        while True:
            last_round = self._stop.is_set()
            try:
                self.follow_once()
            except Exception as error:  # whatever a log stream does must not end the launcher
                known = isinstance(error, ClusterError | Unreachable)
                text = f"(log of {self._pod} not to be had: {error.args[0].splitlines()[0] if known else error!r})"
                if text != told and not last_round:
                    told = text
                    self._say(text)
            if last_round or self._stop.wait(AGAIN_S):
                return

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

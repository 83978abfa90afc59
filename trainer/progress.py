"""Progress of long work: what it does, how far it is, how long it will take. Plain lines when there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

EVERY_S = 5.0
TERMINAL_EVERY_S = 0.2


class Progress:
    """One line that is renewed on a terminal, a line every few seconds elsewhere; the last call always shows.

    Args:
        what: the work, as "init: language model".
        total: units of work.
        unit: their name in the plural.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.began = clock()
        self.shown = self.began
        self.first = 0

    def skipped(self, done: int) -> None:
        """Work that an earlier attempt did: it takes no part in the estimate."""
        self.first = done

    def at(self, done: int, note: str = "") -> None:
        """`done` units are behind us."""
        now = self.clock()
        last = done >= self.total
        if not last and now - self.shown < (TERMINAL_EVERY_S if self.terminal else EVERY_S):
            return
        self.shown = now
        line = f"{self.what}  {done}/{self.total} {self.unit}"
        line += f"  {note}" if note else ""
        line += f"  {now - self.began:.0f} s"
        if not last and done > self.first:
            left_s = (now - self.began) / (done - self.first) * (self.total - done)
            line += f", {left_s:.0f} s left"
        end = "\n" if last or not self.terminal else ""
        print(f"\r\x1b[K{line}" if self.terminal else line, end=end, file=self.stream, flush=True)

"""What a person sees of a run: which step of how many, how long it takes, how long it will take.

    12:03:11 [ 4/24] stage1
    12:03:25         step 20/150  loss 3.91  2.4 steps/s          (the step's own lines)
    12:04:17 [ 4/24] stage1: done in 1 min 6 s; 2 min 40 s so far, about 6 min left

On a terminal a last line that counts up stands below; without one there are only the plain lines above.

The remainder is estimated from shares: every step has an expected cost from the recipe (tokens trained, answers made,
...), of which only what the output still lacks is counted (left.py); the pace is what this run has shown so far, and
what stages took that an earlier one finished. To that come the starts of the processes of all steps that are to come,
and what steps take that find their work done: both as this run's were so far.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TextIO

from pipelines.left import Left
from pipelines.session import DONE, FAILED, MARK, STOPPED, Mark
from trainer.recipe import Recipe

KFP_INDENT = "    "
KFP_ERROR = re.compile(r"\d\d:\d\d:\d\d\.\d{3} - ERROR - ")
"""How a line of kfp.local's log begins."""
SHELL_NOISE = re.compile(r"^\[KFP Executor ")
START_S = 8.0
"""Of a stage, before its first step, also of one that goes on."""


def expected_s(recipe: Recipe, share: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
    """Step -> seconds that it takes with the recipe `tiny` on two cores, scaled by what it has to do: of a step's work
    the `share` that is left, by default all of it.

    The constants were measured once (pipelines/README.md); only their proportions matter, the pace is measured anew.
    """
    found = {
        "prepare-data": 20.0,
        "export": 3.0,
        "report": 3.0,
        "init": 3.0,
        "evaluate": 4.0 + 0.2 * recipe.evaluate.samples,
    }
    if (pretrain := recipe.model.pretrain) is not None:
        found["init"] += 0.08 * pretrain.llm_steps + 0.12 * pretrain.vision_steps
    for name, stage in recipe.stages.named().items():
        found[f"prepare-{name}"] = 2.0
        tokens = (
            stage.schedule.tokens or (stage.schedule.steps or 60) * stage.schedule.packs_per_step * stage.packing.length
        )
        found[name] = START_S + tokens * 3.5e-4 * (2.0 if name == "dpo" else 1.0)
        if (sampling := stage.sampling) is not None:
            found[f"prepare-{name}-requests"] = 1.0
            found[f"prepare-{name}-answers"] = (
                3.0 + 0.0015 * sampling.requests * sampling.answers * sampling.max_new_tokens
            )
            found[f"prepare-{name}-select"] = 1.5
    for name in found.keys() & share.keys():
        start = START_S if name in recipe.stages.named() and share[name] else 0.0
        found[name] = start + (found[name] - start) * share[name]
    return found


class Progress:
    """Counts steps, prints their lines, estimates the remainder."""

    def __init__(
        self, recipe: Recipe, out: TextIO, *, left: Left | None = None, clock: Callable[[], float] = time.monotonic
    ):
        left, whole = left or Left(), expected_s(recipe)
        self.expected = expected_s(recipe, left.share)
        self.known_s = sum(left.took_s.values())
        self.known_cost = sum(whole[step] for step in left.took_s)
        self.out, self.clock, self.began = out, clock, clock()
        self.ended: dict[str, str] = {}
        self.spent_s: dict[str, float] = {}
        self.starts_s: list[float] = []
        """From the end of one step to the begin of the next."""
        self.last_end: float | None = None
        self.current: str | None = None
        self.lost: str | None = None
        self.current_began = self.began
        self.live = out.isatty()
        self.lock = threading.RLock()
        self._closed = threading.Event()
        if self.live:
            threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def begin(self, step: str) -> None:
        self.lost = self.lost or self.current  # killed before it could say how it ended
        self.current, self.current_began = step, self.clock()
        if step in self.expected:
            if self.last_end is not None:
                self.starts_s.append(self.current_began - self.last_end)
            self.line(f"{self._place()} {step}")

    def end(self, mark: Mark) -> None:
        place, step = self._place(), mark.step
        self.ended[step], self.spent_s[step], self.current = mark.state, self.clock() - self.current_began, None
        if step not in self.expected:
            return
        self.last_end = self.clock()
        took = f" in {told_s(mark.seconds)}" if mark.state in (DONE, FAILED, STOPPED) else ""
        self.line(f"{place} {step}: {mark.state}{took}; {told_s(self.clock() - self.began)} so far{self._remainder()}")

    def say(self, text: str) -> None:
        """One line of the running step."""
        self.line(f"{'':{len(self._place())}} {text}")

    def line(self, text: str) -> None:
        with self.lock:
            self._wipe()
            print(time.strftime("%H:%M:%S"), text, file=self.out, flush=True)

    def close(self) -> None:
        self._closed.set()
        with self.lock:
            self._wipe()

    def left_s(self) -> float | None:
        """Seconds that the rest will take; None as long as nothing has shown the pace."""
        done = [step for step, state in self.ended.items() if state == DONE and self.expected.get(step)]
        cost = self.known_cost + sum(self.expected[step] for step in done)
        if cost < 1:
            return None
        pace = (self.known_s + sum(self.spent_s[step] for step in done)) / cost
        skipped = _mean([self.spent_s[step] for step in self.ended.keys() & self.expected.keys() - set(done)])
        rest = {step: cost * pace or skipped for step, cost in self.expected.items() if step not in self.ended}
        begun = self.current in rest
        starts = _mean(self.starts_s) * (len(rest) - begun)
        if self.current is not None and begun:
            rest[self.current] = max(rest[self.current] - (self.clock() - self.current_began), 0.0)
        return sum(rest.values()) + starts

    def _place(self) -> str:
        total = len(self.expected)
        number = sum(step in self.expected for step in self.ended) + 1
        return f"[{min(number, total):{len(str(total))}}/{total}]"

    def _remainder(self) -> str:
        left = self.left_s()
        return (
            ""
            if left is None or len(self.ended.keys() & self.expected.keys()) == len(self.expected)
            else f", about {told_s(left)} left"
        )

    def _tick(self) -> None:
        while not self._closed.wait(1):
            with self.lock:
                if self.current in self.expected:
                    self._wipe()
                    now = f"{self.current} {told_s(self.clock() - self.current_began)}"
                    print(f"{self._place()} {now}{self._remainder()}", end="", file=self.out, flush=True)

    def _wipe(self) -> None:
        if self.live:
            print("\r\033[2K", end="", file=self.out)


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


class Relay:
    """Takes the place of sys.stdout while kfp.local runs: lets a step's own lines through and keeps kfp's back.

    kfp prints what a step's process prints, indented; a step marks its first and its last line. What lies outside is
    kfp's own, kept only to be shown when a step dies before it could say anything.
    """

    encoding = "utf-8"

    def __init__(self, progress: Progress):
        self.progress = progress
        self.inside = False
        self.kept: list[str] = []
        self._partial = ""

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return False

    def _line(self, line: str) -> None:
        line = line.removeprefix(KFP_INDENT).rstrip("\r")
        at = line.find(MARK)
        if at > 0 and self.inside and line[:at].strip():  # a child's unfinished line before it
            self.progress.say(line[:at])
        mark = Mark.read(line[at:]) if at >= 0 else None
        if mark is not None and mark.event == "begin":
            self.inside, self.kept = True, []
            self.progress.begin(mark.step)
        elif mark is not None:
            self.inside = False
            self.progress.end(mark)
        elif self.inside and not KFP_ERROR.match(line):
            if line.strip():
                self.progress.say(line)
        elif not SHELL_NOISE.match(line):
            self.kept = [*self.kept[-60:], line]


def told_s(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 38 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

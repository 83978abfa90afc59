"""What a rank tells about itself while it lives (Pulse) and when it ends (Ending), and what a node tells storage
(Heartbeat).

    rank   --Pulse-->      RUN_DIR/rank-3.pulse     one fixed-size line in place, a few microseconds
    rank   --Ending-->     RUN_DIR/rank-3.end.json  written at the edge of the process (trainer/edge.py)
    node   --Heartbeat-->  OUT/STAGE/heartbeat/NODE.json, overwritten by trainer/launch.py
    node   --Termination-> the pod's termination message, OUT/STAGE/attempts/NNNN/end-NODE.json

Readers compare sequence and step on their own clock; times written here are for people.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import storage

FORMAT = 1
RUN_DIR = "QWENVL_RUN_DIR"
ATTEMPT = "QWENVL_ATTEMPT"
PULSE_BYTES = 512

Phase = Literal["start", "load", "preflight", "train", "commit", "evaluate", "handover", "end"]

PHASE_LIMIT_S: dict[str, float] = {
    "start": 900,
    "load": 3600,
    "preflight": 900,
    "train": 600,
    "commit": 1800,
    "evaluate": 1800,
    "handover": 3600,
    "end": 600,
}
"""Without progress for so long a rank counts as hung. A recipe's slow steps raise `train` through beat(limit_s=...)."""


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Figures(Record):
    """Of the last step that was logged, for people who watch from elsewhere."""

    num_steps: int
    """Of the whole stage."""
    loss: float
    tokens_per_s: float
    """Of all ranks together."""


class Beat(Record):
    """The newest state of one rank."""

    rank: int
    sequence: int
    """Grows with every beat: a reader sees progress without trusting a clock."""
    step: int = 0
    phase: str = "start"
    phase_limit_s: float = PHASE_LIMIT_S["start"]
    committed_step: int | None = None
    """Last step committed in this attempt."""
    figures: Figures | None = None


class Ending(Record):
    """How one rank ended."""

    rank: int
    code: int
    error: str = ""
    """The error as it was written for people; empty when all went well."""
    kind: str = ""
    """Class of the error."""
    phase: str = ""
    step: int = 0
    committed_step: int | None = None
    time: str = ""


class Heartbeat(Record):
    """One node, as written to storage."""

    format: Literal[1] = FORMAT
    node: str
    attempt: int
    sequence: int
    """Grows with every heartbeat: the node lives."""
    beats: int | None = None
    """Of all its ranks: grows with whatever they get done."""
    step: int
    """Of the slowest rank of the node."""
    phase: str
    phase_limit_s: float
    committed_step: int | None = None
    figures: Figures | None = None
    ranks_alive: tuple[int, ...] = ()
    written_at: str = ""


class Termination(Record):
    """The first cause on one node: what the launcher on the cluster reads."""

    format: Literal[1] = FORMAT
    code: int
    decision: str
    rank: int
    phase: str = ""
    step: int = 0
    committed_step: int | None = None
    error: str = ""
    codes: dict[int, int] = {}
    attempt: int = 1
    node: str = ""
    time: str = ""


def utc(now: float | None = None) -> str:
    """2026-11-22T05:54:00Z"""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


# ---------------------------------------------------------------- rank side


class Pulse:
    """Where this rank stands. Without a run directory (a test, a debugger) it keeps the state and writes nothing.

    The line has a fixed size and is written in one call, so that a reader never sees half of it; JSON padded with
    blanks.
    """

    def __init__(self, run_dir: str | None, rank: int, *, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.state = Beat(rank=rank, sequence=0)
        self.changed_at = clock()
        self._file: int | None = None
        if run_dir:
            self._file = os.open(pulse_path(run_dir, rank), os.O_RDWR | os.O_CREAT, 0o644)
        self._write()

    def beat(
        self,
        *,
        step: int | None = None,
        phase: str | None = None,
        limit_s: float | None = None,
        committed_step: int | None = None,
        figures: Figures | None = None,
    ) -> None:
        """Say that something got done. What is not given stays as it was; a new phase brings its own limit."""
        change: dict[str, Any] = {"sequence": self.state.sequence + 1}
        if step is not None:
            change["step"] = step
        if phase is not None and phase != self.state.phase:
            change |= {"phase": phase, "phase_limit_s": PHASE_LIMIT_S.get(phase, PHASE_LIMIT_S["train"])}
        if limit_s is not None:
            change["phase_limit_s"] = limit_s
        if committed_step is not None:
            change["committed_step"] = committed_step
        if figures is not None and math.isfinite(figures.loss) and math.isfinite(figures.tokens_per_s):
            change["figures"] = figures
        self.state = self.state.model_copy(update=change)
        self.changed_at = self.clock()
        self._write()

    def overdue_s(self) -> float:
        """Seconds beyond the phase's limit; below 0 while there is time left."""
        return self.clock() - self.changed_at - self.state.phase_limit_s

    def _write(self) -> None:
        if self._file is not None:
            line = json.dumps(self.state.model_dump(mode="json"), separators=(",", ":")).encode()
            assert len(line) < PULSE_BYTES
            os.pwrite(self._file, line.ljust(PULSE_BYTES - 1) + b"\n", 0)


_PULSE: Pulse | None = None


def pulse() -> Pulse:
    """This process's pulse; made at first use from RANK and QWENVL_RUN_DIR."""
    global _PULSE  # noqa: PLW0603 - one pulse a process
    if _PULSE is None:
        _PULSE = Pulse(os.environ.get(RUN_DIR), int(os.environ.get("RANK", "0")))
    return _PULSE


def write_ending(ending: Ending) -> None:
    """Leave this rank's ending where the launcher finds it; nothing without a run directory."""
    run_dir = os.environ.get(RUN_DIR)
    if not run_dir:
        return
    path = ending_path(run_dir, ending.rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(ending.model_dump_json())
    os.replace(temporary, path)


# ---------------------------------------------------------------- node side


def pulse_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir) / f"rank-{rank}.pulse"


def ending_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir) / f"rank-{rank}.end.json"


def read_pulse(run_dir: str, rank: int) -> Beat | None:
    """The rank's newest beat; None before its first."""
    try:
        return Beat.model_validate_json(pulse_path(run_dir, rank).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def read_ending(run_dir: str, rank: int) -> Ending | None:
    """How the rank ended, None when it left no record (killed, or still alive)."""
    try:
        return Ending.model_validate_json(ending_path(run_dir, rank).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def heartbeat_uri(stage_uri: str, node: str) -> str:
    return storage.join(stage_uri, "heartbeat", f"{node}.json")


def write_heartbeat(stage_uri: str, beat: Heartbeat) -> None:
    storage.write_bytes(heartbeat_uri(stage_uri, beat.node), storage.json_bytes(beat.model_dump(mode="json")))


def read_heartbeats(stage_uri: str, *, without: Container[str] = ()) -> dict[str, Heartbeat]:
    """Heartbeat of every node that ever wrote one into this stage; of nodes in `without` nothing is read. Two calls to
    storage, however many nodes there are."""
    names = storage.list_dir(storage.join(stage_uri, "heartbeat"))
    nodes = [name[:-5] for name in names if name.endswith(".json") and name[:-5] not in without]
    found = storage.read_each([heartbeat_uri(stage_uri, node) for node in nodes])
    return {
        node: Heartbeat.model_validate_json(content)
        for node, content in zip(nodes, found, strict=True)
        if content is not None
    }

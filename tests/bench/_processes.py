"""What a command takes: wall time, processor time, and the most memory (PSS) that its processes hold together."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.2


@dataclass(frozen=True)
class Taken:
    wall_s: float
    cpu_s: float
    """Of the process and of all below it that it waited for."""
    most_mb: float


def taken_by(command: Sequence[str], *, env: dict[str, str] | None = None) -> Taken:
    """Runs a command, its output thrown away but for errors. Raises RuntimeError when it fails."""
    began, before = time.perf_counter(), _cpu_s()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    most = 0.0
    while process.poll() is None:
        most = max(most, sum(map(_pss_mb, _tree(process.pid))))
        time.sleep(SAMPLE_S)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} ended with {process.returncode}")
    return Taken(time.perf_counter() - began, _cpu_s() - before, most)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for thread in _listed(f"/proc/{parent}/task"):
            found += map(int, _read(f"/proc/{parent}/task/{thread}/children").split())
    return found


def _pss_mb(pid: int) -> float:
    lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:  # it ended meanwhile
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

"""Memory of this process, from Linux's /proc. getrusage's maximum also counts the process that it was forked from."""

from __future__ import annotations

from pathlib import Path


def resident_kb() -> int:
    return _field("VmRSS")


def peak_kb() -> int:
    """The highest since the program began."""
    return _field("VmHWM")


def _field(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

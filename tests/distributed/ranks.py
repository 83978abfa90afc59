"""Starting ranks: real processes with torchrun's variables, no torch imported here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HANG_S = 400.0
"""Bounds a hang, and expects nothing: ranks that end, well or badly, end the wait. Ten times what all of
tests/distributed takes."""


def launch(module: str, arguments: Sequence[str], *, world_size: int, logs: Path, hang_s: float = HANG_S) -> None:
    """`python -m module arguments` as so many ranks on this machine; fails with their last lines, as soon as one of
    them has failed: the others would wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    ranks = []
    for rank in range(world_size):
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (logs / f"{world_size}-{rank}.log").open("w")
        command = [sys.executable, "-m", module, *arguments]
        ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + hang_s
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = [f"exit codes {codes}, None where the end came from here"]
    told += ((logs / f"{world_size}-{rank}.log").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, "\n".join(told)

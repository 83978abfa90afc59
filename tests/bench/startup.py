"""What a program of the trainer costs to start: imported anew, and forked from the warm server."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainer import warm


def figures(quick: bool) -> dict[str, float]:
    rounds = 1 if quick else 3
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    statement = "from trainer.step.imports import import_large; import_large()"
    cold_s = min(_timed([sys.executable, "-c", statement], environment) for _ in range(rounds))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "socket")
        server = subprocess.Popen([sys.executable, "-m", "trainer.warm", path], env=environment)
        try:
            while not Path(path).exists():
                time.sleep(0.01)
            os.environ[warm.VARIABLE] = path
            times = []
            for _ in range(rounds + 1):  # the first one waits for the server's imports
                began = time.monotonic()
                if (code := warm.start("tests.bench.nothing.program", [], env=environment).wait()) != 0:
                    raise RuntimeError(f"a fork ended with {code}")
                times.append(time.monotonic() - began)
        finally:
            os.environ.pop(warm.VARIABLE, None)
            server.kill()
            server.wait()
    warm_s = min(times[1:])
    return {"cold_s": cold_s, "forked_s": warm_s, "cold_over_forked": cold_s / warm_s}


def _timed(command: list[str], environment: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    return time.monotonic() - began

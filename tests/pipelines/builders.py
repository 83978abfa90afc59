"""A run of the pipeline whose steps are substitutes of milliseconds (substitutes/sitecustomize.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import processes

SUBSTITUTES = Path(__file__).parent / "substitutes"
REPORT = """
import json, pathlib
stage = {"name": "stage1", "freeze": {"vision": "trained", "merger": "trained", "llm": "frozen"}, "packing_length": 512,
         "steps": 3, "tokens": 1000, "fill": 0.9, "loss_first": 2.0, "loss_last": 1.0, "wall_s": 1.0}
pathlib.Path(out, "run.json").write_text(json.dumps({"stages": [stage]}))
"""


@dataclass
class ARun:
    """`qwenvl run` in a folder, with what some steps do: {"stage1": "import time; time.sleep(60)"}."""

    folder: Path
    does: dict[str, str] = field(default_factory=dict)
    recipe: str = "tiny_smoke"
    words: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self) -> subprocess.Popen[str]:
        scripts = self.folder / "steps"
        scripts.mkdir(exist_ok=True)
        for step, script in {"report": REPORT, **self.does}.items():
            (scripts / f"{step}.py").write_text(script)
        env = {
            **os.environ,
            "SUBSTITUTE": str(scripts),
            "PYTHONPATH": str(SUBSTITUTES),
            "QWENVL_WARM": "",  # substitutes need no torch
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder),
        }
        command = [sys.executable, "-m", "pipelines.cli.main", "run", self.recipe, "--out", str(self.out), *self.words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def finish(self) -> Ended:
        process = self.start()
        stdout, stderr = process.communicate(timeout=120)
        return Ended(process.returncode, stdout, stderr)

    def wait_for(self, name: str, limit_s: float = 60) -> None:
        assert processes.wait_until((self.out / name).exists, limit_s), f"no {name} after {limit_s} s"


@dataclass
class Ended:
    code: int
    stdout: str
    stderr: str


def sleeper(name: str) -> str:
    """A step that writes OUT/NAME with the pids of itself and a child, and sleeps."""
    return f"""
import json, os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
beside = pathlib.Path(out, ".{name}")
beside.write_text(json.dumps([os.getpid(), child.pid]))
beside.rename(pathlib.Path(out, "{name}"))
time.sleep(300)
"""


def pids(run: ARun, name: str) -> list[int]:
    run.wait_for(name)
    return json.loads((run.out / name).read_text())


def seconds_until_gone(found: list[int], limit_s: float = 15) -> float:
    began = time.monotonic()
    gone = processes.wait_until(lambda: not any(processes.alive(pid) for pid in found), limit_s)
    assert gone, f"still alive after {limit_s} s: {[pid for pid in found if processes.alive(pid)]}"
    return time.monotonic() - began

"""`make verify`: the same recipe and seed give the same bits, also when the run was killed in the middle of stage2.

Three runs of one recipe: two from start to end, one that gets SIGKILL after a commit in the middle of stage2 and is
then started again. The weights that every stage hands over must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainer.recipe import STAGES


def start(recipe: str, out: Path, *words: str) -> subprocess.Popen[str]:
    """`qwenvl run` in a session of its own, its output in OUT.log."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "pipelines.cli.main", "run", recipe, "--out", str(out), *words]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run(recipe: str, out: Path) -> float:
    """Run to the end; seconds it took. Raises with the end of its output when it fails."""
    began = time.monotonic()
    process = start(recipe, out)
    try:
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    if code != 0:
        raise RuntimeError(
            f"run of {recipe} into {out} ended with {code}:\n{out.with_suffix('.log').read_text()[-4000:]}"
        )
    return time.monotonic() - began


def kill_top(top: subprocess.Popen[str]) -> None:
    os.kill(top.pid, signal.SIGKILL)


def kill_in_stage2(
    recipe: str, out: Path, *, kill: Callable[[subprocess.Popen[str]], None] = kill_top, limit_s: float = 600
) -> str:
    """Start a run and SIGKILL its top process once stage2 has committed a checkpoint; the checkpoint's name."""
    process = start(recipe, out)
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        committed = sorted((out / "stage2" / "checkpoints").glob("step-*/manifest.json"))
        if committed:
            kill(process)
            process.wait()
            if (out / "stage2" / "result.json").exists():
                raise RuntimeError("stage2 had ended before the kill: give it more steps")
            return committed[-1].parent.name
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before stage2 committed:\n{out.with_suffix('.log').read_text()[-4000:]}")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise RuntimeError(f"stage2 committed nothing within {limit_s} s")


def weights(out: Path) -> dict[str, str]:
    """sha256 of every weight file that init and the stages handed over, by path below `out`."""
    found = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for stage in ("init", *STAGES, "export")
        for file in sorted((out / stage).rglob("*.safetensors"))
        if "checkpoints" not in file.parts
    }
    if not any(name.startswith("export/") for name in found):
        raise RuntimeError(f"no exported weights in {out}")
    return found


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="tiny_smoke")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qwenvl-verify-") as temporary:
        folder = arguments.out or Path(temporary)
        first, second, killed = (folder / name for name in ("first", "second", "killed"))
        print(f"verify: first run of {arguments.recipe}: {run(arguments.recipe, first):.0f} s", flush=True)
        print(f"verify: second run: {run(arguments.recipe, second):.0f} s", flush=True)
        at = kill_in_stage2(arguments.recipe, killed)
        print(f"verify: third run killed in stage2 after {at}, started again", flush=True)
        print(f"verify: its rest: {run(arguments.recipe, killed):.0f} s", flush=True)
        want = weights(first)
        wrong = {"second": differences(want, weights(second)), "killed": differences(want, weights(killed))}
    for name, files in wrong.items():
        print(f"verify: {name} run: {len(want) - len(files)} of {len(want)} weight files bit-equal {' '.join(files)}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())

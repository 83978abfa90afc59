"""Real runs for the tests: what a finished one left, a recipe on somebody's own pictures, who lives below a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from pipelines import processes
from pipelines.session import TOP
from tests import verify
from trainer.recipe import Recipe
from trainer.resolve import load_recipe

LIMIT_S = 10.0
"""Nothing of a run lives longer than this after its parent."""
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@dataclass(frozen=True)
class Finished:
    out: Path
    began: float
    wall_s: float
    told: str

    @property
    def recipe(self) -> Recipe:
        return load_recipe(str(self.out / "recipe.json"))

    def json(self, *parts: str) -> dict[str, Any]:
        return json.loads(self.out.joinpath(*parts).read_text())


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (size, time of change) of every file but the lock."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    stats = {str(file.relative_to(folder)): file.stat() for file in files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


# ---------------------------------------------------------------- a user's own data


def picture(path: Path, colour: str, side: int = 140) -> None:
    image = Image.new("RGB", (side, side), "grey")
    ImageDraw.Draw(image).rectangle((20, 20, side - 40, side - 40), fill=colour)
    image.save(path)


def llava(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    """`count` pictures in FOLDER/images and FOLDER/train.json in LLaVA's format; the entries."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(count):
        colour, name = COLOURS[number % len(COLOURS)], f"{number:02d}.{('png', 'jpg')[number % 2]}"
        picture(folder / "images" / name, colour, side=140 + 14 * number)
        asked = {"from": "human", "value": "<image>\nWhich colour has the square?"}
        told = {"from": "gpt", "value": f"The square is {colour}."}
        entries.append({"id": f"square-{number}", "image": name, "conversations": [asked, told]})
    write_llava(folder, entries)
    return entries


def write_llava(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "train.json").write_text(json.dumps(entries))


def own_recipe(folder: Path, base: Path, **sft: Any) -> str:
    """A recipe file over tiny_smoke: sft only, from the model in `base`, on FOLDER/train.json."""
    tiny = load_recipe("tiny_smoke")
    stages = dict.fromkeys(tiny.stages.named())
    mine = {"format": "llava", "path": str(folder / "train.json"), "media": str(folder / "images")}
    content = {
        "extends": "tiny_smoke",
        "name": "mine",
        "model": {"base": str(base), **dict.fromkeys(("config", "init", "pretrain", "tokenizer", "vocab_size"))},
        "prepare": {
            "sources": {
                **dict.fromkeys(tiny.prepare.sources),
                "mine": {**mine, "kind": "instruction", "rendering": "chat"},
            }
        },
        "stages": {
            **stages,
            "sft": {"sampling": None, "data": {"instructions": None, "sampled": None, "mine": 1}, **sft},
        },
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


# ---------------------------------------------------------------- processes


def qwenvl(*words: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def start(recipe: str, out: Path, *words: str) -> subprocess.Popen[str]:
    return verify.start(recipe, out, *words)


def told_by(out: Path) -> str:
    """What runs started with `start` have printed into this output's log."""
    return out.with_suffix(".log").read_text()


def tree_of(top: int) -> list[int]:
    """The top and everything below it, by parentage and by what the environment says."""
    return sorted({top, *processes.descendants(top), *processes.with_environment(TOP, str(top))})


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def seconds_until_all_gone(top: int, tree: list[int]) -> float:
    """Until no process of the tree lives, nor any that was started below the top since."""

    def gone() -> bool:
        return not any(map(processes.alive, tree)) and not processes.with_environment(TOP, str(top))

    began = time.monotonic()
    assert processes.wait_until(gone, LIMIT_S + 5), [
        (pid, command_of(pid)) for pid in tree_of(top) if processes.alive(pid)
    ]
    return time.monotonic() - began


def rank_pid(tree: list[int], rank: int) -> int:
    """The process of the tree that writes into attempts/NNNN/rankR.log; for rank 0 its MLflow sender does so, too."""

    def log_of(pid: int) -> str:
        try:
            return os.path.basename(os.readlink(f"/proc/{pid}/fd/1"))
        except OSError:
            return ""

    (found,) = [pid for pid in tree if log_of(pid) == f"rank{rank}.log"]
    return found


def wait_until(true: Callable[[], bool], top: subprocess.Popen[str], out: Path, limit_s: float = 120) -> None:
    """Fails when the run ends before."""

    def now() -> bool:
        found = true()
        assert found or top.poll() is None, f"ended with {top.returncode}:\n{told_by(out)}"
        return found

    assert processes.wait_until(now, limit_s), f"not within {limit_s} s:\n{told_by(out)}"

"""A run on this machine: order, skipping, errors, the lock, signals and deaths, with substitute steps."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from pipelines import processes
from pipelines.run import program
from tests.pipelines.builders import ARun, pids, seconds_until_gone, sleeper
from trainer.errors import MediaError, OutputInUse, RecipeError

LIMIT_S = 10.0  # no process of a run lives longer than this after its parent


def test_a_run_takes_every_step_once_in_order_and_says_how_far_it_is(tmp_path: Path) -> None:
    ended = ARun(tmp_path).finish()
    assert ended.code == 0, ended.stdout + ended.stderr
    begun = [line.split("] ")[1] for line in ended.stdout.splitlines() if "] " in line and ": " not in line]
    assert len(begun) == len(set(begun)) == 21
    for first, then in [
        ("prepare-data", "init"),
        ("init", "stage1"),
        ("prepare-stage1", "stage1"),
        ("stage1", "stage2"),
        ("stage3", "prepare-sft-answers"),
        ("prepare-sft-requests", "prepare-sft-answers"),
        ("prepare-sft-select", "prepare-sft"),
        ("sft", "prepare-dpo-answers"),
        ("prepare-dpo", "dpo"),
        ("export", "evaluate"),
    ]:
        assert begun.index(first) < begun.index(then), (first, then)
    assert begun[-1] == "report"
    assert "[21/21] report: done" in ended.stdout
    assert "left" in ended.stdout
    assert " stage1 at work" in ended.stdout, "the steps' own lines come through"
    for noise in ("KFP Executor", "executor_input", "Traceback", "Executing task", "\x1e"):
        assert noise not in ended.stdout + ended.stderr
    assert "report.html" in ended.stdout


def test_finished_stages_are_skipped_and_the_interrupted_one_runs_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    failing = ARun(tmp_path, {"stage2": "raise SystemExit(1)"}).finish()
    assert failing.code != 0
    assert "\nthe same command goes on from what is finished: " in failing.stderr
    assert (out / "stage1.done").exists() and not (out / "stage2.done").exists()
    (tmp_path / "steps" / "stage2.py").unlink()
    again = ARun(tmp_path).finish()
    assert again.code == 0, again.stdout + again.stderr
    assert "stage1: was done before" in again.stdout
    assert " stage1 at work" not in again.stdout
    assert " stage2 at work" in again.stdout


def test_a_step_s_error_is_told_once_with_its_exit_code_and_nothing_else_starts(tmp_path: Path) -> None:
    error = "from trainer.errors import MediaError; raise MediaError('a picture cannot be read', where='cat.jpg')"
    ended = ARun(tmp_path, {"prepare-stage1": error}).finish()
    assert ended.code == MediaError.code
    told = ended.stdout + ended.stderr
    assert told.count("a picture cannot be read") == 1
    again = f"once that is mended, the same command goes on from what is finished: {sys.executable} -m pipelines.cli"
    assert again in ended.stderr, "by itself it would fail again"
    assert "error in prepare-stage1" in ended.stderr and "where: cat.jpg" in ended.stderr
    assert "Traceback" not in told
    assert "prepare-stage1: failed" in ended.stdout.splitlines()[-1], "nothing starts after it"


@pytest.mark.parametrize(
    ("called", "path", "want"),
    [
        ("{0}/bin/qwenvl", "{0}/bin", ["qwenvl"]),
        ("{0}/bin/qwenvl", "{0}/elsewhere", ["{0}/bin/qwenvl"]),
        ("{0}/pipelines/cli/main.py", "{0}/bin", [sys.executable, "-m", "pipelines.cli.main"]),
    ],
)
def test_the_command_that_goes_on_is_one_that_this_shell_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, path: str, want: list[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qwenvl").touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [called.format(tmp_path)])
    monkeypatch.setenv("PATH", path.format(tmp_path))
    assert program() == [word.format(tmp_path) for word in want]


def test_a_bug_in_a_step_shows_its_traceback_and_not_kfp_s(tmp_path: Path) -> None:
    ended = ARun(tmp_path, {"prepare-data": "{}['nothing']"}).finish()
    assert ended.code == 1
    assert "KeyError: 'nothing'" in ended.stderr
    assert "executor_main" not in ended.stderr


@pytest.mark.parametrize(
    ("words", "recipe", "want"),
    [
        (("--set", "stages.stage1.optim.lrr=1"), "tiny_smoke", "did you mean"),
        (("--set", "stages.stage1.train={vision: false, merger: false, llm: false}"), "tiny_smoke", "trains nothing"),
        ((), "tiny_smok", "did you mean tiny_smoke?"),
    ],
)
def test_a_wrong_recipe_is_told_before_anything_is_written(
    tmp_path: Path, words: tuple[str, ...], recipe: str, want: str
) -> None:
    ended = ARun(tmp_path, recipe=recipe, words=words).finish()
    assert ended.code == RecipeError.code
    assert want in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_second_run_refuses_while_the_first_lives_and_names_it_and_killing_the_top_kills_everything(
    tmp_path: Path,
) -> None:
    run = ARun(tmp_path, {"prepare-data": sleeper("asleep")})
    first = run.start()
    below = pids(run, "asleep")
    tree = [first.pid, *processes.descendants(first.pid)]
    assert set(below) <= set(tree)
    second = ARun(tmp_path, dict(run.does)).finish()
    assert second.code == OutputInUse.code
    assert f"process {first.pid} on " in second.stderr
    assert all(processes.alive(pid) for pid in below), "the first goes on"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert seconds_until_gone(tree) < LIMIT_S
    (tmp_path / "steps" / "prepare-data.py").unlink()
    session = json.loads((run.out / ".lock").read_text())["session"]
    third = ARun(tmp_path, {"prepare-stage1": "raise SystemExit(3)"}).finish()
    assert "prepare-data: done" in third.stdout, "the lock of a killed run is free"
    assert not Path(session).exists(), "and what it left is removed"


def test_no_rank_outlives_a_killed_top_in_the_middle_of_a_stage(tmp_path: Path) -> None:
    run = ARun(tmp_path, {"stage1": sleeper("asleep")})
    top = run.start()
    below = pids(run, "asleep")
    tree = [top.pid, *processes.descendants(top.pid)]
    assert set(below) <= set(tree)
    os.kill(top.pid, signal.SIGKILL)
    top.wait()
    assert seconds_until_gone(tree) < LIMIT_S


def test_a_step_that_is_killed_takes_what_is_below_it_along_and_is_named(tmp_path: Path) -> None:
    run = ARun(tmp_path, {"stage1": sleeper("asleep")})
    top = run.start()
    below = pids(run, "asleep")
    step = [
        pid for pid in processes.descendants(top.pid) if b"executor_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(step[-1], signal.SIGKILL)
    _, stderr = top.communicate(timeout=60)
    assert top.returncode == 1
    assert "error in stage1" in stderr
    assert seconds_until_gone(below) < LIMIT_S


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_its_children_and_exits_with_the_signal_s_code(
    tmp_path: Path, signum: int, code: int
) -> None:
    run = ARun(tmp_path, {"prepare-data": sleeper("asleep")})
    top = run.start()
    below = pids(run, "asleep")
    os.kill(top.pid, signum)
    stdout, stderr = top.communicate(timeout=60)
    assert top.returncode == code
    assert seconds_until_gone(below) < LIMIT_S
    assert f"stopped in prepare-data: by {signal.Signals(signum).name}\n" in stderr
    assert "prepare-data: stopped in" in stdout.splitlines()[-1]
    again = f"{sys.executable} -m pipelines.cli.main run tiny_smoke --out {run.out}"
    assert f"goes on from what is finished, a stage from its last checkpoint: {again}" in stderr
    assert "failed" not in stdout + stderr and "error" not in stderr and "Traceback" not in stdout + stderr

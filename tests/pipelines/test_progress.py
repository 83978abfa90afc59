"""What a person sees: steps counted, remainders estimated, kfp's own lines kept back, errors told once."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pipelines.left import Left, look
from pipelines.local import Lines, error_of
from pipelines.progress import START_S, Progress, Relay, expected_s, told_s
from pipelines.session import DONE, WAS_DONE, Mark
from trainer import storage
from trainer.errors import FreezeError, QwenVLError, UsageError
from trainer.resolve import load_recipe


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_progress() -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    return Progress(load_recipe("tiny"), out, clock=clock), clock, out


def test_the_remainder_follows_the_pace_of_this_run() -> None:
    progress, clock, _ = a_progress()
    assert progress.left_s() is None, "nothing has shown the pace yet"
    cost = progress.expected
    progress.begin("prepare-data")
    clock.now += 2 * cost["prepare-data"]
    progress.end(Mark("end", "prepare-data", DONE, clock.now))
    rest = 2 * (sum(cost.values()) - cost["prepare-data"])
    assert progress.left_s() == pytest.approx(rest)
    progress.begin("init")
    clock.now += cost["init"]
    assert progress.left_s() == pytest.approx(rest - cost["init"])


def test_what_was_done_before_counts_as_done_and_does_not_change_the_pace() -> None:
    progress, clock, _ = a_progress()
    progress.begin("prepare-data")
    clock.now += 20
    progress.end(Mark("end", "prepare-data", DONE, 20))
    pace = 20 / progress.expected["prepare-data"]
    progress.begin("init")
    clock.now += 0.1
    progress.end(Mark("end", "init", WAS_DONE, 0.1))
    done = progress.expected["prepare-data"] + progress.expected["init"]
    assert progress.left_s() == pytest.approx((sum(progress.expected.values()) - done) * pace)


def an_output(out: str) -> None:
    """As a run leaves it that is stopped in the middle of stage2: stage1 took 300 s, stage2 has 90 of 150 steps."""
    storage.write_json(storage.join(out, "data", "funnel.json"), {})
    for name in ("stage1", "stage2"):
        storage.write_json(storage.join(out, name, "plan", "plan.json"), {"num_steps": 150})
    for name, wall_s in (("init", 40.0), ("stage1", 300.0)):
        storage.write_json(storage.join(out, name, "result.json"), {"wall_s": wall_s, "metrics": {}})
    storage.write_json(storage.join(out, "stage2", "checkpoints", "step-00000090", "manifest.json"), {})


def test_a_second_run_of_an_output_expects_what_is_left_and_knows_the_pace_from_the_start(tmp_path: Path) -> None:
    an_output(str(tmp_path))
    recipe, whole = load_recipe("tiny"), expected_s(load_recipe("tiny"))
    found = look(recipe, str(tmp_path))
    assert found.took_s == {"stage1": 300.0}
    done = ("prepare-data", "init", "stage1", "prepare-stage1", "prepare-stage2")
    assert {step: share for step, share in found.share.items() if share == 0} == dict.fromkeys(done, 0.0)
    assert found.share["stage2"] == pytest.approx(0.4)
    rest = START_S + 0.4 * (whole["stage2"] - START_S)
    rest += sum(cost for step, cost in whole.items() if step not in (*done, "stage2"))
    clock = Clock()
    progress = Progress(recipe, io.StringIO(), left=found, clock=clock)
    pace = 300 / whole["stage1"]
    assert progress.left_s() == pytest.approx(rest * pace), "before any step has ended"
    for step, state, took in (("prepare-data", DONE, 1.0), ("init", WAS_DONE, 0.2), ("stage1", WAS_DONE, 0.2)):
        progress.begin(step)
        clock.now += took
        progress.end(Mark("end", step, state, took))
    again = 2 * (1.0 + 0.2 + 0.2) / 3  # the two plans that are there, as what was there took so far
    assert progress.left_s() == pytest.approx(rest * pace + again), "a second for data that is there is no pace"
    progress.begin("stage2")
    clock.now += 60
    progress.end(Mark("end", "stage2", DONE, 60))
    cost = START_S + 0.4 * (whole["stage2"] - START_S)
    pace = (300 + 60) / (whole["stage1"] + cost)
    assert progress.left_s() == pytest.approx((rest - cost) * pace + again)


def test_the_time_left_of_a_run_that_finds_everything_done_is_that_of_its_steps_starts() -> None:
    """Every step takes a second to start and half a second to see that it is done."""
    recipe = load_recipe("tiny")
    steps = [step for step in expected_s(recipe) if step != "report"]
    found = Left(share=dict.fromkeys(steps, 0.0), took_s={"stage1": expected_s(recipe)["stage1"]})
    clock = Clock()
    progress = Progress(recipe, io.StringIO(), left=found, clock=clock)
    told = []
    for step in steps:
        clock.now += 1.0
        progress.begin(step)
        clock.now += 0.5
        progress.end(Mark("end", step, WAS_DONE, 0.5))
        told.append(progress.left_s())
    report = progress.expected["report"]
    assert told[1:] == pytest.approx([1.5 * (len(steps) - n) + 1.0 + report for n in range(2, len(steps) + 1)])
    clock.now += 1.0
    progress.begin("report")
    clock.now += 2 * report
    assert progress.left_s() == 0.0, "what takes longer than expected is never less than nothing"


def test_a_resumed_stage_tells_no_pace_and_a_damaged_output_nothing(tmp_path: Path) -> None:
    an_output(str(tmp_path))
    content = {"wall_s": 10.0, "metrics": {"resumed_from": 140}}
    storage.write_json(storage.join(str(tmp_path), "stage1", "result.json"), content)
    assert look(load_recipe("tiny"), str(tmp_path)).took_s == {}
    (tmp_path / "stage1" / "result.json").write_text("{")
    assert look(load_recipe("tiny"), str(tmp_path)) == Left()
    assert look(load_recipe("tiny"), str(tmp_path / "nothing")).share["prepare-data"] == 1.0


def test_only_steps_of_the_recipe_are_counted() -> None:
    finetune = expected_s(load_recipe("qwen2_5_vl_7b_finetune"))
    assert "stage1" not in finetune and "sft" in finetune
    progress, _, out = a_progress()
    progress.begin("clean-up")
    progress.end(Mark("end", "clean-up", DONE, 0))
    assert out.getvalue() == ""


def test_only_what_lies_between_a_step_s_first_and_last_line_comes_through() -> None:
    progress, _, out = a_progress()
    relay = Relay(progress)
    for line in (
        "    [KFP Executor 2026-11-22 INFO]: Got executor_input:",
        "    {",
        "    " + Mark("begin", "init").line(),
        "    its own line",
        "    unfinished" + Mark("end", "init", DONE, 1.0).line(),
        "----------",
    ):
        relay.write(line[:7])
        relay.write(line[7:] + "\n")
    lines = [line.split(maxsplit=1)[1] for line in out.getvalue().splitlines()]
    assert [line.split("] ")[-1].strip() for line in lines[:3]] == ["init", "its own line", "unfinished"]
    assert "init: done in 1.0 s" in lines[3] and len(lines) == 4
    assert relay.kept == ["----------"]


def test_what_kfp_says_of_a_step_that_was_killed_is_kept_for_the_top() -> None:
    progress, _, out = a_progress()
    relay = Relay(progress)
    told = "09:22:05.123 - ERROR - Task 'init' finished with status FAILURE"
    relay.write("    " + Mark("begin", "init").line() + "\n" + told + "\n")
    assert relay.kept == [told] and "FAILURE" not in out.getvalue()


def test_a_program_s_error_lines_are_kept_for_the_top_and_the_others_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for chunk in ("step 1\nst", "ep 2\nerror: frozen ", "parameters changed\n  where: a\nerror: it\n  do: b"):
        lines.write(chunk)
    lines.close()
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert lines.message() == "it\n  do: b"


@pytest.mark.parametrize(
    ("code", "kind", "want"), [(72, FreezeError, 72), (2, UsageError, 2), (-9, QwenVLError, 137), (99, QwenVLError, 99)]
)
def test_an_exit_code_becomes_the_error_of_its_class(code: int, kind: type[QwenVLError], want: int) -> None:
    error = error_of(code, "told")
    assert type(error) is kind and error.code == want and str(error) == "told"


@pytest.mark.parametrize(
    ("seconds", "want"), [(0.04, "0.0 s"), (9.96, "10 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (59.6, "1 min 0 s")]
)
def test_seconds_are_said_as_people_say_them(seconds: float, want: str) -> None:
    assert told_s(seconds) == want

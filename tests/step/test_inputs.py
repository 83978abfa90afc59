"""What a begun stage goes on with: accepted changes are recorded once, another plan or parent is never accepted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.data.plan import Plan
from trainer.errors import CheckpointError, PlanError, RecipeError, StageMismatch, UsageError
from trainer.manifest import Change, Manifest
from trainer.resolve import load_recipe
from trainer.step import ending
from trainer.step.asked import Job
from trainer.step.inputs import check_planned, compared

STORED = {"fields": {"optim.lr": 1, "packing.length": 512}, "plan": "plan-one", "parent": "parent-one"}


def a_manifest(step: int = 5, **changes: Any) -> Manifest:
    facts = {"stage_digest": "s", "plan_digest": "p", "base_model_digest": "b", "objects": (), "num_parameters": 0}
    return Manifest(stage="sft", step=step, attempt=1, nonce="n", world_size=1, optimizer={}, **{**facts, **changes})


def asked(**fields: Any) -> dict[str, Any]:
    return {**STORED, "fields": {**STORED["fields"], **fields}}


def test_a_change_is_accepted_by_name_and_recorded_with_its_step() -> None:
    with pytest.raises(StageMismatch, match=r"--accept-change optim\.lr"):
        compared(STORED, asked(**{"optim.lr": 2}), a_manifest(), where="w", accept=())
    found = compared(STORED, asked(**{"optim.lr": 2}), a_manifest(), where="w", accept=["optim"])
    assert found == (Change(field="optim.lr", stored=1, asked=2, step=5),)


def test_a_recorded_change_needs_no_second_word_and_going_back_does() -> None:
    first = Change(field="optim.lr", stored=1, asked=2, step=5)
    later = a_manifest(8, accepted_changes=(first,))
    assert compared(STORED, asked(**{"optim.lr": 2}), later, where="w", accept=()) == (first,)
    with pytest.raises(StageMismatch):
        compared(STORED, STORED, later, where="w", accept=())
    back = Change(field="optim.lr", stored=2, asked=1, step=8)
    assert compared(STORED, STORED, later, where="w", accept=["optim.lr"]) == (first, back)


@pytest.mark.parametrize("name", ["plan", "parent"])
def test_no_accepted_change_covers_another_plan_or_parent(name: str) -> None:
    other = {**asked(**{"packing.length": 256}), name: "another"}
    with pytest.raises(StageMismatch, match=f"begun with another {name}") as told:
        compared(STORED, other, a_manifest(), where="OUT/sft/stage.json", accept=["packing.length"])
    assert f"{name}-one (stored)" in str(told.value) and "another (asked for)" in str(told.value)


def test_a_plan_made_for_other_settings_is_not_trained_on() -> None:
    recipe = load_recipe("tiny")
    stage = recipe.stages.named()["sft"]
    facts = {"schedule": {"steps": 80, "tokens": None}, "weights": {"instructions": 1.0}}  # sampled kept no answer
    header = {"facts": facts, "seed": recipe.seed, "packs_per_step": 2, "digest": "d"}
    check_planned(Job(recipe, "sft", stage, "out"), Plan(header))
    for change, want in (
        ("schedule.steps=40", "schedule.steps 40"),
        ("schedule.packs_per_step=4", "schedule.packs_per_step 4"),
        ("data={instructions: 2}", "data.instructions 2"),
        ("data={instructions: null, agents: 1}", "data.agents None"),
    ):
        other = load_recipe("tiny", [f"stages.sft.{change}"])
        with pytest.raises(PlanError, match="made for other settings") as told:
            check_planned(Job(other, "sft", other.stages.named()["sft"], "out"), Plan(header))
        assert want in str(told.value) and "prepare sft again" in str(told.value)


@pytest.mark.parametrize("newest", [None, 3])
def test_a_stage_whose_last_checkpoint_is_gone_hands_nothing_over(
    newest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, inputs = SimpleNamespace(uri="OUT/sft"), SimpleNamespace(plan=SimpleNamespace(num_steps=4))
    monkeypatch.setattr(ending.manifests, "newest", lambda uri: newest and a_manifest(newest))
    with pytest.raises(CheckpointError, match="OUT/sft/checkpoints") as told:
        ending._last_checkpoint(job, inputs)  # type: ignore[arg-type]
    assert "step 4" in str(told.value)
    monkeypatch.setattr(ending.manifests, "newest", lambda uri: a_manifest(4))
    assert ending._last_checkpoint(job, inputs).step == 4  # type: ignore[arg-type]


def test_a_sample_to_skip_is_of_a_source_of_its_stage() -> None:
    stage = load_recipe("tiny", ["stages.sft.skip_samples=[instructions/x/7]"]).stages.named()["sft"]
    assert stage.skip_samples == ["instructions/x/7"]
    for wrong in ("captions/x", "instructions", "instructions/"):
        with pytest.raises(RecipeError, match="skip_samples"):
            load_recipe("tiny", [f"stages.sft.skip_samples=[{wrong}]"])


@pytest.mark.parametrize(
    ("words", "env", "code", "want"),
    [
        (["--stage", "stage9"], {}, UsageError.code, "no such stage"),
        (["--stage", "sft", "--set", "stages.sft.optim.lr"], {}, UsageError.code, "not an override"),
        (["--stage", "sft", "--nonsense"], {}, UsageError.code, "--nonsense"),
        (["--stage", "sft"], {"QWENVL_ATTEMPT": "first"}, UsageError.code, "QWENVL_ATTEMPT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_argument_ends_the_program_with_one_message(
    words: list[str], env: dict[str, str], code: int, want: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "trainer.train", "--recipe", "tiny", "--out", str(tmp_path), *words]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    assert ended.returncode == code
    assert want in ended.stderr and ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr


def test_a_stage_that_is_not_prepared_ends_with_the_plan_s_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.train", "--recipe", "tiny", "--out", str(tmp_path), "--stage", "sft"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ended.returncode == PlanError.code and "there is no plan" in ended.stderr
    assert "Traceback" not in ended.stderr

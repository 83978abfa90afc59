"""StageResult: written once, verified, and stale as soon as its parent is another one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trainer import handover, storage
from trainer.errors import CheckpointError, StageMismatch, UsageError
from trainer.handover import Parent, StageResult
from trainer.recipe import Recipe
from trainer.resolve import load_recipe, stage_digest, stage_fields


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny")


def a_result(out: Path, recipe: Recipe, stage: str, parent: StageResult | None, **more: Any) -> StageResult:
    folder = out / stage / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(f"weights of {stage}".encode())
    (folder / "config.json").write_text("{}")
    stages = recipe.stages.named()
    result = StageResult(
        stage=stage,
        recipe_sha256="r",
        resolved_stage=stage_fields(recipe, stages[stage]) if stage in stages else {},
        parent=Parent(stage=parent.stage, digest=handover.result_digest(parent)) if parent else None,
        model=handover.describe_model(str(out), f"{stage}/model"),
        **more,
    )
    handover.write(str(out), result)
    return result


def a_chain(out: Path, recipe: Recipe, until: str) -> list[StageResult]:
    chain: list[StageResult] = []
    for name in handover.order_of(recipe):
        chain.append(a_result(out, recipe, name, chain[-1] if chain else None))
        if name == until:
            break
    return chain


def test_each_stage_starts_from_the_one_before_it(recipe: Recipe) -> None:
    want = {"init": None, "stage1": "init", "stage2": "stage1", "stage3": "stage2", "sft": "stage3", "dpo": "sft"}
    assert {name: handover.parent_of(recipe, name) for name in want} == want
    short = load_recipe("tiny", ["stages.stage3=null"])
    assert handover.parent_of(short, "sft") == "stage2"
    with pytest.raises(UsageError, match="no such stage"):
        handover.parent_of(short, "stage3")


def test_a_finished_stage_is_recognised_and_an_unfinished_one_is_to_be_run(tmp_path: Path, recipe: Recipe) -> None:
    chain = a_chain(tmp_path, recipe, "stage2")
    assert handover.finished(recipe, "stage2", str(tmp_path), verify="full") == chain[-1]
    assert handover.finished(recipe, "stage3", str(tmp_path)) is None
    newest = handover.newest_result(str(tmp_path), before="sft")
    assert newest is not None and newest.stage == "stage2"
    before = handover.newest_result(str(tmp_path), before="stage2")
    assert before is not None and before.stage == "stage1"


def test_a_result_is_written_once(tmp_path: Path, recipe: Recipe) -> None:
    result = a_chain(tmp_path, recipe, "init")[0]
    handover.write(str(tmp_path), result)  # the same bytes again: nothing happens
    with pytest.raises(StageMismatch, match="a different one"):
        handover.write(str(tmp_path), result.model_copy(update={"wall_s": 1.0}))


@pytest.mark.parametrize(
    ("damage", "verify", "want"),
    [
        ("truncate", "quick", "model.safetensors"),
        ("flip", "full", "model.safetensors"),
        ("flip", "quick", None),  # the control: sizes alone do not see a flipped byte
        ("remove", "quick", "no such file"),
    ],
)
def test_damage_to_the_model_is_told_by_name(
    tmp_path: Path, recipe: Recipe, damage: str, verify: Any, want: str | None
) -> None:
    a_chain(tmp_path, recipe, "init")
    file = tmp_path / "init/model/model.safetensors"
    if damage == "remove":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + b"\x00")
    if want is None:
        assert handover.read(str(tmp_path), "init", verify=verify)
        return
    with pytest.raises(CheckpointError, match=want):
        handover.read(str(tmp_path), "init", verify=verify)


def test_a_changed_parent_makes_the_children_stale_and_the_chain_is_told(tmp_path: Path, recipe: Recipe) -> None:
    chain = a_chain(tmp_path, recipe, "stage2")
    storage.remove(handover.result_uri(str(tmp_path), "stage1"))
    a_result(tmp_path, recipe, "stage1", chain[0], wall_s=9.0)
    for stage in ("stage2", "stage3"):
        with pytest.raises(StageMismatch, match=r"init -> stage1 -> stage2 \(stale\)"):
            handover.finished(recipe, "stage2", str(tmp_path))
            handover.lineage(recipe, str(tmp_path), stage)
    assert handover.finished(recipe, "stage1", str(tmp_path)) is not None


def test_a_parent_written_again_with_the_same_weights_leaves_its_children_as_they_are(
    tmp_path: Path, recipe: Recipe
) -> None:
    out, stage = str(tmp_path), recipe.stages.named()["stage1"]
    init = a_chain(tmp_path, recipe, "init")[0]
    made = stage_digest(recipe, stage, parent_model=init.model.digest, data="d")
    a_result(tmp_path, recipe, "stage1", init, stage_digest=made, data_digest="d")
    storage.remove(handover.result_uri(out, "init"))
    handover.write(out, init.model_copy(update={"wall_s": 9.0, "attempts": 2}))
    assert handover.finished(recipe, "stage1", out) is not None
    (tmp_path / "init/model/model.safetensors").write_bytes(b"other weights")
    storage.remove(handover.result_uri(out, "init"))
    handover.write(out, init.model_copy(update={"model": handover.describe_model(out, "init/model")}))
    with pytest.raises(StageMismatch, match=r"init -> stage1 \(stale\)"):
        handover.finished(recipe, "stage1", out)


@pytest.mark.parametrize(("damage", "want"), [("remove", "is gone"), ("write", "manifest is damaged")])
def test_a_last_checkpoint_that_is_gone_or_damaged_is_told_with_what_to_do(
    tmp_path: Path, recipe: Recipe, damage: str, want: str
) -> None:
    init, name = a_chain(tmp_path, recipe, "init")[0], "stage1/checkpoints/step-00000004/manifest.json"
    at, out = tmp_path / name, str(tmp_path)
    at.parent.mkdir(parents=True)
    at.write_text("{}")
    a_result(tmp_path, recipe, "stage1", init, checkpoint=name, checkpoint_digest=storage.sha256_of(str(at)))
    assert handover.read(out, "stage1").checkpoint == name
    at.unlink() if damage == "remove" else at.write_text("{ }")
    with pytest.raises(CheckpointError, match=want) as told:
        handover.read(out, "stage1")
    assert f"do: restore it, or remove {out}/stage1 to train the stage again" in str(told.value)


def test_a_missing_parent_is_a_usage_error_that_names_it(tmp_path: Path, recipe: Recipe) -> None:
    a_chain(tmp_path, recipe, "init")
    with pytest.raises(UsageError, match="stage1 is not finished"):
        handover.lineage(recipe, str(tmp_path), "stage2")


def test_a_changed_result_field_is_refused_by_name_and_an_execution_field_is_not(
    tmp_path: Path, recipe: Recipe
) -> None:
    a_chain(tmp_path, recipe, "stage1")
    changed = load_recipe("tiny", ["stages.stage1.optim.lr=5e-4"])
    stored = recipe.stages.named()["stage1"].optim.lr
    with pytest.raises(StageMismatch, match=rf"optim\.lr: {re.escape(str(stored))} \(stored\)"):
        handover.finished(changed, "stage1", str(tmp_path))
    assert handover.finished(changed, "stage1", str(tmp_path), accept=["optim"]) is not None
    elsewhere = load_recipe("tiny", ["stages.stage1.compute.threads=2", "stages.stage1.checkpoint.every_steps=7"])
    assert handover.finished(elsewhere, "stage1", str(tmp_path)) is not None


def test_a_field_that_the_stored_stage_lacks_is_no_change(recipe: Recipe) -> None:
    asked = stage_fields(recipe, recipe.stages.named()["sft"])
    stored = {key: value for key, value in asked.items() if key != "seed"}
    assert handover.compare(stored, asked, where="here") == []


def test_an_accepted_change_is_recorded_with_the_step(recipe: Recipe) -> None:
    asked = stage_fields(recipe, recipe.stages.named()["sft"])
    changes = handover.compare({**asked, "optim.lr": 9.0}, asked, where="here", accept=["optim.lr"], step=40)
    assert [(change.field, change.stored, change.asked, change.step) for change in changes] == [
        ("optim.lr", 9.0, 5e-4, 40)
    ]


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    storage.write_json(handover.result_uri(str(tmp_path), "sft"), {"format": 2})
    with pytest.raises(CheckpointError, match="format"):
        handover.read(str(tmp_path), "sft")

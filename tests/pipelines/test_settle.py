"""OUT/recipe.json: written once; later runs may change what has not begun, and nothing else without being told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.settle import settle, stored_recipe
from pipelines.work import accepted_by
from trainer.errors import RecipeError, StageMismatch, UsageError

LR = "stages.sft.optim.lr=1e-6"
NODES = "stages.sft.compute.threads=2"
SEED = "seed=7"


def an_output(folder: Path, *begun: str) -> str:
    settle("tiny", [], out=str(folder))
    for name in begun:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize(
    ("begun", "overrides", "accept", "refused"),
    [
        ([], [LR, SEED], [], None),
        (["stage1/result.json", "data/funnel.json"], [LR], [], None),
        (["sft/plan/plan.json"], [LR], [], "stages.sft.optim.lr"),
        (["sft/plan/plan.json"], [LR], ["optim.lr"], None),
        (["sft/plan/plan.json"], [LR], ["stages.sft.optim"], None),
        (["sft/plan/plan.json"], [LR], ["stages.dpo.optim"], "stages.sft.optim.lr"),
        (["sft/result.json", "data/funnel.json"], [NODES], [], None),
        (["data/funnel.json"], [SEED], [], "seed"),
        (["evaluate/evaluation.json"], ["evaluate.samples=5"], [], "evaluate.samples"),
        (["sft/plan/plan.json"], ["stages.dpo=null"], [], None),
    ],
)
def test_a_change_is_refused_by_name_if_what_it_made_is_there(
    tmp_path: Path, begun: list[str], overrides: list[str], accept: list[str], refused: str | None
) -> None:
    out = an_output(tmp_path, *begun)
    before = (tmp_path / "recipe.json").read_bytes()
    if refused is None:
        asked = settle("tiny", overrides, out=out, accept=accept)
        assert stored_recipe(out) == asked
        return
    with pytest.raises(StageMismatch, match=refused):
        settle("tiny", overrides, out=out, accept=accept)
    assert (tmp_path / "recipe.json").read_bytes() == before


def test_a_base_model_takes_the_place_of_the_recipe_s_beginning(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with pytest.raises(UsageError, match="no such base model"):
        settle("tiny", [], out=str(tmp_path / "out"), base_model=str(base))
    assert not (tmp_path / "out").exists()
    base.mkdir()
    (base / "config.json").write_text("{}")
    asked = settle("tiny", [], out=str(tmp_path / "out"), base_model=str(base))
    assert asked.model.base == str(base) and asked.model.init is None and asked.model.config is None


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("stages.sft.optimm", "no such field"),
        ("compute", None),
        ("seed", None),
    ],
)
def test_a_field_that_is_accepted_exists(tmp_path: Path, there: bool, name: str, want: str | None) -> None:
    out = an_output(tmp_path) if there else str(tmp_path / "out")
    if want is None:
        settle("tiny", [], out=out, accept=[name])
        return
    with pytest.raises(RecipeError, match=rf"--accept-change {name}: .*{re.escape(want)}"):
        settle("tiny", [], out=out, accept=[name])
    assert there or not (tmp_path / "out").exists()


def test_a_wrong_recipe_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        settle("tiny", ["sead=7"], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_accepted_changes_reach_their_stage_under_its_own_names() -> None:
    names = ["optim.lr", "stages.sft.packing.length", "stages.dpo.dpo.beta"]
    assert accepted_by("sft", names) == ["optim.lr", "packing.length"]

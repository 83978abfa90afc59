"""Text against multimodal samples in a plan, and weights as explicit upsampling."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from pipelines.prepare.ingest import source_uri
from pipelines.prepare.stage import prepare_stage, text_samples
from tests.prepare.builders import small_recipe
from trainer.data.shards import Source
from trainer.errors import PlanError, RecipeError

HALF = "stages.sft.balance={text: 0.5, tolerance: 0.05}"
ONE_PASS = "stages.sft.schedule={packs_per_step: 2, steps: null}"


@pytest.fixture
def out(prepared: str, tmp_path: Path) -> str:
    shutil.copytree(Path(prepared) / "data", tmp_path / "data", ignore=shutil.ignore_patterns("corpus"))
    return str(tmp_path)


def mixture(**weights: float) -> list[str]:
    told = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
    return ["stages.sft.sampling=null", f"stages.sft.data={{{told}, sampled: null}}", ONE_PASS]


def test_text_is_counted_by_source_and_is_what_has_no_media(out: str, capsys: pytest.CaptureFixture[str]):
    plan = prepare_stage(small_recipe(*mixture(instructions=1, text=1)), "sft", out)
    text = {row["name"]: (row["text_uses"], row["uses"]) for row in plan.sources}
    assert text["text"][0] == text["text"][1] > 0 and text["instructions"][0] == 0 < text["instructions"][1]
    assert plan.statistics["text_samples"] == text["text"][0] == text_samples(plan)
    for pack in range(plan.num_packs):
        for place in plan.pack(pack).places:
            source = Source.open(source_uri(out, plan.sources[place.source]["name"], "train"))
            assert (place.patches == 0) is not bool(source.sample(place.shard, place.row).media)
    told = capsys.readouterr().out
    assert re.search(r"source\s+weight\s+samples\s+uses\s+text", told)


def test_a_plan_that_is_not_balanced_is_refused_and_the_weight_that_it_names_mends_it(out: str):
    with pytest.raises(PlanError, match="not the recipe's") as error:
        prepare_stage(small_recipe(*mixture(instructions=1, text=1), HALF), "sft", out)
    assert "stages.sft.balance" in str(error.value) and "50.0%" in str(error.value)
    found = re.search(r"text sources in `data` by ([\d.]+), or those of the others by", str(error.value))
    assert found
    factor = float(found.group(1))
    assert abs(factor - 1) > 0.1
    plan = prepare_stage(small_recipe(*mixture(instructions=1, text=factor), HALF), "sft", out)
    assert abs(plan.statistics["text_samples"] / plan.statistics["samples"] - 0.5) <= 0.05
    assert next(row for row in plan.sources if row["name"] == "text")["weight"] == pytest.approx(factor)


def test_a_plan_that_is_there_already_is_checked_too(out: str):
    unbalanced = mixture(instructions=1, text=1)
    prepare_stage(small_recipe(*unbalanced), "sft", out)
    with pytest.raises(PlanError, match="not the recipe's"):
        prepare_stage(small_recipe(*unbalanced, HALF), "sft", out)


@pytest.mark.parametrize(
    ("weights", "want"),
    [({"instructions": 1.0}, "add a source of text"), ({"text": 1.0}, "add a source of multimodal samples")],
)
def test_where_one_kind_is_missing_a_source_is_asked_for(weights: dict[str, float], want: str, out: str):
    only = [*mixture(**weights), *(["stages.sft.data.instructions=null"] if "text" in weights else [])]
    with pytest.raises(PlanError, match=want):
        prepare_stage(small_recipe(*only, HALF), "sft", out)


def test_a_group_that_no_sample_reaches_is_refused_before_it_is_trained(out: str):
    text = [*mixture(text=1), "stages.sft.data.instructions=null"]
    with pytest.raises(PlanError, match=r"none of its samples reaches") as error:
        prepare_stage(small_recipe(*text), "sft", out)
    assert "set stages.sft.train.merger=false" in str(error.value) and "vision" not in str(error.value)
    prepare_stage(small_recipe(*text, "stages.sft.train.merger=false"), "sft", out)
    with pytest.raises(PlanError, match="none of its samples reaches"):  # the plan is there already
        prepare_stage(small_recipe(*text), "sft", out)
    prepare_stage(small_recipe(*mixture(text=1, instructions=1)), "sft", out)


def test_a_source_that_no_step_uses_is_told(out: str, capsys: pytest.CaptureFixture[str]):
    mixed = mixture(instructions=1, text=1, captions=1)
    assert "none of its" not in (prepare_stage(small_recipe(*mixed), "sft", out), capsys.readouterr().out)[1]
    one_step = "stages.sft.schedule={packs_per_step: 2, steps: 1}"
    plan = prepare_stage(small_recipe(*mixed, one_step), "sft", out)
    missed = [row["name"] for row in plan.sources if not row["uses"]]
    told = capsys.readouterr().out
    assert missed and all(
        re.search(rf"warning: stages.sft.data.{name}: none of its [\d,]+ samples", told) for name in missed
    )


def test_a_weight_says_how_often_each_sample_is_used(out: str):
    plan = prepare_stage(small_recipe(*mixture(instructions=2, text=0.5, captions=1.5)), "sft", out)
    uses: dict[str, Counter] = {}
    for pack in range(plan.num_packs):
        for place in plan.pack(pack).places:
            row = plan.sources[place.source]
            uses.setdefault(row["name"], Counter())[place.shard, place.row] += 1
    rows = {row["name"]: row for row in plan.sources}
    assert set(uses["instructions"].values()) == {2} and rows["instructions"]["distinct"] == len(uses["instructions"])
    assert set(uses["captions"].values()) == {1, 2} and set(uses["text"].values()) == {1}
    assert rows["text"]["distinct"] / rows["text"]["num_samples"] == pytest.approx(0.5, abs=0.15)
    twice = sum(count == 2 for count in uses["captions"].values()) / len(uses["captions"])
    assert twice == pytest.approx(0.5, abs=0.1)


def test_a_share_is_between_nothing_and_all():
    with pytest.raises(RecipeError, match=r"balance\.text"):
        small_recipe("stages.sft.balance={text: 2}")

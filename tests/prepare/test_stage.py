"""Counts and plans: counted once, resumable, and only again for what changed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipelines.prepare import count
from pipelines.prepare import stage as stages
from pipelines.prepare.ingest import source_uri
from pipelines.prepare.stage import prepare_stage
from tests.prepare.builders import small_recipe
from trainer import cache, storage
from trainer.data.drops import HELD_OUT, much_left_out
from trainer.data.layout import layout
from trainer.data.plan import Plan
from trainer.data.shards import Source
from trainer.errors import PlanError, StageMismatch, UsageError
from trainer.recipe import Recipe
from trainer.resolve import load_recipe

MIX = "stages.stage2.data={captions: 1, videos: 2, text: 0.5}"


@pytest.fixture
def out(prepared: str, tmp_path: Path) -> str:
    """A copy whose columns and plans are the test's own."""
    shutil.copytree(
        Path(prepared) / "data", tmp_path / "data", ignore=shutil.ignore_patterns("corpus", "*counts-*", "*fits-*")
    )
    return str(tmp_path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every sample that is tokenised, by how."""
    calls: list[str] = []
    for name in ("natural", "fitted"):
        real = getattr(count, name)
        monkeypatch.setattr(count, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    return calls


def test_a_plan_counts_what_the_layout_of_each_sample_says(out: str):
    recipe = small_recipe(MIX)
    plan = prepare_stage(recipe, "stage2", out)
    assert plan.num_steps == 150 and plan.length == 512
    sources = [Source.open(storage.join(out, row["uri"])) for row in plan.sources]
    checked = 0
    for index in range(0, plan.num_packs, 29):
        pack = plan.pack(index)
        assert pack.tokens <= plan.length and pack.patches <= plan.patch_budget
        for place in pack.places[:4]:
            name = plan.sources[place.source]["name"]
            rules = count.rules_for(count.rules_ref(recipe, "stage2", name, out))
            from trainer.data.layout import Fit

            found = layout(
                sources[place.source].sample(place.shard, place.row), place.variant, Fit(*plan.fits[place.fit]), rules
            )
            assert (found.num_tokens, found.num_patches, found.num_targets) == place[-3:]
            checked += 1
    assert checked > 20
    assert {row["name"] for row in plan.sources} == {"captions", "videos", "text"}
    assert Plan.read(storage.join(out, "stage2", "plan", "held_out")).num_steps > 0


def test_another_mixture_tokenises_nothing_and_other_pixels_do(out: str, counted: list[str]):
    first = prepare_stage(small_recipe(MIX), "stage2", out)
    assert len(counted) > 100, "negative control: the first time everything is counted"
    counted.clear()
    second = prepare_stage(small_recipe("stages.stage2.data={captions: 2, text: 1}"), "stage2", out)
    assert counted == []
    assert first.digest != second.digest
    pixels = "stages.stage2.pixels.video_max=6272"
    prepare_stage(small_recipe(MIX, pixels), "stage2", out)
    assert len(counted) > 100


def test_other_budgets_tokenise_only_what_does_not_fit(out: str, counted: list[str]):
    prepare_stage(small_recipe(MIX), "stage2", out)
    counted.clear()
    plan = prepare_stage(small_recipe(MIX, "stages.stage2.packing.length=256"), "stage2", out)
    assert set(counted) == {"fitted"}
    every = sum(row["num_samples"] for row in plan.sources)
    assert 0 < len(counted) < every / 3
    assert max(plan.pack(index).tokens for index in range(plan.num_packs)) <= 256


def test_counting_goes_on_where_it_was_interrupted(out: str, counted: list[str], monkeypatch: pytest.MonkeyPatch):
    shards = Source.open(source_uri(out, "captions", "train")).num_shards
    assert shards > 2
    real, written = count.write_column, []

    def breaks(*args):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(args)
        real(*args)

    monkeypatch.setattr(count, "write_column", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare_stage(small_recipe(), "stage1", out)
    monkeypatch.setattr(count, "write_column", real)
    counted.clear()
    prepare_stage(small_recipe(), "stage1", out)
    total = sum(Source.open(source_uri(out, "captions", split)).num_samples for split in ("train", "held_out"))
    assert len(counted) == total - written[0][3].num_rows


def test_a_plan_is_made_once_and_a_begun_stage_keeps_it(out: str, capsys: pytest.CaptureFixture[str]):
    recipe = small_recipe()
    first = prepare_stage(recipe, "stage1", out)
    assert prepare_stage(recipe, "stage1", out).digest == first.digest
    assert "already there" in capsys.readouterr().out
    other = small_recipe("stages.stage1.schedule.steps=20")
    assert prepare_stage(other, "stage1", out).num_steps == 20, "negative control: before it begins a plan may change"
    (Path(out) / "stage1" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert prepare_stage(other, "stage1", out).num_steps == 20
    with pytest.raises(StageMismatch, match="begun with another plan"):
        prepare_stage(recipe, "stage1", out)
    assert Plan.read(storage.join(out, "stage1", "plan")).num_steps == 20


def test_a_plan_of_code_that_lays_samples_out_otherwise_is_made_again(out: str, monkeypatch: pytest.MonkeyPatch):
    """Else the loader would refuse the plan and say: prepare again; and that would find it already there."""
    recipe = small_recipe()
    first = prepare_stage(recipe, "stage1", out)
    for module in ("layout", "render"):
        monkeypatch.setattr(f"trainer.data.{module}.VERSION", 99)
        count.rules_for.cache_clear()
        again = prepare_stage(recipe, "stage1", out)
        assert again.digest != first.digest
        first = again
    count.rules_for.cache_clear()
    (Path(out) / "stage1" / "checkpoints" / "step-00000010").mkdir(parents=True)
    monkeypatch.undo()
    with pytest.raises(StageMismatch, match="version of the data code"):
        prepare_stage(recipe, "stage1", out)
    count.rules_for.cache_clear()


def test_a_held_out_split_in_which_nothing_fits_is_told_and_no_error(out: str, capsys: pytest.CaptureFixture[str]):
    """Real counts, but every held-out sample is over-long for the stage."""
    prepare_stage(small_recipe(), "stage1", out)
    assert Plan.read(storage.join(out, "stage1", "plan", "held_out")).num_packs > 0, "negative control"
    held = Source.open(source_uri(out, "captions", "held_out"))
    capsys.readouterr()
    real = count._source_counts

    def none_fits(source, parts, rules, **facts):
        if facts["split"] == "held_out":
            for part in parts:
                part["drop"][:] = count.REASONS.index("over_long")
        return real(source, parts, rules, **facts)

    recipe = small_recipe("stages.stage1.schedule.steps=20", "stages.stage1.held_out_packs=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count, "_source_counts", none_fits)
        plan = prepare_stage(recipe, "stage1", out)
    told = capsys.readouterr().out
    assert plan.num_steps == 20
    assert (
        f"stage1 held_out: no held-out samples fit packs of 512 tokens and 1024 patches (captions: {held.num_samples}"
        in told
    )
    assert f"dropped: {held.num_samples} over_long" in told and "raise packing.length" in told
    assert not storage.exists(storage.join(out, "stage1", "plan", "held_out", "plan.json")), "nor one of before"
    [(_, lost)] = much_left_out(storage.read_json(storage.join(out, "stage1", "plan", HELD_OUT)))
    assert lost.startswith(f"{held.num_samples} of {held.num_samples} held-out samples (100%)"), "for the report"


def test_a_packing_that_drops_much_of_a_source_is_a_warning_also_of_a_plan_that_is_there(
    out: str, capsys: pytest.CaptureFixture[str]
):
    whole = small_recipe("stages.stage1.schedule.steps=20")
    first = prepare_stage(whole, "stage1", out)
    tokens = sorted(place.tokens for number in range(first.num_packs) for place in first.pack(number).places)
    half = tokens[len(tokens) // 2] - 1
    assert "warning" not in capsys.readouterr().out, "negative control"
    recipe = small_recipe(
        "stages.stage1.schedule.steps=20",
        f"stages.stage1.packing.length={half}",
        "stages.stage1.packing.over_long=drop",
    )
    plan = prepare_stage(recipe, "stage1", out)
    [row] = plan.sources
    lost, total = row["drops"]["over_long"], row["num_samples"]
    assert total > lost > total / 10
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    want = f"stages.stage1.data.captions: {lost:,} of {total:,} samples ({lost / total:.0%}) are left out"
    assert want in told[0] and "stages.stage1.packing.length" in told[0] and "over_long: shrink" in told[0]
    sizes = re.search(
        r"half of those that do not fit have over ([\d,]+) tokens and [\d,]+ patches, the largest", told[0]
    )
    assert sizes and int(sizes[1].replace(",", "")) > half
    assert "held-out samples" in told[1]
    prepare_stage(recipe, "stage1", out)
    again = capsys.readouterr().out
    assert want in again and "held-out samples" in again


def test_samples_to_leave_out_are_there_and_the_plan_stays(out: str, capsys: pytest.CaptureFixture[str]):
    first = prepare_stage(small_recipe(), "stage1", out)
    known = Source.open(source_uri(out, "captions", "train")).sample_id(1, 0)
    capsys.readouterr()
    plan = prepare_stage(small_recipe(f"stages.stage1.skip_samples=[captions/{known}]"), "stage1", out)
    assert plan.digest == first.digest
    assert f"leaves out 1 samples: captions/{known}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="captions/nobody"):
        prepare_stage(small_recipe(f"stages.stage1.skip_samples=[captions/{known}, captions/nobody]"), "stage1", out)


def test_a_plan_that_needs_more_cache_than_a_node_has_is_refused(out: str, monkeypatch: pytest.MonkeyPatch):
    plan = prepare_stage(small_recipe(), "stage1", out)
    need = plan.statistics["node_cache_bytes"]
    remote = "s3://bucket/run"
    for limit, refused in ((need, False), (need - 1, True)):
        monkeypatch.setenv(cache.BYTES, str(limit))
        stages._refuse_too_large(plan, out, "stage1")  # a folder is read in place
        if refused:
            with pytest.raises(PlanError, match=r"window_shards"):
                stages._refuse_too_large(plan, remote, "stage1")
        else:
            stages._refuse_too_large(plan, remote, "stage1")
    facts = plan.statistics
    assert 0 < facts["used_bytes"] <= facts["fetched_bytes"] * facts["epochs"]
    assert facts["read_amplification"] == pytest.approx(facts["fetched_bytes"] / facts["used_bytes"], abs=1e-3)


ERRORS: list[tuple[str, list[str], type[Exception], str]] = [
    (
        "stage1",
        ["stages.stage1.packing={length: 16, patch_budget: 1024, over_long: drop}"],
        PlanError,
        r"(?s)no sample of the source fits.*half of those that do not fit have over [1-9]",
    ),
    ("stage9", [], UsageError, "no such stage"),
]


@pytest.mark.parametrize(("stage", "overrides", "error", "message"), ERRORS)
def test_what_cannot_be_planned_is_told(stage: str, overrides: list[str], error: type, message: str, out: str):
    with pytest.raises(error, match=message):
        prepare_stage(small_recipe(*overrides), stage, out)
    assert not storage.exists(storage.join(out, stage, "plan", "plan.json"))


def test_the_recipe_as_shipped_names_files_that_the_corpus_has():
    recipe: Recipe = load_recipe("tiny")
    small = small_recipe()
    for name, source in recipe.prepare.sources.items():
        assert small.prepare.sources[name].path == source.path.replace("corpus://", "corpus://small/")

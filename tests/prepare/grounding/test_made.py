"""Sources made from other sources, from shards to shards: seeded, counted, resumed, training pictures only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cli.data import funnel_table
from pipelines.prepare.grounding.made import make
from pipelines.prepare.grounding.masks import mask_of
from pipelines.prepare.ingest import prepare_data
from pipelines.prepare.stage import prepare_stage
from pipelines.report.facts import Facts
from pipelines.report.page import _funnel, _made
from tests.prepare.builders import a_recipe, a_source, small_recipe
from tests.prepare.grounding.builders import (
    a_picture_of,
    boxed,
    disc,
    masked,
    noise,
    objects_in,
    read_back,
    stored,
    words_in,
)  # fmt: skip
from tests.prepare.through import trained
from trainer import storage
from trainer.data import kept
from trainer.data.sample import Mask, Sample
from trainer.data.shards import Source
from trainer.errors import DataError, RecipeError
from trainer.recipe import Recipe
from trainer.resolve import load_recipe

PASTE = {"samples": 12, "complete": "vocabulary", "encode": "png"}


def a_made_recipe(grounding: dict[str, Any], *overrides: str, path: str = "source://mine", **more: Any) -> Recipe:
    """The source `mine`, and `made` from it."""
    made = {"format": "grounding", "path": path, "kind": "grounding", "rendering": "chat", "grounding": grounding}
    mine = a_source("coco", "unread.json", held_out="unread.json").model_dump(mode="json", exclude_none=True)
    sources = json.dumps({"mine": mine, "made": {**made, **more}})
    return a_recipe(a_source("coco"), f"prepare.sources={sources}", *overrides)


def pictures(count: int = 6, split: str = "train") -> list[tuple[Sample, list[bytes]]]:
    """A disc and a box each; labels alternate."""
    found = []
    for number in range(count):
        inside = disc(80, 60, 20 + 5 * number, 25, 9 + number)
        things = (masked(f"disc {number % 2}", inside), boxed("box", 60, 40, 75, 55))
        found.append(
            a_picture_of(f"{split}-{number}", noise(80, 60, number + 50 * (split != "train")), *things, split=split)
        )
    return found


@pytest.fixture
def out(tmp_path: Path) -> str:
    stored(str(tmp_path), "mine", pictures())
    stored(str(tmp_path), "mine", pictures(3, "held_out"), "held_out")
    return str(tmp_path)


def uri(out: str, name: str = "made", split: str = "train") -> str:
    return storage.join(out, "data", "sources", name, split)


def bytes_of(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def made(out: str, grounding: dict[str, Any], *overrides: str, **more: Any) -> dict[str, Any]:
    return make(a_made_recipe(grounding, *overrides, **more), out, "made", [])


# ---------------------------------------------------------------- copy-paste


def test_pasted_pictures_differ_from_theirs_inside_the_pasted_masks_alone(out: str):
    funnel = made(out, {"copy_paste": PASTE})["train"]
    by_name = {f"mine/{sample.id}": pixels for sample, pixels in read_back(uri(out, "mine"))}
    found = read_back(uri(out))
    whole = 0
    assert len(found) == funnel["kept"] > 6 and funnel["made"]["pasted"] >= funnel["kept"]
    for sample, pixels in found:
        told = sample.meta["copy_paste"]
        before = by_name[told["onto"]]
        changed = (pixels != before).any(2)
        height, width = before.shape[:2]
        things = objects_in(sample)
        inside = np.zeros((height, width), bool)
        for thing in things:
            if isinstance(thing.at, Mask):
                inside |= mask_of(thing.at, width, height)
        if "removed" not in told and "incomplete" not in sample.meta:
            assert not (changed & ~inside).any() and changed.any()
            whole += 1
        assert all(item["from"] in by_name for item in told["pasted"])
        assert {thing.label for thing in things}.isdisjoint(sample.meta.get("incomplete", ()))
        assert all(label in words_in(sample, 0) for label in {thing.label for thing in things})
    assert whole > 3


def test_what_is_read_kept_and_not_pasted_is_counted(out: str):
    funnel = made(out, {"copy_paste": {**PASTE, "samples": 40, "objects": [2, 2]}})["train"]
    assert funnel["read"] == 40 == funnel["kept"] + sum(funnel["bad"].values())
    unused = {name: count for name, count in funnel["made"].items() if name.startswith("unused")}
    assert unused["unused: no-mask"] > 20, "every second object is a box"
    assert sum(unused.values()) + funnel["made"]["pasted"] == 80
    marker = storage.read_json(storage.join(uri(out), "input.json"))
    assert marker["funnel"] == funnel


def test_a_picture_that_only_decoding_refuses_is_left_out_and_counted(tmp_path: Path):
    """What verify_media: header lets through."""
    cut = [half(sample, data) for sample, [data] in pictures(3)]
    stored(str(tmp_path), "mine", cut)
    with pytest.raises(DataError, match="12 undecodable"):
        made(str(tmp_path), {"copy_paste": PASTE})
    stored(str(tmp_path), "mine", [*pictures(6)[3:], *cut])
    funnel = made(str(tmp_path), {"copy_paste": PASTE})["train"]
    assert funnel["kept"] and funnel["bad"]["undecodable"] and funnel["made"]["unused: undecodable"]


def half(sample: Sample, data: bytes) -> tuple[Sample, list[bytes]]:
    data = data[: len(data) // 2]
    file = sample.media[0].model_copy(update={"digest": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)})
    return sample.model_copy(update={"media": (file,)}), [data]


def test_boxes_are_pasted_whole_where_the_recipe_says_so(out: str):
    funnel = made(out, {"copy_paste": {**PASTE, "without_mask": "rectangle"}})["train"]
    assert "unused: no-mask" not in funnel["made"]
    pasted = [item for sample, _ in read_back(uri(out)) for item in sample.meta["copy_paste"]["pasted"]]
    assert {item["masked"] for item in pasted} == {True, False}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(out: str, tmp_path: Path):
    made(out, {"copy_paste": PASTE})
    first = bytes_of(uri(out))
    storage.remove_tree(uri(out))
    made(out, {"copy_paste": PASTE})
    assert bytes_of(uri(out)) == first
    made(out, {"copy_paste": PASTE}, "seed=77")
    assert bytes_of(uri(out))["00000.tar"] != first["00000.tar"], "negative control"


def test_what_is_there_is_recognised_until_input_or_settings_change(out: str, capsys: pytest.CaptureFixture[str]):
    funnel = made(out, {"copy_paste": PASTE})
    before = bytes_of(uri(out))
    capsys.readouterr()
    assert made(out, {"copy_paste": PASTE}) == funnel
    assert "already there" in capsys.readouterr().out and bytes_of(uri(out)) == before
    made(out, {"copy_paste": {**PASTE, "max_hidden": 0.1}})
    assert "already there" not in capsys.readouterr().out
    source = Source.open(uri(out, "mine"))
    reason = np.array(["words"] + [""] * (source.num_samples - 1), dtype=object)
    kept.write(source, reason, key="k" * 12, funnel={})
    made(out, {"copy_paste": {**PASTE, "max_hidden": 0.1}})
    told = capsys.readouterr().out
    assert "already there" not in told, "curation has dropped a picture"
    assert "mine/train-0" not in json.dumps([sample.meta for sample, _ in read_back(uri(out))])


def test_an_interrupted_step_is_made_again_to_the_same_bytes(out: str, monkeypatch: pytest.MonkeyPatch):
    made(out, {"copy_paste": PASTE})
    whole = bytes_of(uri(out))
    storage.remove_tree(uri(out))
    from trainer.data.shards import ShardWriter

    real = ShardWriter.add
    calls = []

    def broken(self, sample, files):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, sample, files)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", broken)
        with pytest.raises(KeyboardInterrupt):
            made(out, {"copy_paste": PASTE})
    assert not storage.exists(storage.join(uri(out), "source.json"))
    made(out, {"copy_paste": PASTE})
    assert bytes_of(uri(out)) == whole


def test_held_out_pictures_are_neither_cut_from_nor_pasted_onto(out: str):
    with pytest.raises(RecipeError, match="copies are pasted into training pictures only"):
        a_made_recipe({"copy_paste": PASTE}, held_out="source://mine")
    stored(out, "mine", pictures(4, "held_out"), "train")  # held-out samples where training ones should be
    with pytest.raises(DataError, match="held-out"):
        made(out, {"copy_paste": PASTE})
    stored(out, "mine", pictures(4), "train")
    assert made(out, {"copy_paste": PASTE})["train"]["kept"], "negative control"


def test_an_object_goes_only_where_its_label_is_known(out: str):
    stored(out, "mine", [a_picture_of("a", noise(80, 60), masked("cat", disc(80, 60, 20, 20, 12)))])
    stored(out, "other", [a_picture_of("b", noise(80, 60), masked("dog", disc(80, 60, 60, 30, 12)))])
    grounding = {"copy_paste": {**PASTE, "onto": "other"}}
    mine = a_source("coco").model_dump(mode="json", exclude_none=True)
    made_ = {"format": "grounding", "path": "source://mine", "kind": "grounding", "rendering": "chat"}
    both = json.dumps({"mine": mine, "other": mine, "made": {**made_, "grounding": grounding}})
    recipe = a_recipe(a_source("coco"), f"prepare.sources={both}")
    with pytest.raises(DataError, match="unknown-there"):
        make(recipe, out, "made", [])
    stored(out, "other", [
        a_picture_of("b", noise(80, 60), masked("dog", disc(80, 60, 60, 30, 12))),
        a_picture_of("c", noise(80, 60, 4), masked("cat", disc(80, 60, 60, 30, 5))),
    ])  # fmt: skip
    assert make(recipe, out, "made", [])["train"]["kept"], "cat is of the other's vocabulary now"


def test_expressions_do_not_travel(out: str):
    left = a_picture_of(
        "a", noise(80, 60), masked("left one", disc(80, 60, 20, 20, 12)), meta={"labels": "expressions"}
    )
    stored(out, "mine", [left])
    with pytest.raises(DataError, match="expression"):
        made(out, {"copy_paste": PASTE})


def test_the_counts_are_in_the_table_and_in_the_report(tmp_path: Path):
    part = {"read": 4, "kept": 3, "bad": {"nothing-to-paste": 1}, "made": {"pasted": 5, "unused: no-mask": 2}}
    assert "5 pasted, 2 unused: no-mask" in funnel_table({"made": {"train": part}})
    facts = Facts(str(tmp_path), load_recipe("tiny"), "", None, [], funnel={"made": {"train": part}})
    assert "unused: no-mask" in _made(facts) and "nothing-to-paste" in _funnel(facts)
    assert _made(Facts(str(tmp_path), load_recipe("tiny"), "", None, [], funnel={})) == ""


# ---------------------------------------------------------------- questions


def test_questions_of_training_and_held_out_pictures_are_kept_apart(out: str):
    funnel = made(out, {"questions": {"complete": "vocabulary", "per_picture": 5}}, held_out="source://mine")
    assert set(funnel) == {"train", "held_out"}
    for split in ("train", "held_out"):
        found = [sample for sample, _ in read_back(uri(out, split=split))]
        assert len(found) == funnel[split]["kept"] and {sample.split for sample in found} == {split}
        assert all(sample.meta["made_from"].startswith(f"mine/{split}") for sample in found)
    counts = funnel["train"]["made"]
    assert counts["asked detect"] == counts["asked count"] == 6
    again = bytes_of(uri(out))
    storage.remove_tree(uri(out))
    made(out, {"questions": {"complete": "vocabulary", "per_picture": 5}}, held_out="source://mine")
    assert bytes_of(uri(out)) == again


def test_a_form_that_the_family_does_not_write_is_refused(out: str):
    grounding = {"questions": {"complete": "vocabulary", "forms": {"json": 1}}}
    assert made(out, grounding)["train"]["kept"]
    recipe = a_made_recipe(grounding).model_copy(update={"family": "qwen2_vl"})
    with pytest.raises(RecipeError, match="json of a family that writes places as tagged"):
        make(recipe, out, "made", [])


def test_answers_reach_the_tokens_as_boxes_of_the_resized_picture(out: str, tmp_path: Path):
    made(out, {"questions": {"complete": "vocabulary", "tasks": {"refer": 1}, "per_picture": 1}})
    sample, pixels = read_back(uri(out))[0]
    from tests.prepare.grounding.builders import png

    [thing] = objects_in(sample)
    way = trained(sample, [png(pixels)], tmp_path / "through")[0]
    box = json.loads(way.targets)[0]["bbox_2d"]
    back = [value * (80, 60)[at % 2] / way.grids[0][at % 2] for at, value in enumerate(box)]
    assert back == pytest.approx(thing.at.xyxy, abs=1)  # type: ignore[union-attr]


# ---------------------------------------------------------------- the recipe

WRONG = [
    ({"path": "mine"}, "path: source://NAME of a source"),
    ({"path": "source://gone"}, "no such source 'gone'"),
    ({"path": "source://made"}, "made from itself: made for made"),
    ({"kind": "caption"}, "kind grounding or instruction"),
    ({"rendering": "document"}, "rendering chat"),
    ({"curate": {"dedup": {"exact": True}}}, "curate: has no meaning"),
    ({"format": "coco"}, "the format grounding has this section"),
    ({"grounding": None}, "the format grounding has this section"),
    ({"grounding": {}}, "state one of questions, copy_paste, labels"),
    ({"grounding": {"copy_paste": {**PASTE, "onto": "gone"}}}, "grounding.copy_paste.onto: no such source"),
    ({"grounding": {"copy_paste": {**PASTE, "scale": [2, 1]}}}, "scale: the least, 2.0, is above the most"),
    ({"grounding": {"copy_paste": {**PASTE, "max_hiden": 1}}}, "max_hiden: unknown key"),
    ({"grounding": {"copy_paste": {**PASTE, "max_hidden": 1.5}}}, "max_hidden"),
    ({"grounding": {"labels": {"record": "x", "min_score": 0.1}}}, "doubt_score 0.25 is above min_score"),
]


@pytest.mark.parametrize("change, told", WRONG, ids=[told for _, told in WRONG])
def test_what_a_recipe_cannot_mean_is_told_with_its_field(change: dict[str, Any], told: str):
    good = {"path": "source://mine", "grounding": {"copy_paste": PASTE}}
    a_made_recipe(**good)
    with pytest.raises(RecipeError, match=told):
        a_made_recipe(**{**good, **change})


def test_a_recipe_with_made_sources_goes_from_files_to_a_plan(prepared: str, tmp_path: Path):
    """The corpus' own grounding files, through ingest, copy-paste, questions, counts and a plan."""
    base = "format: grounding, kind: grounding, rendering: chat"
    pasted, asked = "{copy_paste: {samples: 10, complete: vocabulary}}", "{questions: {complete: vocabulary}}"
    recipe = small_recipe(
        f'prepare.sources.pasted={{{base}, path: "source://grounding", grounding: {pasted}}}',
        f'prepare.sources.asked={{{base}, path: "source://pasted", grounding: {asked}}}',
        "stages.stage2.data={pasted: 1, asked: 1}",
        "stages.stage2.schedule.steps=2",
    )
    import shutil

    shutil.copytree(Path(prepared) / "data", tmp_path / "data", copy_function=shutil.copy2)
    prepare_data(recipe, str(tmp_path))
    funnel = json.loads((tmp_path / "data" / "funnel.json").read_text())
    assert funnel["pasted"]["train"]["kept"] == 10 and funnel["asked"]["train"]["kept"] == 20
    plan = prepare_stage(recipe, "stage2", str(tmp_path))
    assert {row["name"]: row["num_dropped"] for row in plan.sources} == {"pasted": 0, "asked": 0}


def test_load_recipe_reads_the_section_from_yaml():
    recipe = load_recipe(
        "tiny",
        ['prepare.sources.pasted={format: grounding, path: "source://grounding", kind: grounding, rendering: chat, '
         "grounding: {copy_paste: {samples: 5, complete: vocabulary}}}"],
    )  # fmt: skip
    grounding = recipe.prepare.sources["pasted"].grounding
    assert grounding is not None and grounding.copy_paste is not None and grounding.copy_paste.samples == 5

"""A recipe is checked whole before anything is written: every problem at once, by field path, with a suggestion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.curation import Clean
from trainer.errors import RecipeError, UsageError
from trainer.fields import Strict, identity, result
from trainer.recipe import GROUPS, STAGES, Recipe
from trainer.resolve import (
    changes,
    digest,
    fields,
    from_resolved,
    json_schema,
    load_recipe,
    read_text,
    resolved,
    shipped,
    stage_digest,
    stage_fields,
)

OF_BEFORE = ("stages.sft.balance=null", "stages.sft.sampling.checks=null")
FULL = ("qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_72b")


def problems(*overrides: str, recipe: str = "tiny") -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return dict(caught.value.problems)


def test_every_shipped_recipe_is_valid_and_has_the_name_of_its_file():
    assert {*FULL, "tiny", "tiny_smoke", "qwen2_5_vl_7b_finetune"} <= set(shipped())
    for name in shipped():
        assert load_recipe(name).name == name


@pytest.mark.parametrize("name", FULL)
def test_the_full_recipes_have_the_freeze_plan_and_packing_of_the_report(name: str):
    stages = load_recipe(name).stages.named()
    assert tuple(stages) == STAGES
    want = {
        "stage1": (True, True, False, 8192),
        "stage2": (True, True, True, 8192),
        "stage3": (True, True, True, 32768),
        "sft": (False, True, True, 8192),
        "dpo": (False, True, True, 8192),
    }
    got = {key: (*(getattr(s.train, g) for g in GROUPS), s.packing.length) for key, s in stages.items()}
    assert got == want


def test_every_number_of_the_real_recipes_stands_beside_its_source_or_the_word_ours():
    for name in (*FULL, "qwen2_5_vl_7b_finetune"):
        head = read_text(name)[0].split("name:")[0]
        assert "ours" in head, "the header says what numbers without a source are"
        assert "arXiv 2502.13923" in head


@pytest.mark.parametrize("name", [*FULL, "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"])
def test_real_recipes_use_what_they_make_and_need_no_judge_without_it(name: str):
    recipe = load_recipe(name)
    made = {source for source, stated in recipe.prepare.sources.items() if stated.path.startswith("source://")}
    used = {source for stage in recipe.stages.named().values() for source in stage.data}
    assert {"asked", "reasoned", "captioned"} <= made <= used
    judged = ("reasoned", "captioned")
    without = [f"prepare.sources.{one}=null" for one in judged] + [f"stages.stage3.data.{one}=null" for one in judged]
    left = load_recipe(name, without).prepare.sources.values()
    assert not any(source.reasoning or source.captioning for source in left)
    with pytest.raises(RecipeError, match="no such source"):
        load_recipe(name, without[:2])


def test_unknown_keys_bad_values_and_wrong_names_are_reported_together_by_path():
    found = problems(
        "stages.stage1.trian.llm=true", "stages.sft.optim.lr=-1", "prepare.sources.text.kind=txt", "stages.dpo.dpo=1"
    )
    assert "did you mean train?" in found["stages.stage1.trian"]
    assert "greater than 0" in found["stages.sft.optim.lr"]
    assert {"prepare.sources.text.kind", "stages.dpo.dpo"} <= found.keys()


@pytest.mark.parametrize(
    ("overrides", "path", "message"),
    [
        (["stages.stage1.train={vision: false, merger: false, llm: false}"], "stages.stage1.train", "trains nothing"),
        (["stages.stage1.data.nosuch=1"], "stages.stage1.data.nosuch", "no such source"),
        (["stages.stage1.data.preferences=1"], "stages.stage1.data.preferences", "go into dpo"),
        (
            ["prepare.sources.captions.curate.score={scorer: judge}"],
            "prepare.sources.captions.curate.score.scorer",
            "judge needs the section judge",
        ),
        (["stages.dpo.data.preferences=2"], "stages.dpo.data.preferences", "a pair is used once"),
        (["stages.stage1.data.captions=1e9"], "stages.stage1.data.captions", "less than or equal to 1000"),
        (["stages.stage1.data.sampled=1"], "stages.stage1.data.sampled", "no sampling"),
        (["stages.stage1.optim.lr_of.llm=1e-3"], "stages.stage1", "train.llm is false"),
        (["stages.stage1.schedule.packs_per_step=3"], "stages.stage1.schedule.packs_per_step", "multiple of"),
        (["stages.stage1.compute.gpus_per_node=64"], "prepare.lanes", "idle"),
        (["stages.stage1.schedule.tokens=9"], "stages.stage1.schedule", "not both"),
        (["model.base=s3://x"], "model", "either base"),
        (["stages.stage1.pixels.image_min=999999999"], "stages.stage1.pixels", "is above image_max"),
        (["name=Bad Name"], "name", "match"),
        (["stages.stage1.optim.lr=true"], "stages.stage1.optim.lr", "expected a number, got True"),
        (["stages.stage1.data.captions=true"], "stages.stage1.data.captions", "expected a number, got True"),
        (["stages.stage1.optim.betas=[true, 0.9]"], "stages.stage1.optim.betas.0", "expected a number, got True"),
        (["stages.stage1.train.vision=1"], "stages.stage1.train.vision", "expected true or false, got 1"),
        (["stages.stage1.packing.length=16777217"], "stages.stage1.packing.length", "or equal to 16777216, got"),
    ],
)
def test_a_bad_recipe_says_where_and_what(overrides: list[str], path: str, message: str):
    assert message in problems(*overrides)[path]


def test_an_override_sets_one_field_and_keeps_the_rest():
    before = resolved(load_recipe("tiny"))
    after = resolved(load_recipe("tiny", ["stages.sft.optim.lr=1e-5"]))
    assert after["stages"]["sft"]["optim"]["lr"] == 1e-5
    after["stages"]["sft"]["optim"]["lr"] = before["stages"]["sft"]["optim"]["lr"]
    assert {**after, "sha256": ""} == {**before, "sha256": ""}


@pytest.mark.parametrize("override", ["no-equals", "=1", "stages.sft.optim.lr.x=1", "name=[unclosed"])
def test_a_malformed_override_is_a_usage_error(override: str):
    with pytest.raises(UsageError):
        load_recipe("tiny", [override])


def test_a_key_given_twice_is_an_error_instead_of_the_last_one_winning():
    with pytest.raises(RecipeError, match="given twice"):
        load_recipe("name: a\nname: b\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping, got nothing: the file is empty"),
        ("# only words\n", "expected a mapping, got nothing: the file is empty"),
        ("- a\n- b\n", "expected a mapping, got a list"),
        ("words\n", "expected a mapping, got plain text"),
        ("? [a, b]\n: c\n", "a key must be a word, got a list"),
        ("name: x\n? {a: b}\n: c\n", "line 2: a key must be a word, got a dict"),
        ("a: {b: 1, b: 2}\n", "b: given twice in one mapping"),
        ("a: 2024-13-45\n", "not YAML: month must be in 1..12"),
        ("a: &x [*x]\n", "not YAML"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: {\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_message_that_names_it(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    told = str(error.value)
    assert message in told and str(path) in told
    assert not any(line.strip().startswith(":") for line in told.splitlines())


def test_a_problem_without_a_path_does_not_begin_with_a_colon():
    assert str(RecipeError([("", "words")])) == "the recipe has 1 problem\n    words"


def test_an_override_whose_value_gives_a_key_twice_is_told_with_the_override():
    with pytest.raises(RecipeError, match=r"--set stages.sft.data=\{a: 1, a: 2\} has 1 problem"):
        load_recipe("tiny", ["stages.sft.data={a: 1, a: 2}"])


def test_an_unknown_recipe_suggests_a_shipped_one():
    with pytest.raises(UsageError, match="did you mean tiny"):
        load_recipe("tinny")


def test_yaml_text_a_file_and_a_shipped_name_give_the_same_recipe(tmp_path: Path):
    text, _ = read_text("tiny")
    (tmp_path / "mine.yaml").write_text(text)
    want = resolved(load_recipe("tiny"))
    assert resolved(load_recipe(text)) == resolved(load_recipe(str(tmp_path / "mine.yaml"))) == want


def test_a_resolved_recipe_reads_back_to_itself_and_an_edited_one_is_refused():
    content = resolved(load_recipe("tiny"))
    again = from_resolved(json.loads(json.dumps(content)), where="recipe.json")
    assert resolved(again) == content
    content["seed"] += 1
    with pytest.raises(RecipeError, match="edited"):
        from_resolved(content, where="recipe.json")


def test_a_resolved_recipe_is_itself_a_recipe():
    content = resolved(load_recipe("tiny"))
    assert resolved(load_recipe(yaml.safe_dump(content))) == content


def test_every_field_of_a_recipe_has_a_role():
    for name in shipped():
        recipe = load_recipe(name)
        roles = [fields(recipe, role) for role in ("result", "execution", "note")]
        assert all(roles)
        assert sum(map(len, roles)) == len({path for found in roles for path in found})


def digest_of(*overrides: str) -> str:
    recipe = load_recipe("tiny", overrides)
    return stage_digest(recipe, recipe.stages.named()["sft"], parent_model="a", data="b")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("stages.sft.compute.node_pool=other", True),
        ("stages.sft.checkpoint.every_steps=7", True),
        ("stages.stage1.optim.lr=9e-9", True),
        ("description=words", True),
        ("stages.sft.optim.lr=9e-9", False),
        ("stages.sft.train.merger=false", False),
        ("seed=5", False),
    ],
)
def test_a_stage_digest_covers_its_own_result_fields_and_nothing_else(override: str, same: bool):
    assert (digest_of() == digest_of(override)) is same


def test_a_changed_field_is_named_and_a_field_that_the_stored_stage_lacks_is_not_a_change():
    recipe = load_recipe("tiny")
    stored = stage_fields(recipe, recipe.stages.named()["sft"])
    asked = {**stored, "optim.lr": 1.0, "new.field": 1}
    assert [(c.field, c.asked) for c in changes(stored, asked)] == [("optim.lr", 1.0)]


class Old(Strict):
    steps: int = result(ge=1)


class New(Old):
    """The same section after two fields were added to it."""

    checks: Clean | None = result(None, later=True)
    extra: dict[str, list[Clean]] = result(default_factory=dict)
    share: float = result(0.5, later=True)


class Careless(Old):
    share: float = result(0.5)


def test_a_field_added_later_changes_no_digest_while_it_has_its_default():
    old, new = identity(Old(steps=3)), identity(New(steps=3))
    assert new == {**old, "extra": {}} and digest(identity(Careless(steps=3))) != digest(old), "negative control"
    assert identity(New(steps=3, share=0.25))["share"] == 0.25
    inside = New(steps=3, extra={"a": [Clean(min_words=4)]})
    assert identity(inside)["extra"]["a"][0]["min_words"] == 4
    assert fields(New(steps=3), "result", unsaid=False).keys() == {"steps", "extra"}
    assert fields(New(steps=3), "result").keys() == {"steps", "extra", "share", "checks"}


# What the code before these fields computed; a field that is added without `later` shows here.
STAGE_DIGESTS = {
    "tiny": "0184cf989bbc00bca9634966fce0ca6b6a24d92633e12bc3597e59040027fc3f",
    "qwen2_5_vl_7b": "b69e5f090d28be6918ffe4039fe60f3db2d654491462eb7cbb37f263244fc115",
}


@pytest.mark.parametrize("name", STAGE_DIGESTS)
def test_stages_that_were_begun_before_balance_and_checks_were_added_go_on(name: str):
    recipe = load_recipe(name, OF_BEFORE)
    stage = recipe.stages.named()["sft"]
    assert stage_digest(recipe, stage, parent_model="a", data="b") == STAGE_DIGESTS[name]
    content = resolved(recipe)
    for path in (["balance"], ["sampling", "checks"]):
        *above, last = path
        at = content["stages"]["sft"]
        for key in above:
            at = at[key]
        assert at.pop(last) is None
    assert from_resolved(content, where="recipe.json") == recipe, "stored before the fields were there"
    asserted = load_recipe(name, [*OF_BEFORE, "stages.sft.balance={text: 0.5}"])
    assert stage_digest(asserted, asserted.stages.named()["sft"], parent_model="a", data="b") == STAGE_DIGESTS[name]
    said = load_recipe(name, [*OF_BEFORE, "stages.sft.sampling.checks={max_words: 9}"])
    assert stage_digest(said, said.stages.named()["sft"], parent_model="a", data="b") != STAGE_DIGESTS[name]


def test_a_section_that_is_switched_on_or_off_is_a_change():
    checks = "stages.sft.sampling.checks={max_words: 9}"
    before, asked = (load_recipe("tiny", more) for more in (OF_BEFORE, [*OF_BEFORE, checks]))
    off, on = (stage_fields(one, one.stages.named()["sft"]) for one in (before, asked))
    assert ("sampling.checks.max_words", 9) in [(c.field, c.asked) for c in changes(off, on)]
    assert ("sampling.checks.max_words", 9, None) in [(c.field, c.stored, c.asked) for c in changes(on, off)]
    without = {key: value for key, value in off.items() if not key.startswith("sampling.")} | {"sampling": None}
    assert "sampling.requests" in {c.field for c in changes(without, off)}
    assert changes(off, off) == changes(on, on) == []


def test_the_json_schema_accepts_shipped_recipes_and_refuses_an_unknown_key():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    content = yaml.safe_load(read_text("qwen2_5_vl_7b")[0])
    assert not list(validator.iter_errors(content))
    content["stages"]["stage1"]["trian"] = {}
    assert list(validator.iter_errors(content))


def test_the_model_is_frozen_after_validation():
    recipe = load_recipe("tiny")
    assert isinstance(recipe, Recipe)
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_a_recipe_that_extends_another_keeps_what_it_does_not_name():
    recipe = load_recipe("extends: tiny\nname: mine\nstages:\n  sft: {optim: {lr: 7e-5}}\n  dpo: null\n")
    tiny = load_recipe("tiny")
    assert recipe.stages.sft.optim.lr == 7e-5
    assert recipe.stages.sft.schedule == tiny.stages.sft.schedule
    assert recipe.stages.dpo is None
    assert recipe.stages.stage1 == tiny.stages.stage1


def test_the_config_of_another_model_replaces_the_one_below_whole():
    below = load_recipe("tiny").model.config
    assert isinstance(below, dict)
    other = "extends: tiny\nname: mine\nmodel:\n  config: {model_type: %s, text_config: {hidden_size: 64}}\n"
    assert load_recipe(other % "llava").model.config == {"model_type": "llava", "text_config": {"hidden_size": 64}}
    same = load_recipe(other % below["model_type"]).model.config
    assert isinstance(same, dict) and same["vision_config"] == below["vision_config"]
    assert same["text_config"] == below["text_config"] | {"hidden_size": 64}


def test_null_takes_a_source_out_of_what_a_recipe_extends():
    text = "extends: tiny\nname: mine\nprepare: {sources: {videos: null}}\nstages:\n"
    text += "".join(f"  {stage}: {{data: {{videos: null}}}}\n" for stage in ("stage2", "stage3"))
    recipe = load_recipe(text)
    assert "videos" not in recipe.prepare.sources and "videos" not in recipe.stages.stage2.data
    with pytest.raises(RecipeError, match=r"stages\.stage3\.data\.videos: no such source"):
        load_recipe(text.rpartition("  stage3")[0])


def test_recipes_that_extend_each_other_are_an_error(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path}/a.yaml\n")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("page", ["README.md", "trainer/recipes/README.md"])
def test_the_recipes_in_the_readmes_are_valid(page: str):
    texts = Path(__file__).parents[1].joinpath(page).read_text().split("```yaml\n")[1:]
    assert texts
    for text in texts:
        assert load_recipe(text.partition("```")[0]).name == "mine"


def test_what_is_no_text_file_is_a_usage_error(tmp_path: Path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x9c")
    for ref in (str(tmp_path), str(tmp_path / "binary.yaml")):
        with pytest.raises(UsageError, match="not a recipe"):
            load_recipe(ref)


def test_numbers_beyond_what_the_programs_can_hold_are_refused():
    found = problems("seed=99999999999999999999", "stages.sft.packing.length=99999999999", "prepare.variants=65")
    assert {"seed", "stages.sft.packing.length", "prepare.variants"} == set(found)

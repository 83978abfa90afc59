"""What a run of tiny_smoke leaves: every step's result, the report, MLflow, the promises of the tiny recipe."""

from __future__ import annotations

import hashlib
import io
import math
import re
import tarfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from PIL import Image

from tests.integration.runs import Finished, files_below, qwenvl
from trainer import handover
from trainer.data.layout import stage_rules
from trainer.data.loader import Loader
from trainer.data.plan import Plan, assign
from trainer.data.tokenizer import Tokenizer
from trainer.errors import StageMismatch
from trainer.models.config import family_of, tokenizer_uri
from trainer.recipe import GROUPS, STAGES

STEPS = (
    *("prepare-data", "init", *(f"prepare-{stage}" for stage in STAGES), *STAGES, "export", "evaluate", "report"),
    *(f"prepare-{stage}-{part}" for stage in ("sft", "dpo") for part in ("requests", "answers", "select")),
)
RUN_KEYS = {"recipe", "digest", "wall_s", "stages", "export", "evaluation", "media_matter", "warnings"}
STAGE_KEYS = {
    *("name", "freeze", "packing_length", "patch_budget", "world_size", "steps", "tokens", "target_tokens"),
    *("padding_tokens", "fill", "loss_first", "loss_last", "frozen_unchanged", "trained_changed", "checkpoint"),
    *("plan_digest", "resumed_from", "mlflow_run_id"),
}
RANKS = 2
SAMPLING = ("sft", "dpo")


def test_every_step_of_the_pipeline_ran_once(smoke: Finished) -> None:
    ended = re.findall(r"\[ ?\d+/21\] (\S+): done", smoke.told)
    assert sorted(ended) == sorted(STEPS)
    assert "finished in" in smoke.told and "Traceback" not in smoke.told


def test_no_step_compiled_anything(smoke: Finished) -> None:
    """So a compiler is no prerequisite; torch and DeepSpeed build into this folder what they build."""
    extensions = smoke.out.with_name("extensions")
    assert list(extensions.rglob("*")) == []


# ---------------------------------------------------------------- run.json, report, shards


def test_run_json_has_exactly_the_keys_of_the_contract(smoke: Finished) -> None:
    found = smoke.json("run.json")
    assert set(found) == RUN_KEYS
    assert [set(stage) for stage in found["stages"]] == [STAGE_KEYS] * 4 + [STAGE_KEYS | {"accuracy", "margin"}]
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    assert found["recipe"] == "tiny_smoke" and found["digest"] == smoke.json("recipe.json")["sha256"]
    assert 0 < found["wall_s"] <= smoke.wall_s
    assert found["export"]["stage"] == "dpo" and (smoke.out / found["export"]["uri"] / "config.json").exists()
    kinds = {source.kind for source in smoke.recipe.prepare.sources.values()}
    assert set(found["evaluation"]) == kinds
    for rows in found["evaluation"].values():
        assert all(set(row) == {"before", "after", "n"} for row in rows.values()) and "loss" in rows
    assert set(found["media_matter"]) == {"stage1", "dpo"}
    for row in [row for kinds in found["media_matter"].values() for row in kinds.values()]:
        assert set(row) == {"right", "shuffled", "n", "ci95"} and row["ci95"][0] <= row["ci95"][1]


@pytest.mark.parametrize("name", STAGES)
def test_the_figures_of_a_stage_are_those_of_its_recipe_plan_and_result(smoke: Finished, name: str) -> None:
    stage = smoke.recipe.stages.named()[name]
    (found,) = [entry for entry in smoke.json("run.json")["stages"] if entry["name"] == name]
    plan = Plan.read(str(smoke.out / name / "plan"))
    packs = plan.num_packs  # one pass may end with a step of fewer packs than the others
    assert found["freeze"] == {group: ("frozen", "trained")[getattr(stage.train, group)] for group in GROUPS}
    assert (found["packing_length"], found["patch_budget"]) == (stage.packing.length, stage.packing.patch_budget)
    assert found["world_size"] == RANKS
    assert found["steps"] == plan.num_steps and found["plan_digest"] == plan.digest
    assert found["tokens"] == sum(plan.tokens(step) for step in range(plan.num_steps))
    assert found["tokens"] + found["padding_tokens"] == packs * stage.packing.length
    assert found["fill"] == pytest.approx(found["tokens"] / (packs * stage.packing.length))
    assert found["fill"] > (0.8 if name == "dpo" else 0.9)  # some forty pairs, each of them once, make few packs
    assert 0 < found["target_tokens"] < found["tokens"]
    assert math.isfinite(found["loss_first"]) and math.isfinite(found["loss_last"])
    assert found["frozen_unchanged"] is True and found["trained_changed"] is True
    assert (smoke.out / found["checkpoint"]).is_file()
    assert found["resumed_from"] is None
    assert re.fullmatch(r"[0-9a-f]{32}", found["mlflow_run_id"] or ""), "MLflow's id of the stage"


@pytest.mark.parametrize("name", STAGES)
def test_the_freeze_proof_says_what_the_recipe_says(smoke: Finished, name: str) -> None:
    stage, result = smoke.recipe.stages.named()[name], handover.read(str(smoke.out), name, verify="full")
    for row in result.freeze_table:
        if row.state == "constant":
            continue
        trained = getattr(stage.train, row.group)
        assert row.state == ("trained" if trained else "frozen")
        assert (row.digest_before != row.digest_after) is trained
    assert {row.group for row in result.freeze_table} >= set(GROUPS)


def test_the_first_weights_of_each_group_are_named(smoke: Finished) -> None:
    origins = [handover.read(str(smoke.out), name).init_origin for name in STAGES]
    assert all(set(origin) == set(GROUPS) and origin == origins[0] for origin in origins)
    assert origins[0]["merger"] == "random"


class Loads(HTMLParser):
    """Addresses that a browser would load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            loads = name in ("src", "srcset", "poster", "data", "xlink:href") or (name == "href" and tag != "a")
            if loads and value and not value.startswith(("data:", "#")):
                self.found.append(value)


def loads_of(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    return parser.found + re.findall(r"@import[^;]*|url\((?!['\"]?(?:data:|#))[^)]*\)", page)


def test_the_report_is_one_page_that_loads_nothing(smoke: Finished) -> None:
    page = (smoke.out / "report.html").read_text()
    assert loads_of(page) == []
    assert loads_of('<link href="https://x/a.css"><img src="b.png"><style>@import "c"; d { e: url(f) }</style>') == [
        *("https://x/a.css", "b.png", '@import "c"', "url(f)")
    ]
    for stage in STAGES:
        digest = handover.result_digest(handover.read(str(smoke.out), stage))
        assert stage in page and digest[:10] in page


def test_shards_are_tar_files_whose_digests_are_in_the_manifest(smoke: Finished) -> None:
    seen = 0
    for manifest in sorted((smoke.out / "data" / "sources").glob("*/*/source.json")):
        for shard in smoke.json(*manifest.relative_to(smoke.out).parts)["shards"]:
            path = manifest.with_name(f"{shard['name']}.tar")
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
            with tarfile.open(path) as tar:
                names = tar.getnames()
                assert all(member.mtime == 0 for member in tar)
            keys = {name.partition(".")[0] for name in names}
            index = parquet.read_table(path.with_suffix(".index.parquet"))
            assert len(keys) == shard["num_samples"] == index.num_rows
            seen += len(keys)
    assert seen > 500


# ---------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def client(smoke: Finished) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{smoke.out}/mlflow/mlflow.db")


def test_mlflow_has_a_run_of_the_pipeline_and_a_child_for_each_stage(smoke: Finished, client: Any) -> None:
    experiment = client.get_experiment_by_name("tiny_smoke")
    runs = client.search_runs([experiment.experiment_id])
    (top,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert top.info.run_id == (smoke.out / "mlflow_run_id").read_text().strip()
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = {run.info.run_name: run for run in runs if run is not top}
    assert set(children) == set(STAGES)
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {top.info.run_id}
    told = {stage["name"]: stage["mlflow_run_id"] for stage in smoke.json("run.json")["stages"]}
    assert {name: run.info.run_id for name, run in children.items()} == told


@pytest.mark.parametrize("name", STAGES)
def test_mlflow_shows_a_stage_s_freeze_configuration_packing_and_lineage(
    smoke: Finished, client: Any, name: str
) -> None:
    (entry,) = [stage for stage in smoke.json("run.json")["stages"] if stage["name"] == name]
    result = handover.read(str(smoke.out), name)
    run = client.get_run(entry["mlflow_run_id"])
    params, metrics = run.data.params, run.data.metrics
    assert {group: params[f"freeze.{group}"] for group in GROUPS} == entry["freeze"]
    assert params["packing.length"] == str(entry["packing_length"])
    assert params["packing.patch_budget"] == str(entry["patch_budget"])
    assert params["world_size"] == str(RANKS)
    assert params["digest.plan"] == result.plan_digest and params["digest.data"] == result.data_digest
    assert params["digest.stage"] == result.stage_digest
    before = handover.read(str(smoke.out), result.parent.stage) if result.parent else None
    assert before is not None and params["digest.base_model"] == before.model.digest
    if name == STAGES[0]:
        assert "parent.stage_run_id" not in params, "init is no stage"
    else:
        assert params["parent.stage_run_id"] == (smoke.out / before.stage / "mlflow_run_id").read_text().strip()
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, entry["steps"] + 1))
    assert metrics["step"] == entry["steps"]
    assert {"freeze_table.json", "freeze_table.md"} <= {item.path for item in client.list_artifacts(run.info.run_id)}


# ---------------------------------------------------------------- the exported model


def test_transformers_loads_the_export_and_answers_about_a_picture(smoke: Finished) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = str(smoke.out / "export")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.text_config.tie_word_embeddings is True
    assert model.lm_head.weight is model.get_input_embeddings().weight
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (160, 120), "red")], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


# ---------------------------------------------------------------- once more, and with other settings


def test_the_same_command_again_trains_nothing_and_writes_no_weights(smoke: Finished) -> None:
    before, smoke_stages = files_below(smoke.out), smoke.json("run.json")["stages"]
    first_wall_s = smoke.json("run.json")["wall_s"]
    began = time.monotonic()
    again = qwenvl("run", "tiny_smoke", "--out", str(smoke.out))
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in ("init", *STAGES):
        assert f"{stage}: was done before" in again.stdout
    print(f"the second time: {time.monotonic() - began:.0f} s")
    changed = {name for name, stat in files_below(smoke.out).items() if before.get(name) != stat}
    small = {"report.html", "run.json", "data/funnel.json", *(f"prepare-{name}/requests.jsonl" for name in SAMPLING)}
    assert {name for name in changed if not name.startswith(("mlflow/", "runs/"))} <= small
    assert before.keys() <= files_below(smoke.out).keys(), "nothing is gone"
    assert len(list((smoke.out / "runs").iterdir())) >= 2
    assert smoke.json("run.json")["wall_s"] > first_wall_s, "the second attempt counts too"
    assert smoke.json("run.json")["stages"] == smoke_stages, "the report tells the same"


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("stages.sft.optim.lr=2e-4", "stages.sft.optim.lr"),
        ("stages.stage1.train.merger=false", "stages.stage1.train.merger"),
        ("seed=7", "seed"),
    ],
)
def test_another_result_field_into_the_same_output_is_refused_by_name(
    smoke: Finished, override: str, want: str
) -> None:
    before = files_below(smoke.out)
    ended = qwenvl("run", "tiny_smoke", "--out", str(smoke.out), "--set", override)
    assert ended.returncode == StageMismatch.code
    assert want in ended.stderr and "Traceback" not in ended.stderr
    assert f"use another --out, undo the change, or repeat with --accept-change {want}\n" in ended.stderr
    assert files_below(smoke.out) == before


# ---------------------------------------------------------------- what tiny promises


def test_tiny_is_sharded_and_stepped_as_a_large_model_is(smoke: Finished) -> None:
    """No parameter stays gathered, and the optimizer goes through several sub-groups on every rank."""
    for name, stage in smoke.recipe.stages.named().items():
        assert stage.zero.param_persistence_threshold == 0
        table = handover.read(str(smoke.out), name).freeze_table
        own = sum(row.parameters for row in table if row.state == "trained") / RANKS
        assert own > stage.zero.sub_group_size, f"{name}: one sub-group holds all of a rank's {own:.0f} parameters"


def test_tiny_has_windowed_and_full_vision_layers_and_a_tied_head(smoke: Finished) -> None:
    config = smoke.json("stage2", "model", "config.json")
    vision = config["vision_config"]
    full = set(vision["fullatt_block_indexes"])
    assert full and full < set(range(vision["depth"]))
    assert config["tie_word_embeddings"] is True
    assert smoke.json("stage3", "model", "config.json") == config, "packing is a matter of the stage, not of the model"
    stages = smoke.recipe.stages.named()
    assert stages["stage3"].packing.length >= 2 * stages["stage2"].packing.length
    lengths = {name: Plan.read(str(smoke.out / name / "plan")).length for name in ("stage2", "stage3")}
    assert lengths == {name: stages[name].packing.length for name in lengths}


def test_stage2_trains_on_images_of_several_windows_beside_a_text_only_rank(smoke: Finished) -> None:
    """Images above 112 px, and within the first ten steps a rank without any picture beside one with pictures."""
    recipe, out = smoke.recipe, str(smoke.out)
    plan = Plan.read(str(smoke.out / "stage2" / "plan"))
    alone = [step for step in range(min(10, plan.num_steps)) if _text_beside_image(plan, step)]
    assert alone
    family, tokenizer = family_of(recipe, out), Tokenizer.load(tokenizer_uri(recipe, out))
    rules = stage_rules(recipe, recipe.stages.named()["stage2"], family, tokenizer)
    loader = Loader(plan, out, rules, group=0, num_groups=1)
    packs = [batch for step in loader for batch in step.batches]
    loader.close()
    sides = [14 * min(height, width) for batch in packs for _, height, width in batch.grid_thw.tolist()]
    assert max(sides) > 112
    assert any(batch.patches.shape[0] == 0 for batch in packs), "the packs really hold what the plan says"


def _text_beside_image(plan: Plan, step: int) -> bool:
    ranks = [sum(plan.pack(pack).patches for pack in packs) for packs in assign(plan, step, RANKS)]
    return min(ranks) == 0 < max(ranks)


def test_every_kind_of_data_was_prepared_and_is_counted(smoke: Finished) -> None:
    funnel = smoke.json("data", "funnel.json")
    assert set(funnel) == set(smoke.recipe.prepare.sources)
    for splits in funnel.values():
        for counted in splits.values():
            assert counted["read"] == counted["kept"] + sum(counted["bad"].values()) > 0


def test_no_file_names_the_machine_s_temporary_folders(smoke: Finished) -> None:
    """Samples, plans and models do not depend on where the output lies."""
    for pattern in ("*/plan/plan.json", "data/sources/*/*/source.json", "export/*.json", "init/model/*.json"):
        for path in Path(smoke.out).glob(pattern):
            assert str(smoke.out).encode() not in path.read_bytes(), path
    sample = next(Path(smoke.out).glob("data/sources/captions/train/*.index.parquet"))
    assert str(smoke.out).encode() not in io.BytesIO(sample.read_bytes()).getvalue()

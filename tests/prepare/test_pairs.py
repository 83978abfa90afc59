"""Each preference pair once: in the plan, over epochs, weights, ids and sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.prepare.pairs import pair_digest
from pipelines.prepare.sampling import make_requests, select_answers
from pipelines.prepare.stage import prepare_stage
from tests.prepare.builders import small_recipe
from tests.prepare.test_sampling import answer_all, reference, sources
from trainer import storage
from trainer.after.answers import Request
from trainer.data.sample import from_json
from trainer.data.shards import ShardReader, ShardWriter, Source
from trainer.errors import PlanError

ALONE = "stages.dpo.data={preferences: 1}"


@pytest.fixture
def out(prepared: str, tmp_path: Path) -> str:
    shutil.copytree(Path(prepared) / "data", tmp_path / "data", ignore=shutil.ignore_patterns("corpus", "*counts-*"))
    return str(tmp_path)


def test_one_pass_uses_each_pair_once(out: str):
    plan = prepare_stage(small_recipe(ALONE), "dpo", out)
    [row] = plan.sources
    assert row["uses"] == row["distinct"] == row["num_samples"] == plan.statistics["pairs"] == 32


def test_a_second_use_is_an_error_that_names_it(out: str):
    with pytest.raises(PlanError, match=r"pairs are used more than once[\s\S]*preferences/pair-train-"):
        prepare_stage(small_recipe(ALONE, "stages.dpo.schedule.steps=60"), "dpo", out)
    assert not storage.exists(storage.join(out, "dpo", "plan", "plan.json"))
    assert prepare_stage(small_recipe(ALONE, "stages.dpo.data={preferences: 0.5}"), "dpo", out).num_packs


def test_the_same_pair_under_another_id_is_found(out: str):
    uri = storage.join(out, "data", "sources", "preferences", "train")
    source = Source.open(uri)
    reader = ShardReader(source)
    made = [(source.sample(0, row), reader.media(0, row)) for row in range(4)]
    twin = made[0][0].model_copy(update={"id": "twin", "meta": {"x": 1}})
    assert pair_digest(twin) == pair_digest(made[0][0]) != pair_digest(made[1][0])
    swapped = made[0][0].model_copy(update={"chosen": made[0][0].rejected, "rejected": made[0][0].chosen})
    assert pair_digest(swapped) != pair_digest(made[0][0])
    storage.remove_tree(uri)
    writer = ShardWriter(uri, shard_bytes=10**6)
    for sample, files in [*made, (twin, made[0][1])]:
        writer.add(sample, files)
    writer.close(source="preferences", split="train")
    with pytest.raises(PlanError, match="the same as preferences/"):
        prepare_stage(small_recipe(ALONE), "dpo", out)


def test_other_stages_may_use_a_sample_again(out: str):
    plan = prepare_stage(small_recipe("stages.sft.data={instructions: 3}"), "sft", out)
    assert plan.sources[0]["uses"] > plan.sources[0]["distinct"], "negative control: only pairs are counted"


def test_pairs_of_one_task_share_no_answer_and_say_which_they_are(out: str):
    recipe = small_recipe("stages.dpo.data={sampled: 1}", "stages.dpo.sampling.keep=4")
    requests = make_requests(recipe, "dpo", out)

    def texts(request: Request):
        right = reference(request)
        return [(right, "stop"), ("no", "stop"), (f"{right}.", "stop"), ("never", "stop"), ("not at all", "stop")]

    answer_all(out, "dpo", requests, texts)
    content = select_answers(recipe, "dpo", out)
    found = sources(out, "dpo")
    assert content["kept"] == len(found) and len({pair_digest(sample) for sample in found}) == len(found)
    of_request: dict[str, list[str]] = {}
    for sample in found:
        of_request.setdefault(sample.meta["request"], []).append(sample.id.rpartition("#")[2])
    assert max(map(len, of_request.values())) == 2
    for used in of_request.values():
        numbers = [number for pair in used for number in pair.split("-")]
        assert len(set(numbers)) == len(numbers), "an answer is in two pairs"
    assert prepare_stage(recipe, "dpo", out).statistics["pairs"] == len(found)


def test_a_correct_answer_that_cannot_be_written_out_costs_no_pair(out: str):
    recipe = small_recipe("stages.dpo.data={sampled: 1}", "stages.dpo.sampling={tasks: [grounding], requests: 30}")
    requests = make_requests(recipe, "dpo", out)

    def texts(request: Request):
        box = json.loads(reference(request))[0]["bbox_2d"]
        return [(f"It is at {box}.", "stop"), (reference(request), "stop"), ("nowhere", "stop")]  # words: no geometry

    answer_all(out, "dpo", requests, texts)
    select_answers(recipe, "dpo", out)
    square = {r.id for r in requests if r.sample.media[0].width == r.sample.media[0].height == 112}
    assert square and square <= {sample.meta["request"] for sample in sources(out, "dpo")}
    for sample in sources(out, "dpo"):
        assert from_json(sample.model_dump_json()).chosen[0].parts[0].part == "objects"

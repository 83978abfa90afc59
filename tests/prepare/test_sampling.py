"""Requests from this run's shards, and what is kept of the answers: correct ones, and pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.prepare.sampling import folder_of, make_requests, select_answers
from pipelines.prepare.stage import prepare_stage
from tests.models.configs import qwen2_vl
from tests.prepare.builders import small_recipe
from trainer import storage
from trainer.after.answers import Answer, Request, blocks_of, write_block
from trainer.data.layout import Fitted, fit_sample, rules_of
from trainer.data.sample import Sample
from trainer.data.shards import ShardReader, Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, UsageError
from trainer.models.config import family_of, tokenizer_uri
from trainer.recipe import Recipe


@pytest.fixture
def out(prepared: str, tmp_path: Path) -> str:
    shutil.copytree(Path(prepared) / "data", tmp_path / "data", ignore=shutil.ignore_patterns("corpus"))
    return str(tmp_path)


@pytest.fixture
def recipe() -> Recipe:
    return small_recipe("stages.sft.data={sampled: 1}", "stages.dpo.data={sampled: 1}")


def reference(request: Request) -> str:
    """The answer that the sample itself has; spatial ones as the model would write them."""
    part = request.sample.messages[-1].parts[0]
    if part.part == "text":
        return part.text
    at = part.objects[0].at  # type: ignore[union-attr]
    file = request.sample.media[0]
    scale = (112 / file.width, 112 / file.height)  # 112x112 pictures are not resized here
    numbers = [round(value * scale[place % 2]) for place, value in enumerate(getattr(at, "xyxy", None) or at.xy)]
    return f'[{{"{"bbox_2d" if len(numbers) == 4 else "point_2d"}": {numbers}, "label": "it"}}]'


def answer_all(out: str, stage: str, requests: list[Request], texts) -> None:
    """Blocks as the answers step writes them: `texts(request)` gives (text, how it ended) for each answer."""
    folder = storage.join(out, f"prepare-{stage}", "answers")
    for number, block in enumerate(blocks_of(requests)):
        answers = [
            Answer(request.id, place, place, "model", text, finish, "it broke" if finish == "error" else "", 9, 3)
            for request in block
            for place, (text, finish) in enumerate(texts(request))
        ]
        write_block(folder, number, "key", answers)


def sources(out: str, stage: str) -> list[Sample]:
    source = Source.open(storage.join(out, "data", "sources", f"sampled-{stage}", "train"))
    rows = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    reader = ShardReader(source)
    for place in rows:
        assert len(reader.media(*place)) == len(source.sample(*place).media)
    return [source.sample(*place) for place in rows]


def test_requests_are_tasks_with_keys_drawn_by_name(out: str, recipe: Recipe):
    first = make_requests(recipe, "sft", out)
    assert len(first) == 48 and all(request.sample.key for request in first)
    assert [request.id for request in make_requests(recipe, "sft", out)] == [request.id for request in first]
    other = make_requests(recipe, "dpo", out)
    assert [request.id for request in other] != [request.id for request in first]
    assert all(request.sample.split == "train" for request in first)
    source = Source.open(storage.join(out, first[0].place.source))
    assert source.sample(first[0].place.shard, first[0].place.row).id == first[0].sample.id


def test_sft_keeps_correct_finished_answers_and_counts_the_rest(out: str, recipe: Recipe):
    requests = make_requests(recipe, "sft", out)

    def texts(request: Request):
        right = reference(request)
        return [(right, "length"), ("nonsense", "stop"), (right, "stop"), (right, "stop"), ("", "error")]

    answer_all(out, "sft", requests, texts)
    content = select_answers(recipe, "sft", out)
    assert content["answers"] == 5 * 48 and content["kept"] == 48
    assert content["errors"] == 48 and content["unfinished"] == 48
    assert content["correct"] == 2 * 48 and content["incorrect"] == 48 and content["repeated"] == 48
    kept = sources(out, "sft")
    assert len(kept) == 48 and all(sample.kind == "instruction" and sample.source == "sampled-sft" for sample in kept)
    assert content["models"] == ["model"]
    plan = prepare_stage(recipe, "sft", out)
    assert plan.sources[0]["uri"] == "data/sources/sampled-sft/train"


def in_tags(text: str) -> str:
    numbers = json.loads(text)[0]["bbox_2d"]
    return "<|object_ref_start|>it<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>".format(*numbers)


@pytest.mark.parametrize("form", [str, in_tags])
def test_written_places_become_pixels_of_the_original_again(out: str, form):
    recipe = small_recipe("stages.sft.sampling.tasks=[grounding]", "stages.sft.sampling.requests=400")
    requests = make_requests(recipe, "sft", out)
    spatial = [
        request for request in requests if request.sample.media[0].width == request.sample.media[0].height == 112
    ]
    assert spatial

    def texts(request: Request):
        return [(form(reference(request)), "stop")] if request in spatial else [("nothing", "stop")]

    answer_all(out, "sft", requests, texts)
    select_answers(recipe, "sft", out)
    kept = {sample.meta["request"]: sample for sample in sources(out, "sft")}
    assert set(kept) == {request.id for request in spatial}
    for request in spatial:
        assert request.sample.key is not None
        box = kept[request.id].messages[-1].parts[0].objects[0].at.xyxy  # type: ignore[union-attr]
        assert box == pytest.approx(request.sample.key.value, abs=1)


def test_dpo_pairs_a_correct_with_an_incorrect_answer(out: str, recipe: Recipe):
    requests = make_requests(recipe, "dpo", out)
    mixed = {request.id for request in requests[::2]}

    def texts(request: Request):
        right = (reference(request), "stop")
        return [("nonsense", "stop"), right] if request.id in mixed else [right, right]

    answer_all(out, "dpo", requests, texts)
    content = select_answers(recipe, "dpo", out)
    pairs = sources(out, "dpo")
    assert content["kept"] == len(pairs) == len(mixed)
    for sample in pairs:
        assert sample.kind == "preference" and sample.messages[-1].role == "user"
        assert sample.rejected[0].parts[0].text == "nonsense"  # type: ignore[union-attr]
        assert sample.chosen != sample.rejected
    assert prepare_stage(recipe, "dpo", out).statistics["pairs"] > 0


def test_selecting_again_does_nothing_until_an_answer_changes(
    out: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    requests = make_requests(recipe, "sft", out)
    answer_all(out, "sft", requests, lambda request: [(reference(request), "stop")])
    first = select_answers(recipe, "sft", out)
    written = Path(folder_of("sft", out), "selection.json").stat().st_mtime_ns
    assert select_answers(recipe, "sft", out) == first
    assert Path(folder_of("sft", out), "selection.json").stat().st_mtime_ns == written
    assert "already there" in capsys.readouterr().out
    answer_all(out, "sft", requests, lambda request: [("nonsense", "stop")])
    assert select_answers(recipe, "sft", out)["kept"] == 0, "negative control"


def test_a_stage_goes_on_without_sampled_data_when_nothing_was_kept(out: str):
    recipe = small_recipe()
    requests = make_requests(recipe, "sft", out)
    answer_all(out, "sft", requests, lambda request: [("nonsense", "stop")])
    select_answers(recipe, "sft", out)
    assert [row["name"] for row in prepare_stage(recipe, "sft", out).sources] == ["instructions"]


def test_missing_answers_and_tasks_without_keys_are_told(out: str, recipe: Recipe):
    make_requests(recipe, "sft", out)
    with pytest.raises(DataError, match="answers are missing"):
        select_answers(recipe, "sft", out)
    with pytest.raises(DataError, match="no task has a known answer"):
        make_requests(small_recipe("stages.sft.sampling.tasks=[captions]"), "sft", out)
    with pytest.raises(UsageError, match="samples no answers"):
        make_requests(recipe, "stage1", out)


QWEN2_VL = ["family=qwen2_vl", f"model.config={json.dumps(qwen2_vl.config())}", "model.tokens_per_second=null"]
TAGS = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(250,125),(750,500)<|box_end|>"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_tags_among_words_are_special_tokens_again_and_broken_ones_are_counted(out: str, stage: str):
    recipe = small_recipe(*QWEN2_VL, f"stages.{stage}.sampling.tasks=[instructions]")
    requests = make_requests(recipe, stage, out)

    def texts(request: Request):
        right, broken = reference(request), TAGS.removesuffix("<|box_end|>")
        tagged = [(f"It is {right}, see {TAGS} here.", "stop"), (f"{TAGS} Nonsense.", "stop")]
        return [(f"{right} {broken}", "stop"), (f"nonsense {broken}", "stop"), *tagged]

    answer_all(out, stage, requests, texts)
    content = select_answers(recipe, stage, out)
    one_picture = {request.id for request in requests if [file.kind for file in request.sample.media] == ["image"]}
    assert one_picture and content["kept"] > 0
    assert content["unreadable"] == 2 * len(one_picture) + 4 * (len(requests) - len(one_picture))
    config = recipe.stages.named()[stage]
    rules = rules_of(config, "chat", family_of(recipe, out), Tokenizer.load(tokenizer_uri(recipe, out)))
    for sample in sources(out, stage):
        assert sample.meta["request"] in one_picture
        fitted = fit_sample(sample, 0, rules)
        assert isinstance(fitted, Fitted)
        ids = [token for span in fitted.layout.spans if span.target for token in span.ids]
        said = rules.tokenizer.decode(ids)
        assert said.count(TAGS) == (2 if stage == "dpo" else 1)
        assert ids.count(rules.tokenizer.id("<|box_start|>")) == said.count(TAGS)

"""Curation inside data preparation: what is dropped is left out of plans; report and MLflow show the funnel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.prepare.count import Counter
from pipelines.prepare.curate.step import curate
from pipelines.prepare.ingest import prepare_data, source_uri
from pipelines.prepare.stage import prepare_stage
from pipelines.report.build import write_report
from tests.prepare.builders import small_recipe
from tests.prepare.curate.builders import a_document, a_recipe, prose, write_source
from trainer import storage
from trainer.curation import LANGUAGES, in_order
from trainer.data import kept
from trainer.data.shards import Source
from trainer.errors import DataError, RecipeError, ShardError
from trainer.resolve import load_recipe, resolved

ASKED = "prepare.sources.text.curate={clean: {min_words: 60}, dedup: {exact: true}}"


@pytest.fixture(scope="module")
def run(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of its own: the sources of the shared one are not touched."""
    import shutil

    out = str(tmp_path_factory.mktemp("curated") / "out")
    shutil.copytree(prepared, out)
    recipe = small_recipe(ASKED)
    prepare_data(recipe, out)
    storage.write_json(storage.join(out, "recipe.json"), resolved(recipe))
    return out


def test_what_is_dropped_is_not_planned_and_another_threshold_tokenises_nothing(
    run: str, monkeypatch: pytest.MonkeyPatch
):
    counters: list[Counter] = []
    made = Counter.__init__
    monkeypatch.setattr(Counter, "__init__", lambda self, *more: (made(self, *more), counters.append(self))[0])
    fixed = f"model.tokenizer={run}/data/tokenizer"  # one trained here learns from what is kept
    recipe = small_recipe(ASKED, fixed)
    plan = prepare_stage(recipe, "stage2", run)
    facts = next(row for row in plan.sources if row["name"] == "text")
    source = Source.open(source_uri(run, "text", "train"))
    dropped = sum(source.index(n).num_rows - len(kept.rows(source, n)) for n in range(source.num_shards))
    assert dropped > 0 and facts["drops"].get("clean.min_words", 0) > 0
    assert sum(count for name, count in facts["drops"].items() if "." in name) == dropped
    assert counters[-1].tokenised > 0
    other = small_recipe(ASKED.replace("60", "100"), fixed)
    prepare_data(other, run)
    again = prepare_stage(other, "stage2", run)
    assert counters[-1].tokenised == 0, "counts do not depend on what is kept"
    assert next(row for row in again.sources if row["name"] == "text")["drops"]["clean.min_words"] > dropped
    assert again.header["facts"]["data_digest"] != plan.header["facts"]["data_digest"]
    prepare_data(small_recipe(ASKED), run)


def test_without_the_section_the_source_counts_whole_again(run: str):
    curated = Source.open(source_uri(run, "text", "train"))
    before = kept.data_digest(curated)
    assert before != curated.digest
    prepare_data(small_recipe(), run)
    assert kept.data_digest(curated) == curated.digest
    assert "curated" not in storage.read_json(storage.join(run, "data", "funnel.json"))["text"]["train"]
    prepare_data(small_recipe(ASKED), run)
    assert kept.data_digest(curated) == before


def test_the_report_shows_each_filter_with_examples(run: str):
    write_report(run)
    page = Path(run, "report.html").read_text()
    assert "clean.min_words" in page and "at least 60" in page
    dropped = storage.read_json(storage.join(run, "data", "funnel.json"))["text"]["train"]["curated"]
    assert dropped["examples"]["clean.min_words"][0]["id"] in page


def test_the_funnel_is_sent_to_mlflow(run: str):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.create_experiment("x", artifact_location=Path(run, "artifacts").as_uri())
    number = client.create_run(experiment).info.run_id
    tracking.log_funnel(client, number, run)
    metrics = client.get_run(number).data.metrics
    part = storage.read_json(storage.join(run, "data", "funnel.json"))["text"]["train"]["curated"]
    assert metrics["funnel.text.train.curated.kept"] == part["kept"] > 0
    assert metrics["funnel.text.train.dropped.clean.min_words"] == part["dropped"]["clean.min_words"] > 0
    assert json.loads(client.download_artifacts(number, "funnel.json") and Path(
        client.download_artifacts(number, "funnel.json")
    ).read_text())["text"]["train"]["curated"] == part  # fmt: skip


def test_a_filter_that_does_not_exist_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match=r"curate\.clean\.min_word: unknown key; did you mean min_words"):
        load_recipe("tiny", ["prepare.sources.text.curate={clean: {min_word: 5}}"])


@pytest.mark.parametrize(
    ("curated", "want"),
    [
        ("{dedup: {text: 0.8, against: [nobody]}}", "no such source 'nobody'"),
        ("{dedup: {text: 0.8, against: [text]}}", "goes in a circle: 'text' after 'text'"),
        ("{decontaminate: {text: 0.8}}", "name the sources whose held-out"),
        ("{dedup: {}}", "at least one of exact, text, image"),
        ("{score: {scorer: judge}}", "needs the section judge"),
        ("{dedup: {text: 0.5}}", "greater than or equal to 0.7"),
    ],
)
def test_what_does_not_fit_together_is_refused(curated: str, want: str):
    with pytest.raises(RecipeError, match=want):
        load_recipe("tiny", [f"prepare.sources.text.curate={curated}"])


@pytest.mark.parametrize("part", ["dedup", "decontaminate"])
def test_what_is_made_after_curation_is_not_compared_with(part: str):
    made = {
        "format": "grounding",
        "kind": "grounding",
        "rendering": "chat",
        "grounding": {"questions": {"complete": "picture"}},
        "path": "source://grounding",
        "held_out": "source://grounding",
    }
    curated = f"prepare.sources.text.curate={{{part}: {{text: 0.8, against: [asked]}}}}"
    sets = [f"prepare.sources.asked={json.dumps(made)}", curated]
    with pytest.raises(RecipeError, match=rf"text\.curate\.{part}\.against: 'asked' is made from other sources after"):
        load_recipe("tiny", sets)
    assert load_recipe("tiny", [sets[0], curated.replace("asked", "captions")]), "negative control"


@pytest.mark.parametrize(
    ("clean", "want"),
    [
        ("min_words: 100, max_words: 5", "min_words 100 is above max_words 5"),
        ("min_mean_word_length: 10, max_mean_word_length: 3", "min_mean_word_length 10.0 is above"),
        ("min_image_side: 300, max_image_side: 200", "min_image_side 300 is above"),
        ("languages: [english]", "'english'.*ISO 639-1"),
        ("languages: [en, xx]", "'xx'.*ISO 639-1"),
        ("min_words: 5, max_words: 5, languages: [en, zh]", None),
    ],
)
def test_what_would_drop_everything_is_refused(clean: str, want: str | None):
    sets = [f"prepare.sources.text.curate={{clean: {{{clean}}}}}"]
    if want is None:
        assert load_recipe("tiny", sets), "negative control"
        return
    with pytest.raises(RecipeError, match=want):
        load_recipe("tiny", sets)


def test_the_languages_are_those_of_the_model():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    assert set(LanguageIdentifier.from_model_file(MODEL_FILE).nb_classes) == LANGUAGES


def test_whose_samples_go_first_depends_on_no_order_of_the_recipe():
    recipe = load_recipe("tiny", ["prepare.sources.captions.curate={dedup: {text: 0.8, against: [text]}}"])
    asked = {name: source.curate for name, source in recipe.prepare.sources.items()}
    asked["text"] = asked["captions"].model_copy(update={"dedup": None})
    assert in_order(asked) == in_order(dict(sorted(asked.items()))) == ["text", "captions"]


def test_a_list_that_is_not_there_is_one_error(tmp_path: Path):
    write_source(tmp_path, [a_document("a", prose(1))])
    with pytest.raises(DataError, match="a list cannot be read"):
        curate(a_recipe("{clean: {max_blocked_words: 0, blocked_words: gone.txt}}"), str(tmp_path))


def test_a_lost_column_of_kept_samples_is_an_error_and_not_a_source_that_is_whole(tmp_path: Path):
    folder = write_source(tmp_path, [a_document("a", prose(1)), a_document("b", "")])
    curate(a_recipe("{clean: {min_words: 1}}"), str(tmp_path))
    next(Path(folder).glob("*.kept-*.parquet")).unlink()
    with pytest.raises(ShardError, match="the column of kept samples is missing"):
        kept.rows(Source.open(folder), 0)


def test_the_same_request_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_source(tmp_path, [a_document("a", prose(1)), a_document("b", "")])
    recipe = a_recipe("{clean: {min_words: 1}}")
    first = curate(recipe, str(tmp_path))
    assert curate(recipe, str(tmp_path)) == first and "already there (1 of 2 kept)" in capsys.readouterr().out


CONVERSATIONS = "prepare.sources.instructions.curate={instructions: {limits: {max_repetition: 0.3, max_malformed: 0}}}"


def test_conversations_of_a_run_are_labelled_in_funnel_report_and_mlflow(run: str):
    from mlflow.tracking import MlflowClient

    prepare_data(small_recipe(ASKED, CONVERSATIONS), run)
    found = storage.read_json(f"{run}/data/funnel.json")["instructions"]["train"]["curated"]
    assert found["read"] == 160 and found["dropped"]["instructions.max_malformed"] == 0
    counted = {name: one for section in found["domains"].values() for name, one in section.items()}
    assert sum(one["read"] for one in counted.values()) == 160 and {"Counting", "Grounding_and_Space"} <= set(counted)
    write_report(run)
    page = Path(run, "report.html").read_text()
    assert "instructions.max_repetition" in page and "Grounding_and_Space" in page
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.create_experiment("domains", artifact_location=Path(run, "artifacts").as_uri())
    number = client.create_run(experiment).info.run_id
    tracking.log_funnel(client, number, run)
    metrics = client.get_run(number).data.metrics
    assert metrics["funnel.instructions.train.domain.Vision.Counting"] == counted["Counting"]["kept"] > 0

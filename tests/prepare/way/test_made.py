"""What is made from other data, on its way: shards to tokens of six families and back, and what the preview draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.prepare.reasoning.annotate import take
from pipelines.prepare.sampling import make_requests, select_answers
from tests.prepare.captioning import test_made as captioning
from tests.prepare.curate.test_scores import Server, server
from tests.prepare.grounding import test_made as grounding
from tests.prepare.grounding.builders import stored
from tests.prepare.reasoning import test_annotate as annotating
from tests.prepare.reasoning import test_made as reasoning
from tests.prepare.reasoning.builders import a_walk, read_back
from tests.prepare.reasoning.builders import stored as stored_walks
from tests.prepare.test_sampling import answer_all, out, recipe, reference
from tests.prepare.way import page, tokens
from trainer import storage
from trainer.data.sample import Sample
from trainer.data.shards import Source
from trainer.models.family import FAMILIES
from trainer.recipe import Recipe

__all__ = ["out", "recipe", "server"]  # fixtures
film = captioning.film
MOST = 12


def walk(uri: str, folder: Path, *, least: int = 1) -> list[Sample]:
    """All families, and the page. Returns the samples."""
    samples = read_back(uri)
    assert len(samples) >= least
    for name in FAMILIES:
        tokens.assert_come_back(samples[:MOST], folder / name, "chat", name)
    for card, (sample, _) in zip(page.cards_of(uri, len(samples), folder / "p.html"), samples, strict=True):
        page.assert_shows(card, sample)
    return [sample for sample, _ in samples]


@pytest.mark.extended
def test_questions_are_counted_pointed_at_and_located(tmp_path: Path):
    stored(str(tmp_path), "mine", grounding.pictures())
    stored(str(tmp_path), "mine", grounding.pictures(3, "held_out"), "held_out")
    asked = {"questions": {"complete": "vocabulary", "per_picture": 5, "forms": {"any": 1, "plain": 1}}}
    grounding.made(str(tmp_path), asked)
    found = walk(grounding.uri(str(tmp_path)), tmp_path / "way", least=12)
    tasks = [sample.meta["task"] for sample in found]
    assert set(tasks) == {"detect", "refer", "point", "count", "none"}
    counted = [sample for sample, task in zip(found, tasks, strict=True) if task == "count"]
    assert all(sample.messages[1].parts[0].text == str(sample.key.value) for sample in counted if sample.key)  # type: ignore[union-attr]


@pytest.mark.extended
def test_copy_paste_is_drawn_where_it_was_pasted(tmp_path: Path):
    stored(str(tmp_path), "mine", grounding.pictures())
    grounding.made(str(tmp_path), {"copy_paste": grounding.PASTE})
    assert all(sample.meta["copy_paste"] for sample in walk(grounding.uri(str(tmp_path)), tmp_path / "way", least=7))


@pytest.mark.extended
def test_captions_of_long_videos_have_their_times(tmp_path: Path, server: Server, film: bytes):
    captioning.stored(tmp_path, [captioning.a_video(film)])
    server.script = captioning.watches
    captioning.make(captioning.asked(server), str(tmp_path), "captioned")
    uri = storage.join(str(tmp_path), "data", "sources", "captioned", "train")
    [sample] = walk(uri, tmp_path / "way")
    assert len(tokens.times(sample)) == 32


def judged(folder: Path, server: Server) -> str:
    reasoning.walks(folder)
    reasoning.writes(server)
    reasoning.made(folder, server)
    return reasoning.uri(folder)


def written(folder: Path, _: Server) -> str:
    source = Source.open(stored_walks(str(folder), [a_walk("w0"), a_walk("w1")]))
    path = annotating.answered(source, folder, w0_0=annotating.OWN, w0_1=annotating.TYPED)
    take(source, str(path), str(folder / "new"))
    return str(folder / "new")


@pytest.mark.extended
@pytest.mark.parametrize(("make", "said"), [(judged, reasoning.GOOD["click"]), (written, annotating.OWN)])
def test_reasoning_of_a_judge_or_of_people_stands_before_its_call(
    make: Callable[[Path, Server], str], said: str, tmp_path: Path, server: Server
):
    first, second = walk(make(tmp_path, server), tmp_path / "way")
    assert tokens.words(first)[:2] == [f"{said}\n", "click"] and second.id == "w1"


@pytest.mark.extended
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_sampled_answers_are_kept_or_become_pairs(stage: str, out: str, recipe: Recipe, tmp_path: Path):
    requests = make_requests(recipe, stage, out)
    answer_all(out, stage, requests, lambda one: [(reference(one), "stop"), ("nonsense", "stop")])
    select_answers(recipe, stage, out)
    found = walk(storage.join(out, "data", "sources", f"sampled-{stage}", "train"), tmp_path / "way", least=20)
    assert all(bool(sample.rejected) == (stage == "dpo") for sample in found)

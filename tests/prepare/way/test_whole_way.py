"""Every reader on its whole way: a faithful and an adverse file, the exact Samples, tokens of six families and back,
and what the preview draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.cli.main import main
from tests.prepare.reasoning.builders import read_back
from tests.prepare.way import of_agents, of_pages, of_places, of_text, of_videos, page, tokens
from tests.prepare.way.row import Row, told
from trainer import storage
from trainer.data.sample import Sample
from trainer.models.family import FAMILIES

ROWS = [*of_text.ROWS, *of_places.ROWS, *of_pages.ROWS, *of_videos.ROWS, *of_agents.ROWS]
PARAMETERS = [pytest.param(row, id=row.name, marks=() if row.quick else pytest.mark.extended) for row in ROWS]


@dataclass(frozen=True)
class Walked:
    row: Row
    shards: str
    funnel: dict
    samples: list[tuple[Sample, list[bytes]]]


_WALKED: dict[str, Walked] = {}


@pytest.fixture(params=PARAMETERS)
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """The faithful and the adverse file in one ingest, from the command line, once for all tests of a row."""
    row: Row = request.param
    if row.name not in _WALKED:
        folder = tmp_path_factory.mktemp("way")
        good = row.good(folder / "good")
        bad = row.bad(folder / "bad")
        shards = str(folder / "shards")
        words = ["--format", row.format, "--kind", row.kind, "--rendering", row.rendering, "--max-bad-fraction", "0.99"]
        media = ["--media", str(row.media(good))] if row.media else []
        assert main(["data", "ingest", str(good), str(bad), "--out", shards, *words, *media]) == 0
        _WALKED[row.name] = Walked(row, shards, storage.read_json(f"{shards}/input.json")["funnel"], read_back(shards))
    return _WALKED[row.name]


def test_reader_gives_the_exact_samples_and_counts_every_fault(walked: Walked):
    row = walked.row
    assert [told(sample) for sample, _ in walked.samples] == list(row.want)
    assert walked.funnel["bad"] == dict(row.faults)
    assert walked.funnel["kept"] == len(row.want)
    assert all(sample.kind == row.kind for sample, _ in walked.samples)
    assert main(["data", "check", walked.shards]) == 0


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_rendering_comes_back_from_the_tokens(walked: Walked, name: str, tmp_path: Path):
    tokens.assert_come_back(walked.samples, tmp_path, walked.row.rendering, name)


def test_preview_shows_every_sample(walked: Walked, tmp_path: Path):
    cards = page.cards_of(walked.shards, len(walked.samples), tmp_path / "p.html")
    for card, (sample, _) in zip(cards, walked.samples, strict=True):
        page.assert_shows(card, sample)

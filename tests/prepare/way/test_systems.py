"""The table of data systems is whole: every format goes the whole way, every command names tests that are there, and
the checks of the way see a fault."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipelines.prepare.formats import FORMATS
from tests import tables
from tests.prepare.grounding.builders import a_picture_of, boxed, dot, masked, noise
from tests.prepare.grounding.test_readers import DISC
from tests.prepare.reasoning.builders import a_walk
from tests.prepare.reasoning.builders import stored as stored_at
from tests.prepare.way import page, tokens
from tests.prepare.way.systems import MARKS, README, SYSTEMS, System, table
from tests.prepare.way.test_whole_way import ROWS
from trainer.data.sample import Sample, to_json
from trainer.models.family import FAMILIES

PREPARE = Path(__file__).parents[1]
ISSUED = ("interleaved", "grounding: boxes", "grounding: points", "grounding: masks", "expressions", "counting", "HTML",
          "charts, formulas, molecules, scores", "handwriting", "Chinese, Japanese, Arabic", "dynamic frame rate",
          "absolute time", "events in time", "captions of long", "mobile", "web", "desktop", "reasoning", "people",
          "classified", "filtered", "rejection sampling", "preference", "mixture")  # fmt: skip
"""What the report's data section has."""


def test_every_format_goes_the_whole_way_and_every_row_stands_in_the_table():
    assert {row.format for row in ROWS} == set(FORMATS)
    assert len({row.name for row in ROWS}) == len(ROWS)
    listed = {name for system in SYSTEMS for name in system.rows}
    assert listed == {row.name for row in ROWS}


@pytest.mark.parametrize("word", ISSUED)
def test_every_data_system_has_a_line(word: str):
    assert any(word in system.name for system in SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_command_of_the_table_runs_tests(system: System):
    for path in (*system.curation, *system.depth):
        file = PREPARE.parent / path[1:] if path.startswith("/") else PREPARE / path
        assert names_in(file), path
    assert set(system.made) <= names_in(PREPARE / "way" / "test_made.py")
    assert system.rows or system.made or system.curation


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {item.name for item in tree.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")}


def test_the_readme_has_the_table_of_now():
    text = (PREPARE.parents[1] / README).read_text(encoding="utf-8")
    assert tables.between(text, MARKS, table(), where=README) == text
    assert table().count("works: `way -k 'reader") >= 15
    for mark in MARKS:
        with pytest.raises(ValueError, match=f"{README} lacks"):
            tables.between(text.replace(mark, ""), MARKS, table(), where=README)


# ---------------------------------------------------------------- the checks see faults

THINGS = (masked("disc", DISC), boxed("box", 3, 4, 30, 33), dot("dot", 51, 20))


def moved(sample: Sample, old: str, new: str) -> Sample:
    text = to_json(sample)
    assert old in text
    return Sample.model_validate_json(text.replace(old, new))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_place_or_a_word_beside_its_own_is_seen_in_the_tokens(name: str, tmp_path: Path):
    sample, files = a_picture_of("p", noise(60, 40), *THINGS)
    tokens.assert_come_back([(sample, files)], tmp_path / "right", "chat", name)
    [way, _] = tokens.learnt(sample, files, tmp_path / "wrong", "chat", name)
    kind = tokens.family(name)[0].coordinates.kind
    for old, new in (("[3.0,4.0,30.0,33.0]", "[3.0,6.0,30.0,33.0]"), ("[51.0,20.0]", "[49.0,20.0]")):
        with pytest.raises(AssertionError):
            tokens.assert_places_come_back(moved(sample, old, new), way, kind)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        tokens.assert_words_come_back(moved(sample, '"disc"', '"disk"'), way)  # type: ignore[arg-type]


def test_what_is_drawn_beside_its_place_is_seen_on_the_page(tmp_path: Path):
    sample, files = a_picture_of("p", noise(60, 40), *THINGS)
    walk = a_walk("w0")
    uri = stored_at(str(tmp_path), [(sample, files), walk])
    first, second = page.cards_of(uri, 2, tmp_path / "p.html")
    page.assert_shows(first, sample)
    page.assert_shows(second, walk[0])
    for old, new in (
        ("[3.0,4.0,30.0,33.0]", "[3.0,5.0,30.0,33.0]"),
        ("[51.0,20.0]", "[50.0,20.0]"),
        ('"dot"', '"dod"'),
    ):
        with pytest.raises(AssertionError):
            page.assert_shows(first, moved(sample, old, new))
    with pytest.raises(AssertionError):
        page.assert_shows(second, moved(walk[0], "[30.0,50.0]", "[31.0,50.0]"))

"""Scores drawn by chance, and scores changed by chance: verovio reads the same notes out of their ABC, or they
are refused."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from random import Random

import pytest

from pipelines.prepare.corpus.tunes import tune
from pipelines.prepare.formats.rows import WRONG, BadRow
from tests.prepare.music import heard, score
from tests.prepare.test_scores import CASES, abc, same_music


@pytest.mark.parametrize("seed", range(40))
def test_tunes_drawn_by_chance_read_the_same(seed: int):
    made_up = tune(Random(seed)).musicxml
    together, num_parts = abc(made_up), made_up.count("<part id=")
    for number in range(num_parts):
        text = one_part(made_up, number)
        assert same_music(heard(abc(text), "abc"), heard(text, "xml"))
        music = abc(text).partition("\nK:")[2].partition("\n")[2]
        assert together.endswith(music) if num_parts == 1 else f"\nV:{number + 1}\n{music}" in together


def one_part(text: str, number: int) -> str:
    """verovio reads one voice of ABC."""
    root = ET.fromstring(text)
    listed = root.find("part-list")
    assert listed is not None
    for parent, tag in ((root, "part"), (listed, "score-part")):
        for other in [part for at, part in enumerate(parent.findall(tag)) if at != number]:
            parent.remove(other)
    return ET.tostring(root, encoding="unicode")


VALUES = ("-1", "0", "1", "x", "2", "natural", "sharp", "flat", "half", "eighth", "quarter", "A", "8")


def changed(text: str, rng: Random) -> str:
    """One value exchanged, or one element left out or there twice."""
    place = rng.choice(list(re.finditer(r"<([a-z-]+)[^>/]*>|>([^<>]+)<", text)))
    if place[2]:
        return text[: place.start(2)] + rng.choice(VALUES) + text[place.end(2) :]
    whole = re.compile(rf"<{place[1]}[ >].*?</{place[1]}>").search(text, place.start())
    if whole is None:
        return text
    return text[: whole.start()] + whole[0] * rng.choice((0, 2)) + text[whole.end() :]


def differ(seeds: range) -> tuple[int, list[str]]:
    """How many changed scores were converted, and those whose ABC reads otherwise than the score."""
    whole = [score(bars) for bars, _ in CASES.values()]
    whole += [found for seed in range(12) if (found := tune(Random(seed)).musicxml).count("<part id=") == 1]
    converted, wrong = 0, []
    for seed in seeds:
        rng = Random(seed)
        text = changed(rng.choice(whole), rng)
        try:
            written = abc(text)
            want = heard(text, "xml")
        except (BadRow, *WRONG, ET.ParseError):  # the reader makes a bad row of each
            continue
        if "V:" not in written and text not in whole:
            converted += 1
            wrong += [] if same_music(heard(written, "abc"), want) else [written]
    return converted, wrong


def test_a_score_changed_by_chance_is_refused_or_reads_the_same():
    converted, wrong = differ(range(150))
    assert converted >= 20 and not wrong


@pytest.mark.long
def test_many_scores_changed_by_chance_are_refused_or_read_the_same():
    converted, wrong = differ(range(1000, 4000))
    assert converted >= 500 and not wrong

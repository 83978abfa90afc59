"""A judge behind `transformers serve`: two screenshots in a request over the real wire, and answers without form. The
model is tiny and knows nothing: what is proven is the wire, not the reasoning."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.prepare.curate.record import Record
from pipelines.prepare.reasoning.made import make
from pipelines.prepare.reasoning.steps import steps_of
from tests.prepare.curate.test_serve import serving
from tests.prepare.reasoning.builders import CLICK, END, a_reasoning_recipe, a_walk, read_back, stored

__all__ = ["serving"]


@pytest.mark.slow
@pytest.mark.extended
def test_a_real_server_takes_steps_with_both_screenshots_and_its_words_are_recorded(
    serving: tuple[str, str], tmp_path: Path
):
    url, model = serving
    walks = [a_walk("w0", [CLICK, END])]
    stored(str(tmp_path), walks)
    judge = {"url": url, "model": model, "max_tokens": 16, "max_failed": 1.0, "image_max_pixels": 60 * 60}
    found = make(a_reasoning_recipe({"judge": judge}), str(tmp_path), "reasoned")["train"]
    assert found["judge"]["asked"] == found["judge"]["malformed"] == 6, "two steps, three tries each"
    assert found["made"]["steps without a valid answer"] == 2 and found["kept"] == 1
    [(sample, files)] = read_back(str(tmp_path / "data/sources/reasoned/train"))
    assert [step.reasoning for step in steps_of(sample)] == ["", ""] and files == walks[0][1]
    answers = Record(str(tmp_path / "data/answers/reasoning/reasoned")).answers
    assert len(answers) == 6 and all(given.finish in ("stop", "length") for given in answers.values())

"""Trajectories as steps, the mark, and what the judge gets to see."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from pipelines.prepare.reasoning.mark import COLOUR, marked
from pipelines.prepare.reasoning.steps import cut_before, steps_of, with_reasoning
from tests.prepare.reasoning.builders import CLICK, END, QUERY, SWIPE, WALK, a_walk, an_action
from tests.prepare.through import trained
from trainer.data.sample import Sample


def test_a_trajectory_has_its_query_screenshots_and_calls_at_every_step():
    sample, _ = a_walk("a", words=["I tap the city."])
    steps = steps_of(sample)
    assert [(step.number, step.before, step.after) for step in steps] == [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 3, None)]
    assert {step.query for step in steps} == {QUERY}
    assert (
        steps[2].earlier == ("click", 'type {"text": "Rome"}') and steps[3].calls == 'terminate {"status": "success"}'
    )
    assert [step.reasoning for step in steps] == ["I tap the city.", "", "", ""]


def test_a_sample_without_actions_has_no_steps():
    told = {"role": "assistant", "parts": [{"part": "text", "text": "A screen."}]}
    asks = {"role": "user", "parts": [{"part": "text", "text": "What?"}]}
    assert steps_of(Sample.model_validate({"id": "x", "source": "s", "kind": "agent", "messages": [asks, told]})) == []


def test_reasoning_is_written_replaced_and_taken_away_and_nothing_else_changes(tmp_path: Path):
    sample, files = a_walk("a", words=["Old words here."])
    written = with_reasoning(sample, {0: "", 1: "I name the city.", 3: "All is booked."})
    assert [step.reasoning for step in steps_of(written)] == ["", "I name the city.", "", "All is booked."]
    assert [step.actions for step in steps_of(written)] == [step.actions for step in steps_of(sample)]
    assert with_reasoning(written, {0: "Old words here.", 1: "", 3: ""}) == sample
    for found in trained(written, files, tmp_path):
        assert found.targets.count("I name the city.\n<tool_call>") == 1 and "Old words" not in found.targets


def test_what_a_step_is_named_by_does_not_change_with_its_words_but_with_its_place():
    sample, _ = a_walk("a")
    written = with_reasoning(sample, {0: "I tap the city."})
    moved, _ = a_walk("a", [("click", {}, {"coordinate": (31, 50)}), *WALK[1:]])
    named = [[step.digest_in(one) for step in steps_of(one)] for one in (sample, written, moved)]
    assert named[0] == named[1] and named[0][0] != named[2][0] and len(set(named[0])) == 4


def test_a_trajectory_cut_short_ends_with_an_answer_and_shows_no_more_than_it_needs():
    sample, _ = a_walk("a")
    steps = steps_of(sample)
    left = cut_before(sample, steps[2])
    assert left is not None and left.messages[-1].role == "assistant" and len(left.media) == 2
    assert [step.calls for step in steps_of(left)] == ["click", 'type {"text": "Rome"}']
    assert cut_before(sample, steps[0]) is None


def magenta(picture: Pil.Image) -> np.ndarray:
    """Rows and columns of pixels in the colour of the mark."""
    return np.argwhere((np.asarray(picture) == COLOUR).all(axis=2))


@pytest.mark.parametrize("scale", [1, 2])
def test_the_mark_is_where_the_action_is_whatever_the_picture_was_resized_to(scale: int):
    picture = Pil.new("RGB", (300 // scale, 200 // scale), "white")
    found = marked(picture, (300, 200), [an_action(("left_click", {}, {"coordinate": (200, 80)}), tool="computer_use")])
    middle = magenta(found).mean(axis=0)[::-1] * scale
    assert np.abs(middle - (200, 80)).max() < scale and len(magenta(picture)) == 0
    inside = np.asarray(found)[80 // scale, 200 // scale]
    assert tuple(inside) == (255, 255, 255), "what is clicked on stays to be seen"


def test_an_arrow_goes_from_where_a_swipe_starts_to_where_it_ends_and_no_place_has_no_mark():
    picture = Pil.new("RGB", (120, 200), "grey")
    across = magenta(marked(picture, (120, 200), [an_action(SWIPE)]))
    assert across[:, 0].min() < 52 and across[:, 0].max() > 155, "from 150 up to 50"
    assert len(magenta(marked(picture, (120, 200), [an_action(END)]))) == 0
    assert len(magenta(marked(picture, (120, 200), [an_action(CLICK)]))) > 20


def test_the_picture_that_is_marked_is_a_copy():
    picture = Pil.open(io.BytesIO(a_walk("a")[1][0])).convert("RGB")
    before = np.asarray(picture).copy()
    marked(picture, (120, 200), [an_action(CLICK)])
    assert (np.asarray(picture) == before).all()

"""Scores: what counts as right, in tables."""

from __future__ import annotations

import math
import time

import pytest

from trainer.after import scores
from trainer.after.scores import Frame, score
from trainer.after.structure import html_similarity
from trainer.data.sample import Key

HALF = Frame(width=200, height=100, to_original=lambda x, y: (x * 2, y * 2))
"""The model saw the picture at half its size: written coordinates count twice."""


@pytest.mark.parametrize(
    ("task", "value", "text", "want"),
    [
        ("colour", "red", "It is red.", 1),
        ("colour", "gray", "grey", 1),
        ("colour", "red", "red or blue", 0),
        ("colour", "red", "a tired dog", 0),
        ("count", 3, "There are three of them", 1),
        ("count", 3, "3", 1),
        ("count", 3, "13", 0),
        ("count", 3, "many", 0),
        ("name", "traffic light", "This is a traffic light.", 1),
        ("name", "traffic light", "light", 0),
        ("choice", "B", "B. a dog", 1),
        ("choice", "B", "The answer is (B)", 1),
        ("choice", "B", "A", 0),
        ("choice", "top left", "Top left.", 1),
        ("text", "Hello world", "hello  world", 1),
        ("text", "Hello world", "hello", 0),
        ("number", 1234, "1,234", 1),
        ("number", 100, "about 104.5", 1),
        ("number", 100, "106", 0),
        ("html", "<p>a</p><table></table>", "<p>b</p><table></table>", 1),
        ("html", "<p>a</p><table></table>", "<p>b</p>", 0),
        ("time", [2.0, 4.0], "from 2.0 to 4.0 seconds", 1),
        ("time", [2.0, 4.0], "00:00:02 - 00:00:04", 1),
        ("time", [62.0, 64.0], "1:02 to 1:04", 1),
        ("time", [2.0, 4.0], "from 6.0 to 9.0 seconds", 0),
        ("time", [2.0, 4.0], "later", 0),
    ],
)
def test_an_answer_is_right_or_wrong(task, value, text, want):
    assert score(Key(task=task, value=value), text)["correct"] == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('[{"bbox_2d": [10, 10, 30, 30], "label": "cat 7 8 9 1"}]', 1.0),
        ("<|box_start|>(10,10),(30,30)<|box_end|>", 1.0),
        ("<|object_ref_start|>1, 2, 3, 4<|object_ref_end|><|box_start|>(10,10),(30,30)<|box_end|>", 1.0),
        ("<ref>dice (1, 2), (3, 4)</ref><box>(10,10),(30,30)</box> and <ref>b</ref><box>(1,1),(2,2)</box>", 1.0),
        ("<|object_ref_start|>cut<|object_ref_end|><|box_start|>(10,10),(30,30)", 1.0),
        ("<|box_start|>(10,10)<|box_end|>", 0.0),
        ("10 10 30 30", 1.0),
        ("[10, 20, 30, 40]", 1 / 3),
        ('[{"bbox_2d": [10, 10, 30, 30], "label": "cu', 1.0),
        ("[30, 30, 10, 10]", 1.0),
        ("[60, 60, 70, 70]", 0.0),
        ("somewhere on the left", 0.0),
    ],
)
def test_a_box_is_scored_in_pixels_of_the_original(text, want):
    found = score(Key(task="box", value=[20, 20, 60, 60]), text, HALF)
    assert found["iou"] == pytest.approx(want)
    assert found["correct"] == float(want >= 0.5)


def test_a_box_left_in_pixels_of_the_resized_picture_is_wrong():
    """Negative control: without the way back to the original the same answer misses."""
    same = Frame(width=200, height=100, to_original=lambda x, y: (x, y))
    assert score(Key(task="box", value=[20, 20, 60, 60]), "[10, 10, 30, 30]", same)["iou"] < 0.2


@pytest.mark.parametrize(
    ("value", "text", "want"),
    [
        ([20, 20, 60, 60], '[{"point_2d": [15, 15], "label": "3 4"}]', 1),
        ([20, 20, 60, 60], '<points x1="15" y1="15" alt="it">it</points>', 1),
        (
            [20, 20, 60, 60],
            '<tool_call>{"name":"computer_use","arguments":{"action":"left_click","coordinate":[15,15]}}</tool_call>',
            1,
        ),
        ([20, 20, 60, 60], '[{"bbox_2d": [10, 10, 20, 20]}]', 1),
        ([20, 20, 60, 60], "<|object_ref_start|>3, 4<|object_ref_end|><|box_start|>(15,15)<|box_end|>", 1),
        ([20, 20, 60, 60], "<ref>3, 4</ref><box>(10,10),(20,20)</box>", 1),
        ([20, 20, 60, 60], "(40, 40)", 0),
        ([30, 30], "(15, 15)", 1),
        ([30, 30], "(40, 15)", 0),
        ([30, 30], "there", 0),
    ],
)
def test_a_point_is_right_inside_its_box_or_near_its_point(value, text, want):
    assert score(Key(task="point", value=value), text, HALF)["correct"] == want


def test_a_place_without_its_picture_is_refused():
    with pytest.raises(ValueError, match="hand its frame"):
        score(Key(task="box", value=[0, 0, 1, 1]), "0 0 1 1")


def test_an_unreadable_answer_is_wrong_and_never_an_error():
    values = {"box": [0, 0, 1, 1], "point": [1, 1], "time": [0, 1], "count": 1, "number": 1}
    for task in scores._SCORERS:
        key = Key(task=task, value=values.get(task, "<p></p>"))
        for text in ("", "{", "[[[", "\x00", "1" * 400, "<" * 50, '{"bbox_2d": "no"}', "1e999", "-", "٣"):
            assert score(key, text, HALF)["correct"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("found", "wanted", "want"),
    [
        ("<p>x</p>", "<p>y</p>", 1.0),
        ('<div class="chart"></div>', '<div class="formula"></div>', 0.0),
        ("<table><tr><td>1</td></tr></table>", "<table><tr><td>1</td><td>2</td></tr></table>", 0.75),
        ("", "<p></p>", 0.0),
        ("plain", "text", 1.0),
        ("<ul><li>a<li>b</ul>", "<ul><li>a<li>b</ul>", 1.0),
        ("<p><img><img></p>", "<p><img></p>", 1 - 1 / 3),
    ],
)
def test_html_is_compared_by_its_tree(found, wanted, want):
    assert html_similarity(found, wanted) == pytest.approx(want)


def test_means_are_over_the_answers_that_have_the_figure():
    assert scores.overall_scores([{"correct": 1.0, "error": 2.0}, {"correct": 0.0}]) == {"correct": 0.5, "error": 2.0}


@pytest.mark.parametrize("task", ["box", "point", "time", "count", "number"])
@pytest.mark.parametrize("part", ["9", "1 ", "1,", "1,234 ", '"coordinate": [', "<box>(", '{"bbox_2d": [', "1:", "-"])
def test_a_long_answer_is_read_in_a_time_that_grows_with_its_length(task: str, part: str):
    """A model that repeats itself must not stop an evaluation: 5,000 digits took minutes as a point."""
    began = time.process_time()
    score(
        Key(task=task, value=[1, 2, 3, 4] if task == "box" else [1, 2] if task in ("point", "time") else 3),
        part * 20_000,
        HALF,
    )
    assert time.process_time() - began < 2.0


def test_a_number_may_follow_dots_and_one_with_two_is_none():
    assert scores.parse_boxes("box...12, 13, 14, 15") == [(12, 13, 14, 15)]
    assert scores.parse_points("x.10 20") == [(10, 20)]
    assert scores.parse_points('<point x="1.2.3" y="4">') == []


def test_three_numbers_are_no_box():
    assert scores.parse_boxes("10, 20 30") == []
    assert scores.parse_boxes("(10, 20) (30, 40)") == scores.parse_boxes("10 20 30 40") == [(10, 20, 30, 40)]


def test_one_absurd_answer_does_not_make_the_figure_of_all():
    errors = [{"correct": 0.0, "error": error} for error in (1.0, 2.0, 1e60)]
    assert scores.overall_scores(errors) == {"correct": 0.0, "error": 2.0}


@pytest.mark.parametrize("digits", [60, 400, 5000])
@pytest.mark.parametrize(
    ("task", "value", "text"),
    [
        ("count", 3, "{}"),
        ("number", 3.5, "-{}.5"),
        ("time", [1.0, 2.0], "{0} to {0}"),
        ("time", [1.0, 2.0], "{}:00:00"),
        ("box", [1, 2, 30, 40], "[{0}, {0}, {0}, {0}]"),
        ("box", [1, 2, 30, 40], "[0, 0, {0}, {0}]"),
        ("point", [10, 10], "({0}, {0})"),
        ("point", [10, 10], '{{"point_2d": [{0}, 40]}}'),
        ("point", [10, 10], '<point x="{0}" y="4">'),
        ("box", [1, 2, 30, 40], '{{"bbox_2d": [0, 0, {0}, {0}]}}'),
    ],
)
def test_an_answer_with_more_digits_than_a_number_has_is_wrong_and_no_error(
    digits: int, task: str, value: object, text: str
) -> None:
    found = score(Key(task=task, value=value), text.format("9" * digits), HALF)
    assert found["correct"] == 0.0 and all(math.isfinite(figure) for figure in found.values())


@pytest.mark.parametrize(("text", "want"), [("A", "a"), ("The answer is red.", "red"), ("it is", "it is")])
def test_an_answer_that_is_only_a_leading_phrase_stays(text: str, want: str):
    assert scores.normalise(text) == want

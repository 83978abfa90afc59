"""Every filter with a text that passes and one that does not, and recall and precision on planted defects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipelines.prepare.reasoning.filters import REASONS, copied, problem
from pipelines.prepare.reasoning.steps import Step
from tests.prepare.reasoning.builders import QUERY, Call, an_action
from tests.prepare.reasoning.planted import EARLIER, GOOD, PLANTED
from trainer.reasoning import Filters

BACK: Call = ("system_button", {"button": "Back"}, {})
TAP: Call = ("click", {}, {"coordinate": (30, 50)})
ROME: Call = ("type", {"text": "Rome"}, {})
UP: Call = ("swipe", {}, {"coordinate": (60, 150), "coordinate2": (60, 50)})
DRAG: Call = ("left_click_drag", {}, {"coordinate": (10, 10), "coordinate2": (90, 12)})
WHEEL: Call = ("scroll", {"pixels": -300}, {"coordinate": (10, 10)})


def a_step(*calls: Call, query: str = QUERY) -> Step:
    tools = {"left_click_drag": "computer_use", "scroll": "computer_use"}
    actions = tuple(an_action(call, tool=tools.get(call[0], "mobile_use")) for call in calls)
    return Step(1, 3, query, actions, 0, 1, "", ("click",))


def refused(text: str, *calls: Call, earlier: Any = (), query: str = QUERY, **filters: Any) -> str | None:
    found = problem(text, a_step(*(calls or (TAP,)), query=query), earlier, Filters(**filters))
    return found[0] if found else None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The city field is empty, so I tap it.", None),
        ("I tap it.", "too-short"),
        ("I tap the city. " * 60, "too-long"),
        ("I tap the city field first. <tool_call>{}", "markup"),
        ('The call is {"name": "mobile_use"} for the city field.', "markup"),
        ("I tap the city field at (30, 50) first.", "coordinates"),
        ("The field is 30 px from the left, so I tap it.", "coordinates"),
        ("The meeting is on 12, 13 and 14 May, so I tap the first one.", None),
        ("The magenta circle is on the city field, so I tap it.", "hindsight"),
        ("I tap the city field, as the second screenshot shows the list.", "hindsight"),
        ("I tap the field marked City to set where we eat.", None),
        ("I book a table for two people in Rome on Friday evening.", "copied-query"),
        ("For the table in Rome I first tap the city field.", None),
        ("The list of restaurants is shown, so I tap the first one now.", "copied-step"),
    ],
)
def test_one_text_passes_and_one_does_not(text: str, reason: str | None):
    assert refused(text, earlier=["The list of restaurants is shown, so I tap the first one."]) == reason


@pytest.mark.parametrize(
    ("call", "passes", "refuses"),
    [
        (TAP, "The city is missing, so I tap its field.", "The city is not in sight, so I scroll further."),
        (TAP, "I select Rome from the list that has opened.", "I wait until the list of cities has come."),
        (ROME, 'The field is active, so I type "Rome" into it.', 'The field is active, so I type "Paris" into it.'),
        (ROME, 'The field "City" is active, so I enter Rome.', "I tap the button below the list of cities."),
        (UP, "More must lie below, so I scroll down the list.", "More must lie above, so I scroll up the list."),
        (UP, "I swipe up to see what lies below.", "I swipe down to see what lies above."),
        (WHEEL, "Prices stand below, so I scroll down a bit.", "Prices stand above, so I scroll up a bit."),
        (DRAG, "I drag the slider right to raise the price.", "I drag the slider left to lower the price."),
        (BACK, "This is the wrong page, so I press back now.", "This is the wrong page, so I press home now."),
        (("open", {"text": "Clock"}, {}), "Alarms are set there, so I open the app \"Clock\".",
         "Alarms are set there, so I open the app \"Maps\"."),
        (("terminate", {"status": "success"}, {}), "The table is booked, so the task is complete.",
         "There is no table left, so the task is impossible."),
        (("terminate", {"status": "failure"}, {}), "There is no table left, so the task is impossible.",
         "The table is booked, so the task is complete."),
        (("wait", {"time": 2}, {}), "The list is still loading, so I wait.", "The list is there, so I tap a row."),
        (("answer", {"text": "Rome"}, {}), "All is found, so I answer \"Rome\" now.",
         "I answer \"Paris\", as it is told."),
    ],
)  # fmt: skip
def test_words_for_another_action_are_inconsistent(call: Call, passes: str, refuses: str):
    assert refused(passes, call) is None
    assert refused(refuses, call) == "inconsistent"
    assert refused(refuses, call, consistent=False) is None, "negative control: the filter off"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ROME, 'I fill in "Where" with the name of the city.'),
        (ROME, 'Under "Where" nothing stands yet, so I type it in.'),
        (ROME, 'I type in "Where", where the city belongs.'),
        (TAP, "The left button of the two opens the list, so I click it."),
        (DRAG, "I drag the left handle of the slider to a higher price."),
        (UP, "I scroll to the left column of the page, further below."),
    ],
)
def test_quotations_and_directions_of_elements_are_not_those_of_the_call(call: Call, text: str):
    assert refused(text, call) is None


def test_a_step_of_several_calls_may_be_told_by_any_of_them():
    assert refused('The search field is empty, so I type "Rome" there.', TAP, ROME) is None
    assert refused("I scroll down to find the search field.", TAP, ROME) == "inconsistent"


def test_thresholds_are_the_recipes():
    assert refused("I tap it.", min_words=3) is None
    assert refused("I tap the city field first.", min_words=1, max_words=5) == "too-long"
    same = "I book a table for two people in Rome on Friday evening."
    assert refused(same, max_of_query=1.0) is None


def test_words_of_scripts_without_spaces_count_as_characters():
    assert refused("点击城市输入框，准备输入。", query="在罗马预订一张桌子") is None
    assert refused("在罗马预订一张桌子", query="在罗马预订一张桌子") == "copied-query"


def test_what_is_copied_is_a_share_of_the_own_trigrams():
    assert copied("one two three four", "ZERO one, two; three four five") == 1.0
    assert copied("one two three four", "one two three") == 0.5
    assert copied("one two", "three one two") == 1.0 and copied("", "one") == 0.0


def test_planted_defects_are_found_and_good_reasoning_stays():
    """Recall and precision over 40 good texts and 66 with one defect each; the README has the figures."""
    found: Counter[str] = Counter()
    right: Counter[str] = Counter()
    missed: list[tuple[str | None, str | None, str]] = []
    for call, text, want in (*((call, text, None) for call, text in GOOD), *PLANTED):
        reason = refused(text, call, earlier=EARLIER)
        found[str(reason)] += 1
        right[str(reason)] += reason == want
        missed += [(want, reason, text)] if reason != want else []
    planted = Counter(want for _, _, want in PLANTED)
    assert set(planted) == set(REASONS)
    recall = {name: right[name] / planted[name] for name in REASONS}
    precision = {name: right[name] / found[name] for name in REASONS if found[name]}
    assert min(recall[name] for name in REASONS if name != "inconsistent") == 1.0, missed
    assert recall["inconsistent"] >= 0.75, missed
    assert min(precision.values()) == 1.0, missed


def test_of_an_action_of_another_space_nothing_is_known_and_nothing_breaks():
    other: Call = ("teleport", {}, {})
    assert refused("I will type the name into the field now.", other) is None
    assert refused("I will type the name into the field now.", other, TAP) == "inconsistent"

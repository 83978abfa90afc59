"""What the preview draws on a picture."""

from __future__ import annotations

import re

import pytest

from pipelines.prepare.preview.draw import _action
from trainer.data.sample import Action


@pytest.mark.parametrize("turned", [False, True])
def test_a_swipe_is_an_arrow_from_its_first_place_to_its_second(turned: bool):
    places = [(60.0, 150.0), (60.0, 50.0)]
    start, end = reversed(places) if turned else places
    at = {"coordinate": start, "coordinate2": end}
    drawn = _action(0, Action(media=0, tool="mobile_use", action="swipe", coordinates=at), unit=1.0)
    [circle] = re.findall(r"<circle cx='([\d.]+)' cy='([\d.]+)'", drawn)
    assert tuple(map(float, circle)) == start
    [points] = re.findall(r"<polyline points='([^']+)'", drawn)
    left, tip, right = (tuple(map(float, point.split(","))) for point in points.split())
    assert tip == end and left != right
    assert all(0 < (y - end[1]) / (start[1] - end[1]) < 1 for _, y in (left, right)), "barbs lie towards the start"


def test_a_click_is_a_cross_without_an_arrow():
    drawn = _action(0, Action(media=0, tool="mobile_use", action="click", coordinates={"coordinate": (5, 5)}), unit=1.0)
    assert drawn.count("<circle") == 1 and "polyline" not in drawn
    assert _action(0, Action(media=0, tool="mobile_use", action="wait"), unit=1.0) == ""

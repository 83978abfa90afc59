"""Pixels of the original -> coordinates as a family writes them -> back: within a pixel, or half a step of the grid
where that is coarser. For every family's own grid and convention, through its words, over many sizes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from trainer.after.scores import parse_boxes, parse_points
from trainer.data.objects import Pen
from trainer.data.sample import Box, Media, Object, Objects, Point, Sample
from trainer.models.family import FAMILIES, Family, load_family
from trainer.resolve import load_recipe, shipped

SIDES = (28, 29, 56, 97, 224, 336, 337, 640, 1000, 1001, 1999, 4032)
NUM_RANDOM = 150


def sizes() -> list[tuple[int, int]]:
    """Width and height: all pairs of some sides, and random ones, up to 20 to 1."""
    rng = np.random.default_rng(11)
    random = rng.integers(16, 3000, (NUM_RANDOM, 2)).tolist()
    some = [*((w, h) for w in SIDES for h in SIDES), *((w, h) for w, h in random)]
    return [(w, h) for w, h in some if max(w, h) <= 20 * min(w, h)]


@cache
def family(name: str) -> tuple[Family, tuple[int, int]]:
    """A family as a shipped recipe has it, with its pixel budget."""
    recipe = load_recipe(next(one for one in shipped() if one.startswith("tiny") and load_recipe(one).family == name))
    stage = next(iter(recipe.stages.named().values()))
    assert isinstance(recipe.model.config, dict)
    return load_family(name, recipe.model.config), (stage.pixels.image_min, stage.pixels.image_max)


def written(found: Family, size: tuple[int, int], resized: tuple[int, int], thing: Object) -> str:
    file = Media(digest="0" * 64, kind="image", suffix="png", size_bytes=1, width=size[0], height=size[1])
    sample = Sample(id="a", source="s", kind="grounding", messages=(), media=(file,))
    pen = Pen(sample, 0, found.coordinates, lambda _: resized)
    return "".join(piece.text for piece in found.objects.write(Objects(media=0, objects=(thing,)), pen, True))


def step_of(found: Family, size: tuple[int, int], resized: tuple[int, int]) -> tuple[float, float]:
    """Pixels of the original between neighbouring numbers that the convention can write."""
    kind = found.coordinates.kind
    if kind == "absolute":
        return size[0] / resized[0], size[1] / resized[1]
    if kind == "thousand":
        return size[0] / 1000, size[1] / 1000
    side = max(size)
    return (size[0] / 100, size[1] / 100) if kind == "unit" else (side / 100, side / 100)


def furthest(
    found: Family, size: tuple[int, int], pixels: tuple[int, int], rng: np.random.Generator, *, shift: float = 0.0
) -> float:
    """The largest error of some boxes and points of a picture, in units of what is allowed."""
    grid = found.image_grid(*size, min_pixels=pixels[0], max_pixels=pixels[1])
    resized = (grid.width, grid.height)
    allowed = [max(1.0, step / 2) for step in step_of(found, size, resized)]
    worst = 0.0
    for kind in ("corner", "inner", "inner", "whole", "point"):
        box = a_box(kind, size, rng)
        thing = Object(label="cat", at=Point(xy=box[:2]) if kind == "point" else Box(xyxy=box))
        text = written(found, size, resized, thing)
        [numbers] = parse_points(text) if kind == "point" else parse_boxes(text)
        back: list[float] = []
        for at in range(0, len(numbers), 2):
            back += found.coordinates.to_original(numbers[at] + shift, numbers[at + 1], size, resized)
        errors = [abs(a - b) / allowed[at % 2] for at, (a, b) in enumerate(zip(back, box, strict=False))]
        worst = max(worst, *errors)
    return worst


def a_box(kind: str, size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    width, height = size
    if kind == "whole":
        return 0.0, 0.0, float(width), float(height)
    if kind == "corner":
        return float(width - 1), float(height - 1), float(width), float(height)
    xs, ys = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
    return float(xs[0]), float(ys[0]), float(xs[1]), float(ys[1])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_boxes_and_points_come_back_within_a_pixel_or_half_a_step(name: str):
    found, pixels = family(name)
    released = (pixels, (56 * 56, 28 * 28 * 1280), (28 * 28 * 4, 28 * 28 * 16384))
    rng = np.random.default_rng(5)
    worst: dict[Any, float] = {}
    for budget in released:
        for size in sizes():
            worst[budget, size] = furthest(found, size, budget, rng)
    at = max(worst, key=lambda key: worst[key])
    assert worst[at] <= 1 + 1e-6, (at, worst[at])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_coordinates_of_another_picture_size_would_be_seen(name: str):
    """Negative control: what is written two and a half steps beside its place does not come back."""
    found, pixels = family(name)
    step = {"absolute": 2.5, "thousand": 2.5, "unit": 0.025, "square": 0.025}[found.coordinates.kind]
    rng = np.random.default_rng(5)
    assert furthest(found, (1999, 1001), pixels, rng, shift=step) > 1.5


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_pixel_border_of_a_side_comes_back(name: str):
    found, pixels = family(name)
    for size in ((1000, 56), (337, 97), (97, 337)):
        grid = found.image_grid(*size, min_pixels=pixels[0], max_pixels=pixels[1])
        resized = (grid.width, grid.height)
        allowed = max(1.0, step_of(found, size, resized)[0] / 2) + 1e-6
        for x in range(size[0] + 1):
            numbers = found.coordinates.to_model(x, 3.0, size, resized)
            json.dumps(numbers)
            assert abs(found.coordinates.to_original(*numbers, size, resized)[0] - x) <= allowed, (size, x)

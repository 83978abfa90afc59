"""Masks in every form, and what is asked of them."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as coco
import pytest

from pipelines.prepare.grounding.masks import Region, as_mask, decompressed, mask_of, outward, region_of
from tests.prepare.grounding.builders import disc, masked
from trainer.data.masks import from_run_lengths, run_lengths
from trainer.data.sample import Box, Mask


def some_masks() -> list[np.ndarray]:
    """Noise, discs, full, empty, one pixel, first pixel set, one row, one column."""
    rng = np.random.default_rng(7)
    sides = rng.integers(1, 40, (20, 2)).tolist()
    found = [rng.random((height, width)) < rng.random() for height, width in sides]
    corner = np.zeros((5, 7), bool)
    corner[0, 0] = True
    return [*found, disc(30, 20, 12, 9, 6), np.ones((4, 3), bool), np.zeros((4, 3), bool), corner]


@pytest.mark.parametrize("inside", some_masks())
def test_run_lengths_go_there_and_back_and_are_cocos(inside: np.ndarray):
    height, width = inside.shape
    counts = run_lengths(inside)
    assert (from_run_lengths(counts, width, height) == inside).all()
    theirs = coco.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)  # type: ignore[arg-type]
    assert (coco.decode(theirs).astype(bool) == inside).all()  # type: ignore[arg-type]
    assert decompressed(theirs["counts"].decode(), [height, width]) == counts  # type: ignore[index]


def test_run_lengths_of_another_size_are_refused():
    with pytest.raises(ValueError, match="6x4"):
        from_run_lengths((3, 20), 6, 4)
    with pytest.raises(ValueError, match="6x4"):
        from_run_lengths((30, -6), 6, 4)
    counts = coco.encode(np.asfortranarray(disc(30, 20, 12, 9, 6).astype(np.uint8)))["counts"].decode()
    for size, text in (
        ([20, 31], counts), ([2, 3], counts), ([20, 30], counts[:-2]), ([20, 30], "\x01~"), ([20, 30], "o"),
        ([9, 9], ""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="run lengths"):
            decompressed(text, size)


@pytest.mark.parametrize("far", [40.0, -13.0, 1e9, -1e300, float("inf"), float("nan")])
@pytest.mark.parametrize("at", range(6))
def test_a_polygon_that_goes_far_beyond_its_picture_is_refused_and_never_drawn(at: int, far: float):
    """pycocotools takes memory by the length of a side: with 1e9 it ends the process."""
    ring = [2.0, 2.0, 8.0, 2.0, 8.0, 9.0]
    assert mask_of(Mask(xyxy=(2, 2, 8, 9), polygons=(tuple(ring),)), 12, 12).any()
    ring[at] = far
    with pytest.raises(ValueError, match="beyond a picture of 12x12"):
        mask_of(Mask.model_construct(shape="mask", xyxy=(2, 2, 8, 9), rle=None, polygons=(tuple(ring),)), 12, 12)


def test_a_polygon_is_the_pixels_within_it():
    square = Mask(xyxy=(2, 3, 8, 9), polygons=((2, 3, 8, 3, 8, 9, 2, 9),))
    inside = mask_of(square, 12, 12)
    assert inside.sum() == 36 and inside[3:9, 2:8].all()
    two = Mask(xyxy=(0, 0, 12, 12), polygons=((0, 0, 3, 0, 3, 3, 0, 3), (9, 9, 12, 9, 12, 12, 9, 12)))
    assert mask_of(two, 12, 12).sum() == 18
    for broken in (((1, 2, 3, 4),), ((1, 2, 3, 4, 5, 6, 7),), None):
        with pytest.raises(ValueError, match="polygons of three points"):
            mask_of(Mask(xyxy=(0, 0, 1, 1), polygons=broken), 12, 12)


def test_what_is_left_of_a_region_under_others_is_what_whole_masks_say():
    rng = np.random.default_rng(3)
    for _ in range(60):
        below, above = (rng.random((20, 30)) < 0.6 for _ in range(2))
        below[:, : int(rng.integers(0, 25))] = False
        above[: int(rng.integers(0, 18))] = False
        under, over = Region(0, 0, below).tight(), Region(0, 0, above).tight()
        if under is None or over is None:
            continue
        left = under.without(over)
        assert (left.full(30, 20) == (below & ~above)).all()
        assert left.area == (below & ~above).sum()
        assert (under.full(30, 20) == below).all(), "the one before is not changed"


def test_the_box_is_exact_and_the_deepest_point_is_inside():
    inside = disc(40, 30, 20, 15, 9) & ~disc(40, 30, 20, 15, 4)  # a ring: the centre of its box is not on it
    region = Region(0, 0, inside).tight()
    assert region is not None and region.box() == (11, 6, 30, 25)
    assert not region.holds(20.5, 15.5)
    x, y = region.deepest()
    assert region.holds(x, y) and inside[int(y), int(x)]
    assert as_mask(region, 40, 30).xyxy == (11, 6, 30, 25)
    assert (from_run_lengths(as_mask(region, 40, 30).rle or (), 40, 30) == inside).all()
    assert Region(0, 0, np.zeros((3, 3), bool)).tight() is None


def test_a_box_is_the_pixels_that_it_touches():
    assert outward((1.2, 2.0, 5.5, 7.9), 10, 7) == (1, 2, 6, 7)
    region = region_of(Box(xyxy=(1.2, 2.0, 5.5, 7.9)), 10, 7)
    assert region is not None and region.area == 25
    assert region_of(masked("x", disc(20, 20, 9, 9, 3)).at, 20, 20).area == 29  # type: ignore[arg-type, union-attr]

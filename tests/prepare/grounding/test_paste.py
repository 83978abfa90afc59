"""Copy-paste on planted pictures: exact masks and boxes, and what happens to what lies below."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines.prepare.grounding.masks import mask_of, region_of
from pipelines.prepare.grounding.paste import Cutout, Unused, cut_out, paste_all, scaled
from tests.prepare.grounding.builders import a_copy_paste, boxed, disc, dot, masked, noise
from trainer.data.sample import Mask, Object

CONFIG = a_copy_paste(max_hidden=0.6)
RECTANGLES = a_copy_paste(without_mask="rectangle")


def a_cutout(width: int, height: int, label: str = "over", *, masked: bool = True) -> Cutout:
    """A white rectangle."""
    inside = np.ones((height, width), bool)
    return Cutout(label, np.full((height, width, 3), 255, np.uint8), inside, masked, (100, 100))


# ---------------------------------------------------------------- what is pasted


def test_every_pasted_pixel_is_the_masks_and_no_other_pixel_changes():
    rng = np.random.default_rng(1)
    for number in range(40):
        source, target = noise(60, 50, number), noise(80, 70, 1000 + number)
        inside = disc(60, 50, int(rng.integers(15, 45)), int(rng.integers(15, 35)), int(rng.integers(5, 14)))
        inside &= rng.random(inside.shape) < 0.9
        thing = masked("disc", inside)
        cutout = cut_out(source, thing, [], CONFIG)
        cutout = scaled(
            cutout, (80, 70), float(rng.uniform(0.5, 1.4)), a_copy_paste(min_side=1), mirrored=number % 2 == 1
        )
        height, width = cutout.inside.shape
        left, top = int(rng.integers(0, 80 - width + 1)), int(rng.integers(0, 70 - height + 1))
        found = paste_all(target, [], [(cutout, left, top)], CONFIG)
        [pasted] = found.objects
        assert isinstance(pasted.at, Mask)
        mask = mask_of(pasted.at, 80, 70)
        changed = (found.pixels != target).any(2)
        assert not (changed & ~mask).any(), "a pixel outside the mask changed"
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert pasted.at.xyxy == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert (columns[0], rows[0]) == (left, top), "nothing but belonging pixels at the sides"


def test_at_its_own_size_the_pixels_are_the_objects_own():
    source = noise(60, 50)
    inside = disc(60, 50, 30, 20, 10)
    cutout = scaled(cut_out(source, masked("disc", inside), [], CONFIG), (60, 50), 1.0, CONFIG)
    found = paste_all(np.zeros((50, 60, 3), np.uint8), [], [(cutout, 20, 10)], CONFIG)
    assert (found.pixels == np.where(inside[:, :, None], source, 0)).all()
    assert found.objects == [masked("disc", inside)]


def test_nothing_of_what_lay_behind_an_object_comes_with_it_when_it_is_resized():
    inside = disc(60, 50, 30, 25, 15)
    source = np.where(inside[:, :, None], np.uint8([200, 40, 40]), np.uint8([0, 0, 255])).astype(np.uint8)
    for factor in (0.5, 0.8, 1.4):
        small = scaled(cut_out(source, masked("disc", inside), [], CONFIG), (60, 50), factor, CONFIG)
        assert np.abs(small.pixels[small.inside].astype(int) - [200, 40, 40]).max() <= 2
    plain = np.asarray(Image.fromarray(source[10:41, 15:46]).resize((15, 15), Image.Resampling.BILINEAR))
    shape = scaled(cut_out(source, masked("disc", inside), [], CONFIG), (60, 50), 0.5, CONFIG).inside
    assert np.abs(plain[shape].astype(int) - [200, 40, 40]).max() > 60, "resized without its mask it would bring blue"


def test_sizes_are_its_share_of_its_own_picture_within_the_bounds():
    cutout = cut_out(noise(200, 200), masked("x", disc(200, 200, 100, 100, 20)), [], CONFIG)  # 41 of 200
    assert scaled(cutout, (100, 100), 1.0, CONFIG).inside.shape == (20, 20)
    assert max(scaled(cutout, (800, 800), 1.0, CONFIG).inside.shape) <= 62, "no more than 1.5 times enlarged"
    assert max(scaled(cutout, (60, 30), 9.0, a_copy_paste(max_enlarge=9)).inside.shape) <= 0.7 * 30
    with pytest.raises(Unused, match="too-small"):
        scaled(cutout, (100, 100), 0.3, a_copy_paste(min_side=12))
    assert scaled(cutout, (100, 100), 0.3, a_copy_paste(min_side=4)).inside.shape == (6, 6)


def test_a_mirrored_object_is_mirrored_with_its_mask():
    inside = np.zeros((30, 40), bool)
    inside[5:25, 5:10] = inside[20:25, 5:30] = True  # an L
    cutout = cut_out(noise(40, 30), masked("L", inside), [], CONFIG)
    turned = scaled(cutout, (40, 30), 1.0, CONFIG, mirrored=True)
    assert (turned.inside == cutout.inside[:, ::-1]).all()
    assert (turned.pixels[turned.inside] == cutout.pixels[:, ::-1][turned.inside]).all()


# ---------------------------------------------------------------- what cannot be cut out

DISC = masked("x", disc(60, 50, 30, 25, 9)).at
assert isinstance(DISC, Mask) and DISC.xyxy == (21, 16, 40, 35)
UNUSED = [
    (boxed("x", 5, 5, 20, 20), [], CONFIG, "no-mask"),
    (dot("x", 5, 5), [], CONFIG, "no-extent"),
    (Object(label="x", at=Mask(xyxy=(0, 0, 9, 9), rle=(3000,))), [], CONFIG, "empty-mask"),
    (Object(label="x", at=Mask(xyxy=(0, 0, 9, 9), rle=(9, 9))), [], CONFIG, "unreadable-mask"),
    (Object(label="x", at=Mask(xyxy=(21, 16, 43, 35), rle=DISC.rle)), [], CONFIG, "mask-not-of-its-box"),
    (boxed("x", 5, 5, 20, 20), [boxed("y", 19, 19, 30, 30)], RECTANGLES, "rectangle-shared"),
    (boxed("x", 5, 5, 20, 20), [dot("y", 6, 6)], RECTANGLES, "rectangle-shared"),
]  # fmt: skip


@pytest.mark.parametrize("thing, others, config, why", UNUSED, ids=[why for *_, why in UNUSED])
def test_what_has_no_exact_shape_is_not_pasted(thing, others, config, why):
    with pytest.raises(Unused, match=f"^{why}$"):
        cut_out(noise(60, 50), thing, others, config)


def test_a_box_without_a_mask_is_pasted_as_its_whole_rectangle():
    source = noise(60, 50)
    cutout = cut_out(source, boxed("x", 5.4, 5, 20, 19.5), [boxed("y", 20, 19.5, 30, 30)], RECTANGLES)
    assert cutout.inside.all() and (cutout.pixels == source[5:20, 5:20]).all()
    found = paste_all(noise(60, 50, 1), [], [(cutout, 30, 30)], RECTANGLES)
    assert found.objects == [boxed("x", 30, 30, 45, 45)]


# ---------------------------------------------------------------- what lies below


def below(*things, over: tuple[int, int, int, int], config=CONFIG):
    """Objects of a 100x100 picture after a white rectangle was pasted over a part of it."""
    left, top, right, bottom = over
    cutout = a_cutout(right - left, bottom - top)
    return paste_all(np.zeros((100, 100, 3), np.uint8), things, [(cutout, left, top)], config)


def square(label: str, left: int, top: int, right: int, bottom: int):
    inside = np.zeros((100, 100), bool)
    inside[top:bottom, left:right] = True
    return masked(label, inside)


def test_a_mask_is_computed_again_and_its_box_with_it():
    found = below(square("a", 10, 10, 50, 50), over=(40, 0, 70, 100))
    assert found.objects[0] == square("a", 10, 10, 40, 50)
    found = below(square("a", 10, 10, 50, 50), over=(20, 20, 30, 30))  # a hole: the box stays
    [held, _] = found.objects
    region = region_of(held.at, 100, 100)  # type: ignore[arg-type]
    assert region is not None and region.area == 1500 and held.at.xyxy == (10, 10, 50, 50)  # type: ignore[union-attr]
    assert found.events == {"pasted": 1, "cut": 1}


@pytest.mark.parametrize("hidden, stays", [(23, True), (24, True), (25, False), (40, False)])
def test_an_object_is_removed_above_the_threshold_of_what_is_hidden(hidden: int, stays: bool):
    found = below(square("a", 10, 10, 50, 50), over=(10, 10, 10 + hidden, 50))  # of 40 columns; 0.6 is the limit
    assert ([thing.label for thing in found.objects] == ["a", "over"]) is stays
    assert found.events["removed"] == (not stays)
    assert found.hidden_labels == ({"a"} if 24 < hidden < 40 else set()), "hidden whole, nothing of it shows"
    everything = below(square("a", 10, 10, 50, 50), over=(10, 10, 49, 50), config=a_copy_paste(max_hidden=1))
    assert everything.objects[0] == square("a", 49, 10, 50, 50), "negative control: no threshold, no removal"


def test_a_box_without_mask_is_cut_where_a_whole_strip_is_covered_and_else_stays():
    box = boxed("a", 10.5, 10, 50, 50)
    assert below(box, over=(40, 0, 70, 100)).objects[0] == boxed("a", 10.5, 10, 40, 50)
    assert below(box, over=(40, 0, 70, 30)).objects[0] == box, "a corner: it may reach as far as before"
    assert below(box, over=(0, 0, 60, 45)).objects == [square("over", 0, 0, 60, 45)]


def test_what_nothing_covers_is_left_exactly_as_it_was_stated():
    polygon = masked("p", disc(100, 100, 20, 20, 5)).model_copy(
        update={"at": Mask(xyxy=(14.7, 14.7, 25.2, 25.2), polygons=((14.7, 14.7, 25.2, 14.7, 25.2, 25.2, 14.7, 25.2),))}
    )
    things = [polygon, boxed("b", 30.25, 5, 39.9, 9), dot("c", 3, 3)]
    found = below(*things, over=(60, 60, 80, 80))
    assert found.objects[:3] == things and found.events == {"pasted": 1, "cut": 0}


def test_a_point_is_there_or_covered():
    found = below(dot("in", 40.5, 40.5), dot("edge", 50, 40), dot("out", 39.9, 40), over=(40, 40, 50, 50))
    assert [thing.label for thing in found.objects] == ["edge", "out", "over"]
    assert found.hidden_labels == {"in"}


def test_what_is_pasted_later_lies_over_what_was_pasted_before():
    one, two, three = a_cutout(20, 20, "one"), a_cutout(20, 20, "two"), a_cutout(30, 30, "three")
    found = paste_all(np.zeros((100, 100, 3), np.uint8), [], [(one, 10, 10), (two, 20, 10), (three, 60, 60)], CONFIG)
    assert [thing.at.xyxy for thing in found.objects] == [(10, 10, 20, 30), (20, 10, 40, 30), (60, 60, 90, 90)]  # type: ignore[union-attr]
    total = sum(region_of(thing.at, 100, 100).area for thing in found.objects)  # type: ignore[arg-type, union-attr]
    assert total == (found.pixels == 255).all(2).sum(), "every white pixel belongs to one object"
    hidden = paste_all(np.zeros((100, 100, 3), np.uint8), [], [(one, 65, 65), (three, 60, 60)], CONFIG)
    assert [thing.label for thing in hidden.objects] == ["three"] and hidden.events["removed"] == 1


def test_visible_masks_of_random_scenes_are_what_painting_in_order_shows():
    rng = np.random.default_rng(5)
    for _ in range(25):
        owner = np.full((60, 60), -1)
        cutouts, things = [], []
        for number in range(3):
            inside = disc(60, 60, *(int(v) for v in rng.integers(15, 45, 2)), int(rng.integers(4, 14)))
            things.append(masked(f"below {number}", inside))
        for number in range(4):
            width, height = (int(v) for v in rng.integers(4, 25, 2))
            left, top = int(rng.integers(0, 60 - width + 1)), int(rng.integers(0, 60 - height + 1))
            cutouts.append((a_cutout(width, height, f"over {number}"), left, top))
            owner[top : top + height, left : left + width] = number
        found = paste_all(np.zeros((60, 60, 3), np.uint8), things, cutouts, a_copy_paste(max_hidden=1))
        for thing in found.objects:
            kind, number = thing.label.split()
            before = mask_of(things[int(number)].at, 60, 60) if kind == "below" else None  # type: ignore[arg-type]
            want = owner == int(number) if before is None else before & (owner == -1)
            assert (mask_of(thing.at, 60, 60) == want).all()  # type: ignore[arg-type]

"""Cutting an object out of its picture, and pasting it into another one: pixels, masks and boxes. Pure.

A pasted pixel is one of the object's mask and no other pixel changes, so masks and boxes of what is pasted are exact.
What lies below loses the covered pixels: masks are computed again, boxes without a mask are cut where a whole strip is
covered (how far the object itself reaches is not known), and what is hidden too much goes.

H, W: pixels of the picture; h, w: of the cut-out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipelines.prepare.grounding.masks import Region, Xyxy, as_mask, region_of
from trainer.data.sample import Box, Mask, Object, Point
from trainer.grounding import CopyPaste

HALF = 128
"""Alpha from which on a resized pixel belongs to the object."""
Size = tuple[int, int]
"""Width, height."""


class Unused(ValueError):
    """An object that is not pasted; the text is the name that it is counted by."""


@dataclass(frozen=True)
class Cutout:
    label: str
    pixels: np.ndarray
    """uint8[h, w, 3]"""
    inside: np.ndarray
    """bool[h, w], nothing but belonging pixels at its four sides"""
    masked: bool
    """Whether the shape is the object's own, not its box."""
    of: Size
    """Of the picture that it was cut from."""


@dataclass
class Layer:
    """One object of the picture while things are pasted over it."""

    thing: Object
    region: Region | None
    """None: a point."""
    whole: int = 0
    """Pixels before anything covered it."""
    pasted: bool = False


@dataclass
class Pasted:
    """The picture after all was pasted. `events` counts pasted, removed, cut."""

    pixels: np.ndarray
    objects: list[Object]
    hidden_labels: set[str]
    """Of objects that are no longer annotated while a part of them shows."""
    events: Counter[str] = field(default_factory=Counter)


# ---------------------------------------------------------------- cutting out


def cut_out(picture: np.ndarray, thing: Object, others: Sequence[Object], config: CopyPaste) -> Cutout:
    """The object's pixels, uint8[H, W, 3] -> Cutout.

    Raises:
        Unused: no mask (where rectangles are not asked for), a mask that is empty, unreadable or not that of its box,
        a rectangle that other objects reach into.
    """
    height, width = picture.shape[:2]
    if isinstance(thing.at, Mask):
        region = _own_shape(thing.at, width, height, config.max_mask_off)
    elif not isinstance(thing.at, Box):
        raise Unused("no-extent")
    elif config.without_mask == "skip":
        raise Unused("no-mask")
    else:
        region = _rectangle(thing.at, others, width, height)
    left, top, right, bottom = region.window
    return Cutout(
        thing.label, picture[top:bottom, left:right], region.inside, isinstance(thing.at, Mask), (width, height)
    )


def _own_shape(mask: Mask, width: int, height: int, max_off: float) -> Region:
    try:
        region = region_of(mask, width, height)
    except ValueError:
        raise Unused("unreadable-mask") from None
    if region is None:
        raise Unused("empty-mask")
    if max(abs(a - b) for a, b in zip(region.window, mask.xyxy, strict=True)) > max_off:
        raise Unused("mask-not-of-its-box")
    return region


def _rectangle(box: Box, others: Sequence[Object], width: int, height: int) -> Region:
    region = region_of(box, width, height)
    if region is None:
        raise Unused("empty-box")
    left, top, right, bottom = region.window
    for other in others:
        if isinstance(other.at, Point):
            reaches = left <= other.at.xy[0] < right and top <= other.at.xy[1] < bottom
        else:
            x0, y0, x1, y1 = other.at.xyxy  # type: ignore[union-attr]
            reaches = x0 < right and x1 > left and y0 < bottom and y1 > top
        if reaches:
            raise Unused("rectangle-shared")
    return region


def scaled(cutout: Cutout, onto: Size, factor: float, config: CopyPaste, *, mirrored: bool = False) -> Cutout:
    """At the size that it has in a picture of size `onto`: its share of its own picture's side times `factor`, within
    the recipe's bounds.

    Raises:
        Unused: too-small.
    """
    height, width = cutout.inside.shape
    ratio = factor * math.sqrt(onto[0] * onto[1] / (cutout.of[0] * cutout.of[1]))
    ratio = min(ratio, config.max_enlarge, config.max_side * onto[0] / width, config.max_side * onto[1] / height)
    size = max(1, math.floor(width * ratio)), max(1, math.floor(height * ratio))
    if max(size) < config.min_side:
        raise Unused("too-small")
    alpha = np.where(cutout.inside, 255, 0).astype(np.uint8)
    picture = Image.fromarray(np.dstack([cutout.pixels, alpha]), "RGBA")
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # PIL weighs colours by alpha when it resizes RGBA: nothing of what lay behind the object comes with it. Bilinear:
    # bicubic overshoots at the border, by 12 of 255 measured
    small = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    region = Region(0, 0, small[:, :, 3] >= HALF).tight()
    if region is None or max(region.inside.shape) < config.min_side:
        raise Unused("too-small")
    left, top, right, bottom = region.window
    return Cutout(cutout.label, small[top:bottom, left:right, :3], region.inside, cutout.masked, cutout.of)


# ---------------------------------------------------------------- pasting


def paste_all(
    picture: np.ndarray, objects: Sequence[Object], cutouts: Sequence[tuple[Cutout, int, int]], config: CopyPaste
) -> Pasted:
    """Paste cut-outs at (left, top), each over what was there before.

    Args:
        picture: uint8[H, W, 3], not changed.
        cutouts: they lie whole within the picture.
    """
    height, width = picture.shape[:2]
    pixels = picture.copy()
    layers = [_layer(thing, width, height) for thing in objects]
    for cutout, left, top in cutouts:
        over = Region(left, top, cutout.inside)
        x0, y0, x1, y1 = over.window
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height, "a cut-out beyond the picture"
        pixels[y0:y1, x0:x1][cutout.inside] = cutout.pixels[cutout.inside]
        for layer in layers:
            layer.region = layer.region.without(over) if layer.region is not None else None
        layers.append(_pasted_layer(cutout, over, width, height))
    return _annotated(pixels, layers, [Region(x, y, c.inside) for c, x, y in cutouts], config)


def _layer(thing: Object, width: int, height: int) -> Layer:
    if isinstance(thing.at, Point):
        return Layer(thing, None)
    region = region_of(thing.at, width, height)  # type: ignore[arg-type]
    return (
        Layer(thing, region, region.area) if region is not None else Layer(thing, Region(0, 0, np.zeros((1, 1), bool)))
    )


def _pasted_layer(cutout: Cutout, region: Region, width: int, height: int) -> Layer:
    mask = as_mask(region, width, height)
    at: Mask | Box = mask if cutout.masked else Box(xyxy=mask.xyxy)
    return Layer(Object(label=cutout.label, at=at), region, region.area, pasted=True)


def _annotated(pixels: np.ndarray, layers: list[Layer], over: list[Region], config: CopyPaste) -> Pasted:
    found = Pasted(pixels, [], set())
    height, width = pixels.shape[:2]
    for layer in layers:
        thing = _under(layer, over) if layer.region is None else _visible(layer, layer.region, config, width, height)
        found.events["pasted"] += layer.pasted
        if thing is None:
            found.events["removed"] += 1
            if layer.region is None or layer.region.area:
                found.hidden_labels.add(layer.thing.label)
            continue
        found.events["cut"] += thing is not layer.thing
        found.objects.append(thing)
    return found


def _under(layer: Layer, over: list[Region]) -> Object | None:
    """A point is there or covered."""
    assert isinstance(layer.thing.at, Point)
    return None if any(region.holds(*layer.thing.at.xy) for region in over) else layer.thing


def _visible(layer: Layer, region: Region, config: CopyPaste, width: int, height: int) -> Object | None:
    """The object as far as it shows: itself where nothing covers it, None where too much does."""
    area = region.area
    if area == layer.whole and area:
        return layer.thing
    if not area or 1 - area / layer.whole > config.max_hidden:
        return None
    if isinstance(layer.thing.at, Mask):
        return layer.thing.model_copy(update={"at": as_mask(region, width, height)})
    box = _cut_box(layer.thing.at, region.window, region.box())  # type: ignore[arg-type]
    return layer.thing if box == layer.thing.at else layer.thing.model_copy(update={"at": box})


def _cut_box(at: Box, before: Xyxy, after: Xyxy | None) -> Box:
    """Sides that moved are those of the pixels that show; the others stay as they were stated."""
    assert after is not None
    sides = [
        float(new) if new != old else stated for stated, old, new in zip(at.xyxy, before, after, strict=True)
    ]  # fmt: skip
    return Box(xyxy=tuple(sides))  # type: ignore[arg-type]

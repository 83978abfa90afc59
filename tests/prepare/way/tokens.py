"""A sample through plan and encode in any family, and what its tokens say read back: words, places, times.

The reading back is the tests' own: it shares no code with what writes (trainer/data/objects.py, coordinates.py).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.data.builders import some_rules
from tests.prepare.grounding.test_round_trip import family
from tests.prepare.through import Encoded, encoded
from trainer.data.sample import Action, Box, Mask, Media, Message, Objects, Point, Sample, Span, parts_of
from trainer.data.tokenizer import Tokenizer
from trainer.recipe import Rendering

LENGTH, PATCHES = 32768, 65536
VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families with a place for videos."""
SHARES = ("llava", "llava_next")
"""Families that write shares of a picture: no tool's signature can state its screen in them."""
UNSPOKEN = {"llava": {"tool"}, "llava_next": {"tool", "system"}}
"""Roles that a chat template has no words for: Vicuna's, and Mistral's, which tiny_llava_next has."""
Place = tuple[int, float, float]
"""Medium, and x and y in pixels of its file."""


@dataclass(frozen=True)
class Learnt:
    text: str
    """What the model learns to say, decoded from the ids of its labels."""
    sizes: dict[int, tuple[int, int]]
    """Medium -> width and height that it is resized to."""
    frames: dict[int, tuple[int, ...]]
    """Video -> the frames that are shown."""


@cache
def tokenizer_of(name: str) -> Tokenizer:
    """Bytes, and the family's own tokens."""
    found, _ = family(name)
    special = list(dict.fromkeys([*found.special_tokens, *filter(None, (found.markers.bos,))]))
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special, *found.plain_tokens]
    inner = tokenizers.Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return Tokenizer(inner.to_str().encode())


def refused(sample: Sample, name: str) -> bool:
    """Whether a family has no place for the sample: known, counted as a drop by the reason `rendering`."""
    parts = {part.part for part in parts_of(sample)}
    roles = {message.role for message in sample.messages}
    return (
        ("video" in parts and name not in VIDEO)
        or ("tools" in parts and name in SHARES)
        or bool(roles & UNSPOKEN.get(name, set()))
    )


def learnt(sample: Sample, files: Sequence[bytes], folder: Path, rendering: Rendering, name: str) -> list[Learnt] | str:
    """Both variants; or the reason of the drop."""
    found, _ = family(name)
    plain = some_rules(rendering, length=LENGTH, patch_budget=PATCHES)
    tokenizer = tokenizer_of(name)
    ways = encoded(sample, files, folder, replace(plain, family=found, tokenizer=tokenizer))
    return ways if isinstance(ways, str) else [_learnt(way, tokenizer) for way in ways]


def _learnt(way: Encoded, tokenizer: Tokenizer) -> Learnt:
    sizes: dict[int, tuple[int, int]] = {}
    frames: dict[int, tuple[int, ...]] = {}
    for span in way.laid.spans:
        if span.grid is not None:
            sizes[span.media] = (span.grid.width, span.grid.height)
            frames[span.media] = (*frames.get(span.media, ()), *span.frames)
    return Learnt(tokenizer.decode(way.labels), sizes, frames)


# ---------------------------------------------------------------- what a sample says


def answers(sample: Sample) -> list[Message]:
    """Messages that the loss is taken over."""
    found = [message for message in sample.messages if message.role in ("assistant", "document")]
    return [*([] if sample.chosen else found), *sample.chosen, *sample.rejected]


def places(sample: Sample) -> list[Place]:
    """Every point that the answers write, in order: corners of boxes, points, places of actions."""
    found: list[Place] = []
    for message in answers(sample):
        for part in message.parts:
            if isinstance(part, Action):
                found += [(part.media, *xy) for xy in part.coordinates.values()]
            elif isinstance(part, Objects):
                listed = _of_page(part) if part.form == "html" else _of_list(part)
                found += [(part.media, *xy) for xy in listed]
    return found


def _of_list(part: Objects) -> Iterator[tuple[float, float]]:
    for thing in part.objects:
        if isinstance(thing.at, Point):
            yield thing.at.xy
        elif isinstance(thing.at, Box | Mask):
            yield from (thing.at.xyxy[:2], thing.at.xyxy[2:])


def _of_page(part: Objects) -> Iterator[tuple[float, float]]:
    """As QwenVL HTML has them: a list begins with the box of all its entries, a picture's box stands twice."""
    for is_list, group in groupby(part.objects, lambda thing: thing.role == "li"):
        listed = list(group)
        boxes = [thing.at.xyxy for thing in listed if isinstance(thing.at, Box)]
        assert len(boxes) == len(listed)
        if is_list:
            left, top, right, bottom = zip(*boxes, strict=True)
            yield from ((min(left), min(top)), (max(right), max(bottom)))
        for thing, box in zip(listed, boxes, strict=True):
            drawn = not is_list and thing.role not in ("p", "table") and not re.fullmatch("h[1-6]", thing.role or "")
            for _ in range(2 if drawn else 1):
                yield from (box[:2], box[2:])


def times(sample: Sample) -> list[tuple[Media, float]]:
    """Every second that the answers write, in order, with its video."""
    spans = [
        (sample.media[part.media], thing.at)
        for message in answers(sample)
        for part in message.parts
        if isinstance(part, Objects)
        for thing in part.objects
        if isinstance(thing.at, Span)
    ]
    return [(media, seconds) for media, span in spans for seconds in (span.start_s, span.end_s)]


def words(sample: Sample) -> list[str]:
    """Every text, label and content of the answers, in order."""
    found = []
    for message in answers(sample):
        for part in message.parts:
            if part.part == "text":
                found.append(part.text)
            elif isinstance(part, Action):
                found += [part.action, *(value for value in part.arguments.values() if isinstance(value, str))]
            elif isinstance(part, Objects):
                for thing in part.objects:
                    told = [thing.content or ""] if part.form == "html" else [thing.label, thing.content or ""]
                    found += [] if part.form == "plain" else told
    return [word for word in found if word]


# ---------------------------------------------------------------- what tokens say

_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?")
_PLACES = re.compile(
    r'"(?:bbox_2d|point_2d)":\[(?P<json>[^\]]*)\]'
    r'|data-bbox="(?P<page>[^"]*)"'
    r"|<points (?P<xml>[^>]*?) alt="
    r'|"coordinate2?": \[(?P<call>[^\]]*)\]'
    r"|(?:<\|box_start\|>|<box>)(?P<tags>[^<]*)<"
    r"|\[(?P<list>\d\.\d\d(?:, \d\.\d\d)+)\]"
)
_PLAIN = re.compile(r"(?<![\d.])(?P<plain>\d+(?:\.\d+)?(?:, \d+(?:\.\d+)?){1,3})(?![\d.])")
_TIMES = re.compile(r"(\d+\.\d) seconds|(\d\d):(\d\d):(\d\d):(\d\d)")


def read_places(text: str, *, plain: bool) -> list[tuple[float, float]]:
    """Numbers as they are written, in pairs. `plain`: bare ones among words count, too."""
    pattern = re.compile(f"{_PLACES.pattern}|{_PLAIN.pattern}") if plain else _PLACES
    found: list[tuple[float, float]] = []
    for match in pattern.finditer(text):
        kind = match.lastgroup or ""
        values = re.findall(r'="([^"]*)"', match[kind]) if kind == "xml" else _NUMBERS.findall(match[kind])
        assert len(values) % 2 == 0, match[0]
        found += zip(map(float, values[::2]), map(float, values[1::2]), strict=True)
    return found


def in_pixels(xy: tuple[float, float], media: Media, size: tuple[int, int], kind: str) -> tuple[float, float]:
    """What a model wrote, in pixels of the file, by the published convention."""
    if kind == "square":  # shares of the square that the picture is padded to, the picture in its middle
        side = max(media.width, media.height)
        return xy[0] * side - (side - media.width) // 2, xy[1] * side - (side - media.height) // 2
    over = {"absolute": size, "thousand": (1000, 1000), "unit": (1, 1)}[kind]
    return xy[0] / over[0] * media.width, xy[1] / over[1] * media.height


def steps(media: Media, size: tuple[int, int], kind: str) -> tuple[float, float]:
    """Pixels of the file between neighbouring numbers."""
    side = max(media.width, media.height)
    counts = {"absolute": size, "thousand": (1000, 1000), "unit": (100, 100), "square": (100, 100)}[kind]
    wide, high = (side, side) if kind == "square" else (media.width, media.height)
    return wide / counts[0], high / counts[1]


def assert_places_come_back(sample: Sample, way: Learnt, kind: str) -> None:
    """Each within a pixel, or half a step of the convention's grid where that is coarser."""
    plain = any(isinstance(part, Objects) and part.form == "plain" for part in parts_of(sample))
    want = places(sample)
    found = read_places(way.text, plain=plain and bool(want))
    assert len(found) == len(want), (way.text, want)
    for xy, (number, *true) in zip(found, want, strict=True):
        media, size = sample.media[number], way.sizes[number]
        back, step = in_pixels(xy, media, size, kind), steps(media, size, kind)
        for at in range(2):
            assert abs(back[at] - true[at]) <= max(1.0, step[at] / 2) + 1e-6, (xy, back, true, size)


def assert_times_come_back(sample: Sample, way: Learnt) -> None:
    """Each within half a tenth of a second, or a frame where times are written as hours:minutes:seconds:frame. Times
    that somebody wrote as words are words."""
    want = times(sample)
    found = _TIMES.findall(way.text) if want else []
    assert len(found) == len(want), way.text
    for (plain, *parts), (media, true) in zip(found, want, strict=True):
        rate = round(media.fps) or 1
        hours, minutes, whole, frame = map(int, parts) if not plain else (0, 0, 0, 0)
        back = float(plain) if plain else 3600 * hours + 60 * minutes + whole + frame / rate
        assert abs(back - true) <= (0.05 if plain else 1 / rate) + 1e-6, (back, true)


def assert_words_come_back(sample: Sample, way: Learnt) -> None:
    """Every word in its order; a document's first token has nothing before it that could predict it."""
    said, at = html.unescape(way.text), 0
    for number, word in enumerate(words(sample)):
        inner = html.unescape(re.sub(r"^<table>|</table>$", "", word))
        forms = [inner, json.dumps(inner, ensure_ascii=False)[1:-1], *([inner[1:]] if number == 0 else [])]
        starts = [(start, form) for form in forms if (start := said.find(form, at)) >= 0]
        assert starts, (word, way.text)
        start, form = min(starts)
        at = start + len(form)


def assert_frames_are_the_videos(sample: Sample, way: Learnt) -> None:
    """Frames in order, from the first part of the video to its last."""
    for number, media in enumerate(sample.media):
        if media.kind == "video":
            shown = way.frames[number]
            assert len(shown) >= 4 and list(shown) == sorted(shown) and 0 <= shown[0] <= shown[-1] < media.num_frames
            assert shown[0] < media.num_frames / 2 <= shown[-1]


def assert_come_back(
    samples: Sequence[tuple[Sample, list[bytes]]], folder: Path, rendering: Rendering, name: str
) -> None:
    """Words, places, times and frames of every sample, from the tokens of a family that has a place for it."""
    kind = family(name)[0].coordinates.kind
    for number, (sample, files) in enumerate(samples):
        ways = learnt(sample, files, folder / str(number), rendering, name)
        if refused(sample, name):
            assert ways == "rendering"
            continue
        assert not isinstance(ways, str), (ways, sample.id)
        for way in ways:
            assert_words_come_back(sample, way)
            assert_places_come_back(sample, way, kind)
            assert_times_come_back(sample, way)
            assert_frames_are_the_videos(sample, way)

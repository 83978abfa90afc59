"""How right an answer is: pure functions from (key, answer text) to figures. Torch-free.

Boxes and points are compared in pixels of the original file: the caller hands the function that turns the family's
written coordinates (absolute pixels of the resized image, 0-1000, 0-1) back. `correct` is 0 or 1 for every task and is
what rejection sampling keeps and what accuracy counts; the other figures say how far off an answer is. Where an answer
reasons first, its final answer counts (final.py).

| task | correct when | further figures |
| --- | --- | --- |
| colour | the only colour named is the right one | |
| name | the answer, less a leading phrase, is the name | |
| choice | the first option letter or the option's text is the right one | |
| text | the normalised texts are equal | similarity (1 - normalised edit distance) |
| exact | the texts are equal, white space at the ends aside | |
| latex | the expressions are the same (latex.py) | undecided: 1 where that took too long |
| count | the first number, in digits or words, is equal | error |
| number | within 5 % (ChartQA's relaxed accuracy, arXiv 2203.10244 section 5.1) | error |
| box | intersection over union is 0.5 or more | iou |
| point | inside the box of the key, or within 5 % of the image's diagonal of its point | distance |
| time | intersection over union is 0.5 or more | iou, error_s (mean of both ends) |
| html | structure similarity is 0.9 or more | similarity |
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.after import latex
from trainer.after.final import final_answer
from trainer.after.structure import html_similarity
from trainer.data.sample import Key

ToOriginal = Callable[[float, float], tuple[float, float]]
Box = tuple[float, float, float, float]
Place = TypeVar("Place", bound=tuple[float, ...])

COLOURS = (
    *("black", "blue", "brown", "cyan", "gray", "green", "magenta", "orange", "pink", "purple", "red"),
    *("teal", "violet", "white", "yellow", "grey"),
)
UNBOUNDED = ("error", "error_s", "distance")
"""Figures of which one answer of sixty digits would be the whole mean."""
MAX_EDITS = 10_000_000
"""Characters times characters up to which texts are compared letter by letter: some seconds."""
_SAME_COLOUR = {"grey": "gray"}
_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = {word: number for number, word in enumerate(_WORDS.split())}
_LEAD = re.compile(
    r"^(?:(?:the answer is|answer is|answer|it is|it's|its|this is|that is|there is|there are|the picture shows"
    r"|a|an|the|is|are)\b[ :]*)+"
)
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_OPTION = re.compile(r"(?<![A-Za-z])\(?(?![AI] [a-z])([A-Z])\)?(?![A-Za-z'])")
"""The letter of an option, neither I nor A as a word of a sentence."""
_EITHER = re.compile(r"\d\s+or\s+-?\d", re.IGNORECASE)


@dataclass(frozen=True)
class Frame:
    """The picture a spatial answer is about: its size in the original file, and how written coordinates map to it."""

    width: int
    height: int
    to_original: ToOriginal


def score(key: Key, text: str, frame: Frame | None = None) -> dict[str, float]:
    """Figures of one answer; always with `correct`. An answer that cannot be read is wrong, never an error.

    Raises:
        ValueError: box and point without a frame, or a key whose value is not of its task's form.
    """
    found = _SCORERS[key.task](key.value, text if key.task == "html" else final_answer(text), frame)
    return {name: figure for name, figure in found.items() if math.isfinite(figure)}  # 400 digits are no number


def overall_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Every figure over the answers that have it: the mean, but of UNBOUNDED ones the median."""
    values = {name: [one[name] for one in scores if name in one] for name in sorted({n for one in scores for n in one})}
    return {
        name: statistics.median(found) if name in UNBOUNDED else math.fsum(found) / len(found)
        for name, found in values.items()
    }


# ---------------------------------------------------------------- words


def normalise(text: str) -> str:
    """Lower case, one space between words, no punctuation at the ends, no leading phrase unless it is all there is."""
    text = " ".join(text.lower().replace("*", " ").split()).strip(" .,;:!?\"'`")
    return _LEAD.sub("", text).strip(" .,;:!?\"'`") or text


def _colour(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    words = {_SAME_COLOUR.get(word, word) for word in re.findall(r"[a-z]+", text.lower()) if word in COLOURS}
    wanted = normalise(str(value))
    wanted = _SAME_COLOUR.get(wanted, wanted)
    if wanted not in COLOURS:
        return {"correct": float(normalise(text) == wanted)}
    return {"correct": float(words == {wanted})}


def _name(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    return {"correct": float(normalise(text) == normalise(str(value)))}


def _choice(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    wanted = str(value).strip()
    if re.fullmatch(r"\(?[A-Za-z]\)?\.?", wanted):
        letter = re.search(r"[A-Za-z]", wanted)
        found = _OPTION.search(text)
        return {"correct": float(bool(found and letter and found.group(1) == letter.group().upper()))}
    return {"correct": float(normalise(text) == normalise(wanted))}


def _text(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    wanted, found = normalise(str(value)), normalise(text)
    longest = max(len(wanted), len(found))
    if len(wanted) * len(found) > MAX_EDITS:
        return {"correct": float(wanted == found), "similarity": float(wanted == found)}
    similarity = 1.0 - edit_distance(wanted, found) / longest if longest else 1.0
    return {"correct": float(wanted == found), "similarity": similarity}


def _exact(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    return {"correct": float(text.strip() == str(value).strip())}


def _latex(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    try:
        return {"correct": float(latex.same(text, str(value)))}
    except latex.Undecided:
        return {"correct": 0.0, "undecided": 1.0}


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Levenshtein: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


# ---------------------------------------------------------------- numbers


def parse_number(text: str) -> float | None:
    """The first number, in digits (1,234.5) or as a word up to twenty. None where one or another is offered."""
    text = text.replace("−", "-")
    if _EITHER.search(text):
        return None
    for word in re.findall(r"-?\d+(?:[.,]\d+)*|[a-z]+", text.lower()):
        if word in NUMBER_WORDS:
            return float(NUMBER_WORDS[word])
        if _NUMBER.fullmatch(word):
            return _decimal(word)
    return None


def _decimal(word: str) -> float:
    """1,234 is a thousand and more; 12,5 is a decimal comma; 1,234.5 is read as in English."""
    if "." not in word and re.fullmatch(r"-?\d+,(?!\d{3}$)\d+", word):
        word = word.replace(",", ".")
    word = word.replace(",", "")
    whole, *rest = word.split(".")
    return float(f"{whole}.{''.join(rest)}" if rest else whole)


def _count(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    found = parse_number(text)
    if found is None:
        return {"correct": 0.0}
    return {"correct": float(found == float(value)), "error": abs(found - float(value))}


def _number(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    found = parse_number(text)
    if found is None:
        return {"correct": 0.0}
    error = abs(found - float(value))
    return {"correct": float(error <= 0.05 * abs(float(value))), "error": error}


# ---------------------------------------------------------------- places

_A_NUMBER = r"(-?\d++(?:\.\d++)?)"
"""Possessive: a number is taken whole. Taken in parts, three numbers are four, and a thousand digits take minutes."""
_FOUR = re.compile(rf"(?<!\d)(?<!\d\.){_A_NUMBER}[\s,]++{_A_NUMBER}[)\]]?\s*+,?\s*+[(\[]?{_A_NUMBER}[\s,]++{_A_NUMBER}")
_POINT_TAG = re.compile(rf"""x1?\s*=\s*"{_A_NUMBER}"\s+y1?\s*=\s*"{_A_NUMBER}\"""")
_TWO = re.compile(rf"(?<!\d)(?<!\d\.){_A_NUMBER}[\s,]++{_A_NUMBER}")
_BETWEEN_BOX_TOKENS = re.compile(r"(?:<\|box_start\|>|<box>)(.*?)(?:<\|box_end\|>|</box>|$)", re.DOTALL)


def parse_boxes(text: str) -> list[Box]:
    """Boxes as written (not yet in the original's pixels): JSON bbox_2d, data-bbox, <|box_start|> or <box>, or four
    numbers. Between box tokens, where there are any: digits of a label are then none of a box."""
    boxes = [_box(entry["bbox_2d"]) for entry in _json_entries(text) if _numbers(entry.get("bbox_2d"), 4)]
    if boxes:
        return boxes
    without_labels = re.sub(r'"label"\s*:\s*"[^"]*"|bbox_2d', " ", text)
    places = _BETWEEN_BOX_TOKENS.findall(text) or [without_labels]
    return _finite(_box(found.groups()) for place in places for found in _FOUR.finditer(place))


def parse_points(text: str) -> list[tuple[float, float]]:
    """Points as written: JSON point_2d, <points x1= y1=>, "coordinate": [x, y], a box's centre, or two numbers."""
    entries = _json_entries(text)
    points = [(float(e["point_2d"][0]), float(e["point_2d"][1])) for e in entries if _numbers(e.get("point_2d"), 2)]
    if points:
        return points
    if tags := _POINT_TAG.findall(text):
        return _finite((float(x), float(y)) for x, y in tags)
    if found := re.search(r'"coordinate"\s*:\s*\[([^\[\]]*)\]', text):
        text = found.group(1)
    elif boxes := parse_boxes(text):
        return [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes]
    places = _BETWEEN_BOX_TOKENS.findall(text) or [re.sub(r"point_2d|bbox_2d", " ", text)]
    return _finite((float(x), float(y)) for place in places for x, y in _TWO.findall(place))


def _finite(places: Iterable[Place]) -> list[Place]:
    """Less those with a number of more digits than a float has: they are nowhere."""
    return [place for place in places if all(map(math.isfinite, place))]


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 when either is empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (one, other)]
    union = sum(areas) - shared
    return shared / union if union > 0 and shared > 0 else 0.0


def original_boxes(text: str, frame: Frame) -> list[Box]:
    """The boxes of an answer in pixels of the original, clipped to it: for scores and for drawing."""
    boxes = []
    for x1, y1, x2, y2 in parse_boxes(text):
        (left, top), (right, bottom) = frame.to_original(x1, y1), frame.to_original(x2, y2)
        across, down = float(frame.width), float(frame.height)
        boxes.append((_within(left, across), _within(top, down), _within(right, across), _within(bottom, down)))
    return boxes


def _within(value: float, most: float) -> float:
    return min(max(value, 0.0), most)


def _box_score(value: Any, text: str, frame: Frame | None) -> dict[str, float]:
    found = original_boxes(text, _needed(frame, "box"))
    overlap = iou(found[0], _box(value)) if found else 0.0
    return {"correct": float(overlap >= 0.5), "iou": overlap}


def _point_score(value: Any, text: str, frame: Frame | None) -> dict[str, float]:
    frame = _needed(frame, "point")
    found = parse_points(text)
    if not found:
        return {"correct": 0.0}
    x, y = frame.to_original(*found[0])
    diagonal = math.hypot(frame.width, frame.height)
    if len(value) == 4:
        x1, y1, x2, y2 = value
        distance = math.hypot((x1 + x2) / 2 - x, (y1 + y2) / 2 - y) / diagonal
        return {"correct": float(x1 <= x <= x2 and y1 <= y <= y2), "distance": distance}
    distance = math.hypot(value[0] - x, value[1] - y) / diagonal
    return {"correct": float(distance <= 0.05), "distance": distance}


def _needed(frame: Frame | None, task: str) -> Frame:
    if frame is None:
        raise ValueError(f"a {task} is scored in pixels of its picture: hand its frame")
    return frame


def _box(numbers: Sequence[float | str]) -> Box:
    x1, y1, x2, y2 = (float(number) for number in numbers)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _numbers(value: Any, count: int) -> bool:
    numbers = isinstance(value, list) and len(value) == count and all(isinstance(n, (int, float)) for n in value)
    return numbers and all(map(math.isfinite, value))


def _json_entries(text: str) -> list[dict[str, Any]]:
    """Every JSON object in the text, also when the list around them is cut short."""
    found = []
    for piece in re.findall(r"\{[^{}]*\}", text):
        try:
            entry = json.loads(piece, parse_int=float)  # an int of 400 digits is no float, one of 5,000 none at all
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


# ---------------------------------------------------------------- times

_HMSF = re.compile(r"(\d{1,2}):(\d{2}):(\d{2})(?::(\d{2})|\.(\d+))?")
_MINUTES = re.compile(r"(?<![\d:])(\d{1,3}):(\d{2})(?:\.(\d+))?(?![\d:])")
_SECONDS = re.compile(r"\d+(?:\.\d+)?")


def parse_times(text: str, *, frames_per_s: float = 30.0) -> list[float]:
    """Seconds in the order written: hours:minutes:seconds:frames, minutes:seconds, or plain numbers."""
    if found := _HMSF.findall(text):
        return [
            int(h) * 3600 + int(m) * 60 + int(s) + (int(f) / frames_per_s if f else float(f"0.{part or 0}"))
            for h, m, s, f, part in found
        ]
    if found := _MINUTES.findall(text):
        return [int(m) * 60 + float(f"{s}.{part or 0}") for m, s, part in found]
    return [float(number) for number in _SECONDS.findall(text)]


def time_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two spans; two equal moments overlap fully."""
    if tuple(one) == tuple(other):
        return 1.0
    shared = max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)
    union = (one[1] - one[0]) + (other[1] - other[0]) - shared
    return shared / union if union > 0 else 0.0


def _time(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    found = parse_times(text)
    if not found:
        return {"correct": 0.0, "iou": 0.0}
    start, end = sorted((found[0], found[1] if len(found) > 1 else found[0]))
    overlap = time_iou((start, end), value)
    error_s = (abs(start - value[0]) + abs(end - value[1])) / 2
    return {"correct": float(overlap >= 0.5), "iou": overlap, "error_s": error_s}


def _html(value: Any, text: str, _: Frame | None) -> dict[str, float]:
    similarity = html_similarity(text, str(value))
    return {"correct": float(similarity >= 0.9), "similarity": similarity}


_SCORERS: dict[str, Callable[[Any, str, Frame | None], dict[str, float]]] = {
    "colour": _colour,
    "count": _count,
    "name": _name,
    "choice": _choice,
    "text": _text,
    "exact": _exact,
    "latex": _latex,
    "number": _number,
    "box": _box_score,
    "point": _point_score,
    "time": _time,
    "html": _html,
}

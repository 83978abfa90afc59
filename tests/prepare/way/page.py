"""The page of `qwenvl data preview` read back: what is drawn on which picture, frames with times, steps in order."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from pipelines.cli.main import main
from trainer.data.sample import Action, Box, Mask, Media, Message, Objects, Point, Sample, Span, parts_of

FRAMES = 8


@dataclass
class Drawing:
    """What lies on one picture, in its own pixels."""

    views: list[list[float]] = field(default_factory=list)
    rects: list[tuple[float, ...]] = field(default_factory=list)
    """x, y, width, height of outlines."""
    circles: list[tuple[float, ...]] = field(default_factory=list)
    tips: list[tuple[float, ...]] = field(default_factory=list)
    """Of arrows."""
    lines: int = 0
    areas: int = 0
    """Masks: polygons and pictures laid over."""
    picture: Image.Image | None = None


@dataclass
class Card:
    """A sample as the page shows it."""

    drawings: list[Drawing] = field(default_factory=list)
    frames: list[Image.Image] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    bars: list[tuple[float, float]] = field(default_factory=list)
    """Left and width in percent of the video."""
    pages: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Card] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        got = {name: value or "" for name, value in attrs}
        names = got.get("class", "").split()
        self.inside.append(tag)
        if tag == "article":
            self.cards.append(Card())
        if not self.cards:
            return
        card = self.cards[-1]
        if tag == "div" and "message" in names:
            card.roles.append(names[1])
        elif tag == "div" and "shown" in names:
            card.drawings.append(Drawing())
        elif tag == "div" and "bar" in names:
            left, wide = re.findall(r"(?:left|width):([\d.]+)%", got["style"])
            card.bars.append((float(left), float(wide)))
        elif tag == "img":
            picture = Image.open(io.BytesIO(base64.b64decode(got["src"].partition(",")[2])))
            picture.load()
            if "figure" in self.inside:
                card.frames.append(picture)
            else:
                card.drawings[-1].picture = picture
        elif tag == "iframe":
            assert "sandbox" in got
            card.pages.append(got["srcdoc"])
        elif "svg" in self.inside:
            self._drawn(card.drawings[-1], tag, got)

    @staticmethod
    def _drawn(drawing: Drawing, tag: str, got: dict[str, str]) -> None:
        if tag == "svg":
            drawing.views.append([float(value) for value in got["viewbox"].split()])
        elif tag == "rect" and got.get("fill") == "none":
            drawing.rects.append(tuple(float(got[name]) for name in ("x", "y", "width", "height")))
        elif tag == "circle":
            drawing.circles.append((float(got["cx"]), float(got["cy"])))
        elif tag == "polyline":
            _, tip, _ = got["points"].split()
            drawing.tips.append(tuple(map(float, tip.split(","))))
        drawing.lines += tag == "line"
        drawing.areas += tag in ("polygon", "image")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self.cards:
            return
        self.cards[-1].text += data
        if self.inside and self.inside[-1] == "figcaption":
            self.cards[-1].moments.append(float(data.removesuffix(" s")))


def cards_of(shards: str, samples: int, path: Path) -> list[Card]:
    """The page of all samples, made by the command line."""
    assert main(["data", "preview", shards, "--html", str(path), "--samples", str(samples)]) == 0
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader.cards


# ---------------------------------------------------------------- a sample on it


def assert_shows(card: Card, sample: Sample) -> None:
    """Every message, word, medium, object and action of the sample is there, in its place."""
    messages = (*sample.messages, *sample.chosen, *sample.rejected)
    assert card.roles == [message.role for message in messages]
    pages = {part.media for part in parts_of(sample) if isinstance(part, Objects) and part.form == "html"}
    shown = [number for message in messages for number in _pictures(message, pages)]
    images = [number for number in shown if sample.media[number].kind == "image"]
    videos = [number for number in shown if sample.media[number].kind == "video"]
    assert len(card.drawings) == len(images)
    for number, drawing in zip(images, card.drawings, strict=True):
        _assert_drawn(drawing, sample.media[number], _on(sample, number))
    assert len(card.frames) == len(card.moments) == sum(min(FRAMES, sample.media[n].num_frames) for n in videos)
    for part in parts_of(sample):
        if part.part == "text":
            assert part.text.strip() in card.text, part.text
        elif isinstance(part, Action):
            assert part.action in card.text and all(str(value) in card.text for value in part.arguments.values())
        elif isinstance(part, Objects):
            words = [thing.content or "" if part.form == "html" else thing.label for thing in part.objects]
            said = html.unescape(card.text) if part.form == "html" else card.text
            assert all(html.unescape(re.sub(r"^<table>|</table>$", "", word)) in said for word in words), words
    for number in videos:
        _assert_timed(card, sample.media[number], _on(sample, number))
    assert len(card.pages) == sum(isinstance(part, Objects) and part.form == "html" for part in parts_of(sample))
    boxes = [thing for number in pages for thing in _on(sample, number)]
    assert sum(page.count("data-bbox=") for page in card.pages) >= len(boxes)


def _pictures(message: Message, pages: set[int]) -> Iterable[int]:
    """Media in the order that they are shown in: a page stands beside its HTML."""
    for part in message.parts:
        stands = part.part in ("image", "video") and part.media not in pages  # type: ignore[union-attr]
        if stands or (isinstance(part, Objects) and part.form == "html"):
            yield part.media  # type: ignore[union-attr]


def _on(sample: Sample, number: int) -> list:
    """Objects' places and actions of a medium."""
    found: list = []
    for part in parts_of(sample):
        if isinstance(part, Objects) and part.media == number:
            found += [thing.at for thing in part.objects]
        elif isinstance(part, Action) and part.media == number:
            found.append(part)
    return found


def _near(one: Iterable[float], other: Iterable[float]) -> bool:
    return all(abs(a - b) < 0.01 for a, b in zip(one, other, strict=True))


def _assert_drawn(drawing: Drawing, media: Media, things: list) -> None:
    assert drawing.picture is not None
    assert drawing.views and all(view == [0, 0, media.width, media.height] for view in drawing.views)
    wide, high = drawing.picture.size
    assert abs(wide / high - media.width / media.height) <= 0.02 * media.width / media.height
    for at in things:
        if isinstance(at, Box | Mask):
            left, top, right, bottom = at.xyxy
            assert any(_near(rect, (left, top, right - left, bottom - top)) for rect in drawing.rects), at
        elif isinstance(at, Point):
            assert any(_near(circle, at.xy) for circle in drawing.circles), at
        elif isinstance(at, Action):
            where = list(at.coordinates.values())
            assert all(any(_near(xy, circle) for circle in drawing.circles) for xy in where[:1]), at
            assert all(any(_near(xy, tip) for tip in drawing.tips) for xy in where[1:]), at
            assert drawing.lines >= len(where) and drawing.lines >= 2 * bool(where)
    assert drawing.areas >= sum(isinstance(at, Mask) for at in things)
    assert len(drawing.rects) >= sum(isinstance(at, Box | Mask) for at in things)


def _assert_timed(card: Card, media: Media, things: list) -> None:
    assert card.moments == sorted(card.moments) and card.moments[0] >= 0 and card.moments[-1] < media.duration_s
    assert card.moments[-1] > media.duration_s / 2
    spans = [at for at in things if isinstance(at, Span)]
    assert len(card.bars) == len(spans)
    for (left, wide), at in zip(card.bars, spans, strict=True):
        assert _near(
            (left, wide), (100 * at.start_s / media.duration_s, 100 * (at.end_s - at.start_s) / media.duration_s)
        )

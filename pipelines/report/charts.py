"""Figures of the report as inline SVG: pure functions from numbers to text. No script, no fonts, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

INK, MUTED, LINE, PALE = "#1c2430", "#5b6676", "#dfe4ea", "#f5f7f9"
ACCENT, WARM, GREEN = "#2456a6", "#b4541a", "#2c7a4b"
FONT = "font-family='system-ui, sans-serif'"


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return []
    if high <= low:
        high = low + max(abs(low), 1.0) * 0.1
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9) * step
    ticks = [first + index * step for index in range(math.ceil((high - first) / step - 1e-9) + 1)]
    return [round(tick, 10) for tick in ticks]


def short(value: float) -> str:
    """A number as people read it on an axis."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.4g}"


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean, narrower at both ends."""
    half = window // 2
    found = []
    for at in range(len(values)):
        part = values[max(0, at - half) : at + half + 1]
        found.append(math.fsum(part) / len(part))
    return found


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.stop - self.start)


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    label: str,
    width: int = 240,
    height: int = 150,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """One curve: the raw values pale, their running mean strong. `marks` are (step, what happened) on the x axis."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return empty(width, height, "no figures")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = nice_ticks(min(ys), max(ys), 3)
    across = Scale(min(0, xs[0]), max(xs[-1], xs[0] + 1), 38, width - 8)
    up = Scale(ticks[0], ticks[-1], height - 22, 8)
    parts = [_open(width, height, label)]
    for tick in ticks:
        y = up(tick)
        parts.append(f"<line x1='38' x2='{width - 8}' y1='{y:.1f}' y2='{y:.1f}' stroke='{LINE}'/>")
        parts.append(_text(33, y + 3.5, short(tick), anchor="end"))
    parts.append(_text(across(xs[0]), height - 7, short(xs[0]), anchor="start"))
    parts.append(_text(width - 8, height - 7, f"step {short(xs[-1])}", anchor="end"))
    for step, told in marks:
        x = across(step)
        parts.append(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='8' y2='{height - 22}' stroke='{WARM}' stroke-dasharray='3 3'>"
            f"<title>{escape(told)}</title></line>"
        )
    mean = smoothed(ys, max(1, len(ys) // 12) * 2 + 1)
    parts.append(_path([(across(x), up(y)) for x, y in points], ACCENT, 1, opacity=0.3))
    parts.append(_path([(across(x), up(y)) for x, y in zip(xs, mean, strict=True)], ACCENT, 2))
    return "".join([*parts, "</svg>"])


def _path(points: Sequence[tuple[float, float]], colour: str, width: float, *, opacity: float = 1.0) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f"<polyline points='{drawn}' fill='none' stroke='{colour}' stroke-width='{width}' stroke-opacity='{opacity}' "
        "stroke-linejoin='round'/>"
    )


def interval_chart(rows: Sequence[tuple[str, float, float, float]], *, label: str, width: int = 520) -> str:
    """(name, middle, low, high) a row: a dot with its interval, and the zero line that it should not touch."""
    if not rows:
        return empty(width, 40, "no figures")
    height = 26 * len(rows) + 30
    ticks = nice_ticks(min(0.0, *(row[2] for row in rows)), max(0.0, *(row[3] for row in rows)), 5)
    across = Scale(ticks[0], ticks[-1], 120, width - 16)
    parts = [_open(width, height, label)]
    for tick in ticks:
        x, strong = across(tick), tick == 0
        colour = INK if strong else LINE
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='4' y2='{height - 22}' stroke='{colour}'/>")
        parts.append(_text(x, height - 7, short(tick), anchor="middle"))
    for at, (name, middle, low, high) in enumerate(rows):
        y = 17 + 26 * at
        colour = GREEN if low > 0 else MUTED
        parts.append(_text(110, y + 4, name, anchor="end", colour=INK, size=12))
        parts.append(
            f"<line x1='{across(low):.1f}' x2='{across(high):.1f}' y1='{y}' y2='{y}' stroke='{colour}' "
            f"stroke-width='3' stroke-linecap='round'><title>{low:.3f} to {high:.3f}</title></line>"
        )
        parts.append(f"<circle cx='{across(middle):.1f}' cy='{y}' r='4.5' fill='{colour}'/>")
    return "".join([*parts, "</svg>"])


def bar_chart(rows: Sequence[tuple[str, float, str]], *, label: str, width: int = 520) -> str:
    """(name, value, text) a row, from zero."""
    if not rows:
        return empty(width, 40, "no figures")
    height = 24 * len(rows) + 6
    across = Scale(0.0, max(value for _, value, _ in rows) or 1.0, 120, width - 90)
    parts = [_open(width, height, label)]
    for at, (name, value, told) in enumerate(rows):
        y = 4 + 24 * at
        parts.append(_text(110, y + 13, name, anchor="end", colour=INK, size=12))
        parts.append(
            f"<rect x='120' y='{y}' width='{max(across(value) - 120, 1):.1f}' height='17' rx='2' fill='{ACCENT}'/>"
        )
        parts.append(_text(across(value) + 7, y + 13, told, colour=MUTED, size=12))
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Box:
    name: str
    lines: tuple[str, ...]
    strong: bool = False


def lineage_chart(boxes: Sequence[Box], side: Sequence[tuple[int, int, Box]], *, width: int = 1120) -> str:
    """Boxes from left to right with arrows; `side` are (from, to, box) below: what a stage gave to a later one."""
    gap, height = 20, 80
    each = (width - gap * (len(boxes) - 1)) / max(len(boxes), 1)
    total = height + (104 if side else 10)
    parts = [_open(width, total, "what each model grew from")]
    parts.append(
        f"<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0L8 4L0 8z' fill='{MUTED}'/></marker></defs>"
    )
    for at, box in enumerate(boxes):
        x = at * (each + gap)
        parts.append(_box(x, 2, each, height - 4, box))
        if at:
            parts.append(_arrow(x - gap + 1, height / 2, x - 1, height / 2))
    for start, end, box in side:
        x = (start + 0.5) * (each + gap) + 12
        wide = max(each, (end - start) * (each + gap) - 24)
        y = height + 34
        parts.append(_box(x, y, wide, 62, box))
        parts.append(_arrow(x + 18, height - 1, x + 18, y - 1))
        parts.append(_arrow(x + wide - 18, y - 1, x + wide - 18, height + 1))
    return "".join([*parts, "</svg>"])


def _box(x: float, y: float, width: float, height: float, box: Box) -> str:
    fill, edge = ("#eaf1fb", ACCENT) if box.strong else ("#ffffff", "#b9c2ce")
    place = f"x='{x + 0.5:.1f}' y='{y}' width='{width - 1:.1f}' height='{height}'"
    shown = f"<rect {place} rx='6' fill='{fill}' stroke='{edge}'/>"
    shown += _text(x + width / 2, y + 20, box.name, anchor="middle", colour=INK, size=13, weight=600)
    for at, line in enumerate(box.lines):
        shown += _text(x + width / 2, y + 38 + 16 * at, line, anchor="middle", size=11)
    return shown


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{MUTED}' stroke-width='1.4' "
        "marker-end='url(#tip)'/>"
    )


def _open(width: int, height: float, label: str) -> str:
    return (
        f"<svg viewBox='0 0 {width} {height:.0f}' width='100%' role='img' aria-label='{escape(label)}' "
        f"style='max-width:{width}px' {FONT}>"
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", colour: str = MUTED, size: int = 10, weight: int = 400
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{colour}' text-anchor='{anchor}' "
        f"font-weight='{weight}'>{escape(text)}</text>"
    )


def empty(width: int, height: int, told: str) -> str:
    return _open(width, height, told) + _text(width / 2, height / 2, told, anchor="middle", size=12) + "</svg>"

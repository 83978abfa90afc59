"""What stands at notes and bars, from MusicXML to ABC 2.1: keys, clefs, meters, barlines, directions, chord symbols."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping
from fractions import Fraction

from pipelines.prepare.formats.rows import BadRow

FIFTHS = ("F", "C", "G", "D", "A", "E", "B")
SIGNS = {-2: "__", -1: "_", 0: "=", 1: "^", 2: "^^"}
MODES = {
    **{"major": (0, ""), "minor": (3, "m"), "ionian": (0, "ion"), "dorian": (2, "dor"), "phrygian": (4, "phr")},
    **{"lydian": (-1, "lyd"), "mixolydian": (1, "mix"), "aeolian": (3, "aeo"), "locrian": (5, "loc")},
}
"""Mode -> fifths from the key signature to its tonic, and what follows the tonic's letter."""
CLEFS = {
    **{("G", 2, 0): "treble", ("G", 2, -1): "treble-8", ("G", 2, 1): "treble+8"},
    **{("F", 4, 0): "bass", ("F", 4, -1): "bass-8", ("F", 3, 0): "bass3"},
    **{("C", 3, 0): "alto", ("C", 4, 0): "tenor", ("C", 1, 0): "soprano", ("C", 2, 0): "mezzosoprano"},
}
DYNAMICS = ("pppp", "ppp", "pp", "p", "mp", "mf", "f", "ff", "fff", "ffff", "sfz")
BARS = {"regular": "|", "light-light": "||", "light-heavy": "|]"}
KINDS = {
    **{"major": "", "minor": "m", "augmented": "aug", "diminished": "dim", "dominant": "7", "major-seventh": "maj7"},
    **{"minor-seventh": "m7", "diminished-seventh": "dim7", "half-diminished": "m7b5", "major-sixth": "6"},
    **{"minor-sixth": "m6", "dominant-ninth": "9", "suspended-fourth": "sus4", "suspended-second": "sus2"},
}
"""Kinds of chords -> what follows the root."""
TYPES = {
    **{"long": Fraction(16), "breve": Fraction(8), "whole": Fraction(4), "half": Fraction(2), "quarter": Fraction(1)},
    **{"eighth": Fraction(1, 2), "16th": Fraction(1, 4), "32nd": Fraction(1, 8), "64th": Fraction(1, 16)},
}
"""Note values in quarters."""
NUMBER = re.compile(r"[+-]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})", re.ASCII)
"""Fraction would compute the zeros of 1e999999999."""
METER = re.compile(r"[1-9]\d?(?:\+[1-9]\d?)*/(?:1|2|4|8|16|32|64|128)", re.ASCII)
"""verovio divides by what else stands there, and the process ends."""


def unsupported(element: str, where: str) -> BadRow:
    return BadRow("unsupported", "what ABC can say", f"<{element}> in {where}")


def only(parent: ET.Element, known: Collection[str], where: str) -> None:
    """Raises BadRow for a child that is not among those: what is not read would be missing from the text."""
    for child in parent:
        if child.tag not in known:
            raise unsupported(f"{parent.tag}/{child.tag}", where)


def text_of(parent: ET.Element, path: str, default: str | None = None) -> str:
    """Raises BadRow: no such element, or an empty one, and no default."""
    found = (parent.findtext(path) or "").strip()
    if found or default is not None:
        return found or default or ""
    raise BadRow("wrong-form", f"<{path}> in <{parent.tag}>", "none")


def number_of(parent: ET.Element, path: str, default: str | None = None) -> Fraction:
    """Raises BadRow: no number."""
    text = text_of(parent, path, default)
    if not NUMBER.fullmatch(text):
        raise BadRow("wrong-form", f"a number in <{path}> of <{parent.tag}>", repr(text[:40]))
    return Fraction(text)


def quoted(text: str, where: str) -> str:
    """Words between the quotation marks of ABC, on one line."""
    words = " ".join(text.split())
    if any(char in words for char in '"\\%'):
        raise BadRow("unsupported", 'words without ", \\ and %', f"{words!r} in {where}")
    return words


# ---------------------------------------------------------------- keys, meters, clefs


def key_of(key: ET.Element, where: str) -> tuple[str, dict[str, int]]:
    """(tonic and mode in ABC, letter -> alteration)."""
    only(key, ("cancel", "fifths", "mode"), where)
    fifths, mode = int(text_of(key, "fifths")), text_of(key, "mode", "major")
    mode = "major" if mode == "none" else mode
    if mode not in MODES or not -7 <= fifths <= 7:
        raise unsupported(f"key of {fifths} fifths, {mode}", where)
    shift, ending = MODES[mode]
    at = fifths + shift + 1  # F is 0
    sign = {-1: "b", 0: "", 1: "#"}.get(at // 7)
    if sign is None:
        raise unsupported(f"key of {fifths} fifths, {mode}", where)
    signs = {FIFTHS[n]: 1 for n in range(fifths)} if fifths > 0 else {FIFTHS[6 - n]: -1 for n in range(-fifths)}
    return f"{FIFTHS[at % 7]}{sign}{ending}", signs


def meter_of(time: ET.Element, where: str) -> str:
    only(time, ("beats", "beat-type", "senza-misura"), where)
    if time.find("senza-misura") is not None:
        return "none"
    if len(time.findall("beats")) != 1:
        raise unsupported("time of several beats", where)
    written = f"{text_of(time, 'beats')}/{text_of(time, 'beat-type')}"
    if not METER.fullmatch(written):
        raise BadRow("wrong-form", "a meter as 3/4 or 2+3/8", f"{written[:40]!r} in {where}")
    if time.get("symbol", "normal") not in ("common", "cut", "normal"):
        raise unsupported(f"time drawn as {time.get('symbol')}", where)
    return {("common", "4/4"): "C", ("cut", "2/2"): "C|"}.get((time.get("symbol", ""), written), written)


def clef_of(clef: ET.Element, where: str) -> str:
    only(clef, ("sign", "line", "clef-octave-change"), where)
    sign = text_of(clef, "sign")
    line = int(text_of(clef, "line", {"G": "2", "F": "4", "C": "3"}.get(sign, "0")))
    found = CLEFS.get((sign, line, int(text_of(clef, "clef-octave-change", "0"))))
    if found is None:
        raise unsupported(f"clef {sign}{line}", where)
    return found


# ---------------------------------------------------------------- barlines


def barline(bar: ET.Element, where: str) -> tuple[str, str]:
    """(sign, number of the ending that begins here, or nothing)."""
    only(bar, ("bar-style", "repeat", "ending", "footnote", "level"), where)
    style, repeat, ending = text_of(bar, "bar-style", ""), bar.find("repeat"), bar.find("ending")
    at_left = bar.get("location", "right") == "left"
    begins = ""
    if ending is not None and ending.get("type") == "start":
        begins = ending.get("number", "").replace(" ", "")
        if not begins.replace(",", "").isdigit() or not at_left:
            raise unsupported(f"ending {begins!r}", where)
    if repeat is not None:
        forward = repeat.get("direction") == "forward"
        if forward != at_left or repeat.get("times", "2") != "2":
            raise unsupported(f"repeat {repeat.get('direction')}, times {repeat.get('times')}", where)
        return ("|:" if forward else ":|"), begins
    if style and style not in BARS:
        raise unsupported(f"bar-style {style}", where)
    return (BARS[style] if style else "" if at_left else "|"), begins


# ---------------------------------------------------------------- directions and chord symbols


def direction_marks(direction: ET.Element, where: str) -> list[tuple[str, str]]:
    """(kind, ABC): `tempo` (the value of Q:), `wedge` (its type), or `mark` before the next note."""
    only(direction, ("direction-type", "offset", "staff", "voice", "sound", "listening"), where)
    if number_of(direction, "offset", "0") != 0:
        raise unsupported("direction/offset", where)
    side = "_" if direction.get("placement") == "below" else "^"
    found: list[tuple[str, str]] = []
    for group in direction.findall("direction-type"):
        for item in group:
            found.append(_mark(item, side, where))
    return found


def _mark(item: ET.Element, side: str, where: str) -> tuple[str, str]:
    if item.tag == "words":
        return "mark", f'"{side}{quoted(item.text or "", where)}"'
    if item.tag == "dynamics":
        only(item, DYNAMICS, where)
        return "mark", "".join(f"!{sign.tag}!" for sign in item)
    if item.tag in ("segno", "coda"):
        return "mark", f"!{item.tag}!"
    if item.tag == "wedge":
        if item.get("type") not in ("crescendo", "diminuendo", "stop"):
            raise unsupported(f"wedge {item.get('type')}", where)
        return "wedge", item.get("type", "")
    if item.tag == "metronome":
        only(item, ("beat-unit", "beat-unit-dot", "per-minute"), where)
        if len(item.findall("beat-unit")) != 1 or not text_of(item, "per-minute").isdigit():
            raise unsupported("metronome other than a note and a number", where)
        beat = note_value(text_of(item, "beat-unit"), len(item.findall("beat-unit-dot")), where) / 4
        return "tempo", f"{beat.numerator}/{beat.denominator}={text_of(item, 'per-minute')}"
    raise unsupported(f"direction-type/{item.tag}", where)


def chord_symbol(harmony: ET.Element, where: str) -> str:
    only(harmony, ("root", "kind", "bass", "staff"), where)
    kind = text_of(harmony, "kind")
    if kind not in KINDS or harmony.find("root") is None:
        raise unsupported(f"harmony of the kind {kind}", where)
    root = _letter(harmony, "root", where)
    bass = f"/{_letter(harmony, 'bass', where)}" if harmony.find("bass") is not None else ""
    return f'"{root}{KINDS[kind]}{bass}"'


def _letter(harmony: ET.Element, name: str, where: str) -> str:
    sign: Mapping[int, str] = {-1: "b", 0: "", 1: "#"}
    alter = int(text_of(harmony, f"{name}/{name}-alter", "0"))
    if alter not in sign:
        raise unsupported(f"{name}-alter {alter}", where)
    if (step := text_of(harmony, f"{name}/{name}-step")) not in FIFTHS:
        raise unsupported(f"{name}-step {step[:20]!r}", where)
    return f"{step}{sign[alter]}"


def note_value(name: str, dots: int, where: str) -> Fraction:
    """In quarters."""
    if name not in TYPES:
        raise unsupported(f"type {name}", where)
    return TYPES[name] * (2 - Fraction(1, 2**dots))

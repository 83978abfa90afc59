"""Short tunes in MusicXML, drawn by chance: a random walk over the scale in one or two parts, with what scores have
(accidentals, beams, chords, slurs, dynamics, repeats). They are not music; they are notation whose text is exact.
"""

from __future__ import annotations

import random
from itertools import accumulate
from typing import NamedTuple

LETTERS = "CDEFGAB"
KEYS = {-3: "E flat", -2: "B flat", -1: "F", 0: "C", 1: "G", 2: "D", 3: "A"}
"""Fifths -> the major key's name."""
SHARPS = "FCGDAEB"
TYPES = {1: "16th", 2: "eighth", 3: "eighth", 4: "quarter", 6: "quarter", 8: "half", 12: "half", 16: "whole"}
"""Sixteenths -> note value."""
DOTTED = (3, 6, 12)
ACCIDENTALS = {-1: "flat", 0: "natural", 1: "sharp"}
METERS = {(4, 4): 16, (3, 4): 12, (2, 4): 8, (6, 8): 12}
"""Meter -> sixteenths of a bar."""
BEATS = {4: ((4,), (2, 2), (3, 1), (2, 1, 1), (4,)), 8: ((8,), (6, 2)), 6: ((6,), (4, 2), (2, 2, 2))}
"""Sixteenths -> rhythms that fill them."""


class Tune(NamedTuple):
    title: str
    musicxml: str


def tune(rng: random.Random) -> Tune:
    """One or two parts of two to four bars."""
    fifths, meter, num_bars = rng.choice(list(KEYS)), rng.choice(list(METERS)), rng.randint(2, 4)
    repeated = rng.random() < 0.3
    clefs = rng.choice((("G",), ("G",), ("F",), ("G", "F")))
    labels = ("Flute", "Cello") if len(clefs) > 1 else ("",)
    parts = [_part(rng, clef, fifths, meter, num_bars, repeated=repeated) for clef in clefs]
    listed = "".join(
        f'<score-part id="P{number}"><part-name>{label}</part-name></score-part>'
        for number, label in enumerate(labels, 1)
    )
    written = "".join(f'<part id="P{number}">{part}</part>' for number, part in enumerate(parts, 1))
    text = f'<score-partwise version="4.0"><part-list>{listed}</part-list>{written}</score-partwise>'
    kind = "A duet" if len(clefs) > 1 else "A tune"
    return Tune(f"{kind} in {KEYS[fifths]} major", text)


def _part(rng: random.Random, clef: str, fifths: int, meter: tuple[int, int], num_bars: int, *, repeated: bool) -> str:
    signs = dict.fromkeys(SHARPS[: max(fifths, 0)], 1)
    signs |= dict.fromkeys(SHARPS[::-1][: max(-fifths, 0)], -1)
    place = 7 * (5 if clef == "G" else 3)  # steps above C0: the middle of the staff
    found = []
    for bar in range(num_bars):
        rhythm = [METERS[meter]] if bar == num_bars - 1 else _rhythm(rng, METERS[meter], compound=meter[1] == 8)
        notes, place = _bar(rng, rhythm, signs, place, clef)
        head = ""
        if bar == 0:
            line = 2 if clef == "G" else 4
            head = (
                f"<attributes><divisions>4</divisions><key><fifths>{fifths}</fifths></key><time><beats>{meter[0]}"
                f"</beats><beat-type>{meter[1]}</beat-type></time><clef><sign>{clef}</sign><line>{line}</line></clef>"
                "</attributes>"
            )
            if repeated:
                head = f'<barline location="left"><repeat direction="forward"/></barline>{head}'
            mark = rng.choice(("p", "mf", "f", ""))
            if mark and clef == "G":
                dynamics = f"<direction-type><dynamics><{mark}/></dynamics></direction-type>"
                head += f'<direction placement="below">{dynamics}</direction>'
        tail = '<repeat direction="backward"/>' if repeated else ""
        end = "" if bar < num_bars - 1 else f"<barline><bar-style>light-heavy</bar-style>{tail}</barline>"
        found.append(f'<measure number="{bar + 1}">{head}{notes}{end}</measure>')
    return "".join(found)


def _rhythm(rng: random.Random, length: int, *, compound: bool) -> list[int]:
    found: list[int] = []
    while (left := length - sum(found)) > 0:
        beat = 6 if compound else 8 if left >= 8 and rng.random() < 0.25 else 4
        found += rng.choice(BEATS[beat])
    return found


def _bar(rng: random.Random, rhythm: list[int], signs: dict[str, int], place: int, clef: str) -> tuple[str, int]:
    """The notes of a bar, and where the walk has come to."""
    middle, shown = 7 * (5 if clef == "G" else 3) - (1 if clef == "G" else -1), {}
    slur = rng.randrange(len(rhythm) - 1) if len(rhythm) > 2 and rng.random() < 0.4 else None
    starts = [0, *accumulate(rhythm)]
    text = ""
    for at, length in enumerate(rhythm):
        place += rng.choice((-2, -1, -1, 1, 1, 2)) + (1 if place < middle - 5 else -1 if place > middle + 5 else 0)
        resting = length >= 2 and slur not in (at, at - 1) and rng.random() < 0.08
        more = _beam(rhythm, starts, at)
        if slur is not None and at in (slur, slur + 1):
            more += f'<notations><slur number="1" type="{"start" if at == slur else "stop"}"/></notations>'
        if resting:
            text += f"<note><rest/><duration>{length}</duration><voice>1</voice>{_value(length)}</note>"
            continue
        text += _note(rng, place, length, more, signs, shown)
        if length >= 4 and rng.random() < 0.15:
            text += _note(rng, place + 2, length, "", signs, shown, chord=True)
    return text, place


def _value(length: int) -> str:
    return f"<type>{TYPES[length]}</type>{'<dot/>' if length in DOTTED else ''}"


def _note(
    rng: random.Random, place: int, length: int, more: str, signs: dict[str, int], shown: dict, *, chord: bool = False
) -> str:
    letter, octave = LETTERS[place % 7], place // 7
    usual = signs.get(letter, 0)
    alter = rng.choice((0, 1, -1)) if rng.random() < 0.08 else usual
    accidental = ""
    if alter != shown.get(place, usual):
        shown[place] = alter
        accidental = f"<accidental>{ACCIDENTALS[alter]}</accidental>"
    pitch = f"<step>{letter}</step>{f'<alter>{alter}</alter>' if alter else ''}<octave>{octave}</octave>"
    joined = "<chord/>" if chord else ""
    return (
        f"<note>{joined}<pitch>{pitch}</pitch><duration>{length}</duration><voice>1</voice>{_value(length)}"
        f"{accidental}{more}</note>"
    )


def _beam(rhythm: list[int], starts: list[int], at: int) -> str:
    """Eighths and shorter notes of one quarter are beamed, where all of it is such notes."""
    beat = starts[at] // 4
    group = [n for n, start in enumerate(starts[:-1]) if start // 4 == beat]
    whole = sum(rhythm[n] for n in group) == 4 and starts[group[0]] % 4 == 0
    if not whole or len(group) < 2 or any(rhythm[n] > 3 for n in group):
        return ""
    kind = "begin" if at == group[0] else "end" if at == group[-1] else "continue"
    return f'<beam number="1">{kind}</beam>'

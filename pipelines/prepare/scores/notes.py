"""Notes, chords and grace notes with all that stands at them, from MusicXML to ABC 2.1. Lengths count in L:1/8."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from pipelines.prepare.formats.rows import BadRow
from pipelines.prepare.scores.marks import SIGNS, note_value, number_of, only, text_of, unsupported

UNIT = Fraction(1, 2)
"""L:1/8, in quarters."""
KNOWN = (
    *("grace", "chord", "pitch", "rest", "duration", "tie", "voice", "type", "dot", "accidental"),
    *("time-modification", "stem", "staff", "beam", "notations", "lyric", "instrument", "play"),
)
SHOWN = {"double-sharp": 2, "sharp-sharp": 2, "sharp": 1, "natural": 0, "flat": -1, "flat-flat": -2, "double-flat": -2}
"""Accidental that is drawn -> alteration."""
ONCE = ("pitch", "rest", "duration", "type", "accidental", "time-modification", "voice", "staff")
ARTICULATIONS = {
    **{"staccato": ".", "accent": "!>!", "strong-accent": "!^!", "tenuto": "!tenuto!", "staccatissimo": "!wedge!"},
}
ORNAMENTS = {
    **{"trill-mark": "!trill!", "turn": "!turn!", "inverted-turn": "!invertedturn!", "mordent": "!lowermordent!"},
    **{"inverted-mordent": "!uppermordent!"},
}
TECHNICAL = {"up-bow": "!upbow!", "down-bow": "!downbow!", "open-string": "!open!", "stopped": "!plus!"}


class Syllable(NamedTuple):
    text: str
    """As it stands in w:, with a hyphen where its word goes on; empty where the one before is held."""
    held: bool
    """A line behind it goes on under the next notes."""


@dataclass
class Event:
    """A note, chord or rest with its place in the bar, in quarters."""

    start: Fraction
    length: Fraction
    text: str
    joined: bool = False
    """Beamed with the next one."""
    whole_bar: bool = False
    syllables: dict[int, Syllable] | None = None
    """By verse; None of what takes none (rests)."""


@dataclass
class Alterations:
    """What a note sounds like without a sign of its own: the key, and the signs in this bar."""

    key: dict[str, int] = field(default_factory=dict)
    bar: dict[tuple[str, int], int] = field(default_factory=dict)

    def of(self, letter: str, octave: int) -> int:
        return self.bar.get((letter, octave), self.key.get(letter, 0))


def length_text(length: Fraction) -> str:
    """A length in quarters as ABC has it after a note."""
    units = length / UNIT
    if units == 1:
        return ""
    if units.denominator == 1:
        return str(units.numerator)
    return f"{units.numerator if units.numerator > 1 else ''}/{units.denominator}"


def written_length(note: ET.Element, where: str) -> Fraction:
    """The value that is drawn, in quarters, before a tuplet shortens it."""
    return note_value(text_of(note, "type"), len(note.findall("dot")), where)


def sounding_length(note: ET.Element, divisions: int, where: str) -> Fraction:
    """In quarters. Raises BadRow: the note's value and its duration are not the same."""
    lasts = number_of(note, "duration") / divisions
    if lasts <= 0:
        raise BadRow("wrong-form", "a <duration> above 0", f"{lasts} in {where}")
    if is_whole_bar(note):
        return lasts
    actual, normal = tuplet_of(note)
    if written_length(note, where) * normal / actual != lasts:
        expected = f"a <duration> of {written_length(note, where) * normal / actual} quarters, as <type> says"
        raise BadRow("wrong-form", expected, f"{lasts} in {where}")
    return lasts


def check_once(note: ET.Element, where: str) -> None:
    """Raises BadRow: an element twice, of which readers take either."""
    pitch = note.find("pitch")
    tags = [child.tag for child in note if child.tag in ONCE] + [
        child.tag for child in (pitch if pitch is not None else ())
    ]
    if twice := next((tag for tag in tags if tags.count(tag) > 1), None):
        raise BadRow("wrong-form", f"one <{twice}> in a <note>", f"{tags.count(twice)} in {where}")


def is_whole_bar(note: ET.Element) -> bool:
    """A rest that is drawn as one of a whole bar, whatever it lasts."""
    rest = note.find("rest")
    return rest is not None and (rest.get("measure") == "yes" or note.find("type") is None)


def tuplet_of(note: ET.Element) -> tuple[int, int]:
    """(actual, normal) notes."""
    return int(text_of(note, "time-modification/actual-notes", "1")), int(
        text_of(note, "time-modification/normal-notes", "1")
    )


def rest_text(note: ET.Element, lasts: Fraction, where: str) -> str:
    only(note, (*KNOWN, "forward"), where)
    if len(note.find("rest")) and note.find("rest/display-step") is None:  # type: ignore[arg-type]
        raise unsupported("rest with children", where)
    length = lasts if is_whole_bar(note) else written_length(note, where)
    sign = "x" if note.get("print-object") == "no" else "z"
    return f"{''.join(_notations(note, where))}{sign}{length_text(length)}"


def chord_text(notes: Sequence[ET.Element], altered: Alterations, where: str, *, alone_on_staff: bool) -> str:
    """One note, or several as [CEG]: signs before it, letters with their lengths, ties. Slurs are the caller's."""
    marks = "".join(mark for note in notes for mark in _notations(note, where))
    letters = [_letter(note, altered, where, alone_on_staff=alone_on_staff) for note in notes]
    return marks + (letters[0] if len(letters) == 1 else f"[{''.join(letters)}]")


def grace_text(
    groups: Sequence[Sequence[ET.Element]], altered: Alterations, where: str, *, alone_on_staff: bool
) -> str:
    if not groups:
        return ""
    first = groups[0][0].find("grace")
    slash = "/" if first is not None and first.get("slash") == "yes" else ""
    return f"{{{slash}{''.join(chord_text(notes, altered, where, alone_on_staff=alone_on_staff) for notes in groups)}}}"


def _letter(note: ET.Element, altered: Alterations, where: str, *, alone_on_staff: bool) -> str:
    only(note, KNOWN, where)
    if note.find("pitch") is None or note.get("print-object") == "no":
        raise unsupported("note without pitch, or one that is not printed", where)
    step, octave = text_of(note, "pitch/step"), int(text_of(note, "pitch/octave"))
    alter = number_of(note, "pitch/alter", "0")
    if alter not in SIGNS or step not in "ABCDEFG":
        raise unsupported(f"pitch/alter {alter}", where)
    if not 0 <= octave <= 9:
        raise BadRow("wrong-form", "an <octave> of 0 to 9", f"{octave} in {where}")
    shown = note.find("accidental")
    if shown is not None and (shown.text or "").strip() not in SHOWN:
        raise unsupported(f"accidental {shown.text}", where)
    if shown is not None and SHOWN[(shown.text or "").strip()] != alter:
        raise BadRow("wrong-form", f"the <alter> of a {shown.text}", f"{alter} in {where}")
    tied_in = any(tie.get("type") == "stop" for tie in (*note.findall("tie"), *note.findall("notations/tied")))
    sign = ""
    if shown is not None or (alter != altered.of(step, octave) and not tied_in):
        if shown is None and alone_on_staff:
            expected = f"an <accidental> at {step}{octave}, since the key or the bar has another alteration"
            raise BadRow("wrong-form", expected, f"none in {where}")
        sign = SIGNS[int(alter)]
        if note.find("grace") is None:  # its sign is its own: ABC does not say otherwise
            altered.bar[step, octave] = int(alter)
    name = step.lower() + "'" * (octave - 5) if octave >= 5 else step + "," * (4 - octave)
    tie = "-" if any(item.get("type") == "start" for item in note.findall("notations/tied")) else ""
    return f"{sign}{name}{length_text(written_length(note, where))}{tie}"


def _notations(note: ET.Element, where: str) -> list[str]:
    """Decorations. Ties are read with the letter (<tied>, which is drawn; <tie> is its sound), slurs and tuplets by
    score.py."""
    found: list[str] = []
    for item in (item for group in note.findall("notations") for item in group):
        for tag, table in (("articulations", ARTICULATIONS), ("ornaments", ORNAMENTS), ("technical", TECHNICAL)):
            if item.tag == tag:
                found += [_decoration(mark, table, where) for mark in item]
                break
        else:
            if item.tag == "fermata":
                found.append("!invertedfermata!" if item.get("type") == "inverted" else "!fermata!")
            elif item.tag == "arpeggiate" and item.get("direction") != "down":
                found += ["!arpeggio!"] * (note.find("chord") is None)
            elif item.tag == "tied" and item.get("type") not in ("start", "stop"):
                raise unsupported(f"tied {item.get('type')}", where)
            elif item.tag not in ("tied", "slur", "tuplet"):
                raise unsupported(f"notations/{item.tag}", where)
    return found


def _decoration(mark: ET.Element, table: dict[str, str], where: str) -> str:
    if mark.tag == "fingering" and (mark.text or "").strip() in ("0", "1", "2", "3", "4", "5"):
        return f"!{(mark.text or '').strip()}!"
    if mark.tag not in table:
        raise unsupported(f"notations/{mark.tag}", where)
    return table[mark.tag]


# ---------------------------------------------------------------- words


def syllables_of(note: ET.Element, where: str) -> dict[int, Syllable]:
    """By verse."""
    found: dict[int, Syllable] = {}
    for lyric in note.findall("lyric"):
        only(lyric, ("syllabic", "text", "extend", "end-line", "end-paragraph"), where)
        if len(lyric.findall("text")) > 1:
            raise unsupported("lyric with an elision", where)
        if not lyric.get("number", "1").isdigit():
            raise unsupported(f"lyric number {lyric.get('number')}", where)
        words = " ".join(text_of(lyric, "text", "").split())
        if any(char in words for char in "*_|\\%~"):
            raise unsupported(f"lyric {words!r}: signs that mean something in w:", where)
        plain = words.replace("-", "\\-").replace(" ", "~")
        more = "-" if text_of(lyric, "syllabic", "single") in ("begin", "middle") else ""
        extend = lyric.find("extend")
        held = extend is not None and extend.get("type") != "stop"
        found[int(lyric.get("number", "1"))] = Syllable(f"{plain}{more}" if plain else "", held)
    return found

"""MusicXML (score-partwise) as voices of bars of events that are already ABC; abc.py writes tunes of them.

Parts, staves and voices, chords, grace notes, tuplets, ties, slurs, lyrics, dynamics, ornaments, repeats with endings,
changes of key, meter and clef at a barline, chord symbols. Whatever else a score says is refused with the element's
name and its bar: nothing that is drawn may be missing from the text. Left out, because it is only looks or sound:
layout (`print`, `defaults`, `credit`, stems), `sound`, the header's texts, which are not drawn either.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from pipelines.prepare.formats.rows import BadRow
from pipelines.prepare.scores import marks
from pipelines.prepare.scores.notes import (
    Alterations,
    Event,
    check_once,
    chord_text,
    grace_text,
    is_whole_bar,
    length_text,
    rest_text,
    sounding_length,
    syllables_of,
    tuplet_of,
)

HEADER = ("work", "movement-number", "movement-title", "identification", "defaults", "credit", "part-list", "part")
BAR = (
    *("note", "backup", "forward", "direction", "attributes", "harmony", "barline", "print", "sound"),
    *("bookmark", "link", "grouping"),
)
SYMBOLS = {"bracket": ("[", "]"), "brace": ("{", "}"), "none": ("", "")}
MOST_VOICES = 64
"""Of a part: every voice has every bar, so more of them would take the square of the file."""
LARGEST_VALUE = 10**6
"""Of a number in a score: a bar longer than any music would be filled with rests."""


@dataclass
class Bar:
    """One bar of one voice."""

    length: Fraction
    """In quarters."""
    events: list[Event]
    key: str
    meter: str
    clef: str
    left: str = ""
    right: str = "|"
    ending: str = ""
    tempo: str = ""
    after: str = ""
    """Marks behind the last note."""


@dataclass
class Voice:
    part: int
    staff: int
    label: str
    short: str
    bars: list[Bar] = field(default_factory=list)


class Group(NamedTuple):
    """Parts that a bracket or brace joins, counted from 1."""

    signs: tuple[str, str]
    """How %%score opens and closes it; nothing where nothing is drawn."""
    first: int
    last: int
    through: bool
    """Barlines go through all of them."""


@dataclass
class Score:
    voices: list[Voice]
    spans: list[tuple[str, int, int]]
    """(slur or wedge, bar where it begins, bar where it ends)"""
    groups: list[Group]
    """The outermost first."""

    @property
    def num_bars(self) -> int:
        return len(self.voices[0].bars)


def read_score(root: ET.Element) -> Score:
    """
    Raises:
        BadRow: no score-partwise, an element that ABC cannot express, one that contradicts another, or too many voices.
    """
    if root.tag != "score-partwise":
        raise BadRow("wrong-form", "<score-partwise>", f"<{root.tag}>")
    marks.only(root, HEADER, "the score")
    labels = {part.get("id"): part for part in root.findall("part-list/score-part")}
    voices: list[Voice] = []
    spans: list[tuple[str, int, int]] = []
    counts = set()
    for number, part in enumerate(root.findall("part"), 1):
        if (label := labels.get(part.get("id"))) is None:
            raise BadRow("wrong-form", "a <score-part> for every <part>", f"none for {part.get('id')!r}")
        reader = _Part(number, _label(label, "part-name"), _label(label, "part-abbreviation"))
        reader.read(part)
        voices += [reader.voices[key] for key in sorted(reader.voices)]
        spans += reader.spans
        counts.add(len(part.findall("measure")))
    if len(counts) != 1 or not voices or counts == {0}:
        raise BadRow("wrong-form", "parts of one number of measures, with notes", f"{sorted(counts)} measures")
    for bars in zip(*(voice.bars for voice in voices), strict=True):
        _agree(bars)
    return Score(voices, spans, _groups(root.find("part-list")))


def _groups(listed: ET.Element | None) -> list[Group]:
    found, open_groups, part = [], {}, 0
    for item in listed if listed is not None else ():
        part += item.tag == "score-part"
        if item.tag == "part-group" and item.get("type") == "start":
            marks.only(item, ("group-symbol", "group-barline", "footnote", "level"), "the list of parts")
            symbol = marks.text_of(item, "group-symbol", "none")
            if symbol not in SYMBOLS:
                raise marks.unsupported(f"group-symbol {symbol}", "the list of parts")
            through = marks.text_of(item, "group-barline", "no") == "yes"
            open_groups[item.get("number", "1")] = (SYMBOLS[symbol], part + 1, through)
        elif item.tag == "part-group" and item.get("number", "1") in open_groups:
            signs, first, through = open_groups.pop(item.get("number", "1"))
            found.append(Group(signs, first, part, through))
    if open_groups:
        raise BadRow("wrong-form", "a stop of every <part-group>", f"none of {', '.join(open_groups)}")
    found.reverse()  # of two around the same parts the one that ends later is the outer one
    return sorted(found, key=lambda group: group.first - group.last)


def _agree(bars: tuple[Bar, ...]) -> None:
    """Barlines go through all parts; some programs write repeats and endings in the first part alone."""
    for name, usual in (("left", ""), ("right", "|"), ("ending", ""), ("tempo", "")):
        said = {getattr(bar, name) for bar in bars} - {usual}
        if len(said) > 1:
            raise BadRow("wrong-form", "the same barlines and tempo in all parts", " and ".join(sorted(said)))
        for bar in bars:
            setattr(bar, name, next(iter(said), usual))


def _label(part: ET.Element, tag: str) -> str:
    found = part.find(tag)
    if found is None or found.get("print-object") == "no" or part.find(f"{tag}-display") is not None:
        return ""
    return marks.quoted(found.text or "", f"the name of {part.get('id')}")


@dataclass
class _Tuplet:
    first: Event
    actual: int
    normal: int
    count: int = 0


class _Part:
    """Reads one part, bar by bar; what lasts beyond a bar (key, clef, open slurs) is kept here."""

    def __init__(self, number: int, label: str, short: str):
        self.number, self.label, self.short = number, label, short
        self.voices: dict[tuple[int, str], Voice] = {}
        self.spans: list[tuple[str, int, int]] = []
        self.divisions, self.key, self.meter = 1, "C", "none"
        self.signs: dict[str, int] = {}
        self.clefs: dict[int, str] = {}
        self.open: dict[tuple[str, str, str], tuple[int, str]] = {}
        """(slur or wedge, voice or staff, its number) -> bar and kind"""

    def read(self, part: ET.Element) -> None:
        voices_of = _voices_of(part)
        for staff, voice in sorted(voices_of):
            first = not any(staff == other for other, _ in self.voices)
            named = (self.label, self.short) if first and staff == 1 else ("", "")
            self.voices[staff, voice] = Voice(self.number, staff, *named)
        for index, measure in enumerate(part.findall("measure")):
            self._bar(measure, index)
        if self.open:
            (kind, _, _), (bar, _) = next(iter(self.open.items()))
            raise BadRow("wrong-form", f"an end of every {kind}", f"none of the one that begins in bar {bar + 1}")

    # ------------------------------------------------------------ a bar

    def _bar(self, measure: ET.Element, index: int) -> None:
        where = f"bar {measure.get('number') or index + 1} of part {self.number}"
        marks.only(measure, BAR, where)
        self.where, self.index, self.cursor, self.furthest = where, index, Fraction(0), Fraction(0)
        self.events: dict[tuple[int, str], list[Event]] = {key: [] for key in self.voices}
        self.tuplets: dict[tuple[int, str], _Tuplet] = {}
        self.altered = {key: Alterations(self.signs) for key in self.voices}
        self.pending: dict[int, str] = {}
        self.left, self.right, self.ending, self.tempo = "", "|", "", ""
        for kind, items in _grouped(measure):
            if kind == "notes":
                self._notes(items)
            else:
                self._other(items[0])
        if not self.furthest:
            raise BadRow("wrong-form", "notes or rests in every bar", f"none in {where}")
        if self.tuplets:
            raise BadRow("wrong-form", "tuplets that end in their bar", f"an open one in {where}")
        for key, voice in self.voices.items():
            bar = Bar(self.furthest, _filled(self.events[key], self.furthest, where), self.key, self.meter, "")
            bar.clef = self.clefs.get(voice.staff, "treble")
            bar.left, bar.right, bar.ending, bar.tempo = self.left, self.right, self.ending, self.tempo
            bar.after = self.pending.pop(voice.staff, "")
            voice.bars.append(bar)

    def _other(self, item: ET.Element) -> None:
        if item.tag in ("backup", "forward"):
            lasts = marks.number_of(item, "duration") / self.divisions
            self.cursor += lasts if item.tag == "forward" else -lasts
            if not 0 <= self.cursor <= LARGEST_VALUE:
                raise BadRow("wrong-form", "a place within the bar", f"{self.cursor} quarters in {self.where}")
            self.furthest = max(self.furthest, self.cursor)
        elif item.tag == "attributes":
            self._attributes(item)
        elif item.tag == "barline":
            sign, ending = marks.barline(item, self.where)
            if item.get("location", "right") == "left":
                self.left, self.ending = sign, ending
            else:
                self.right = sign
        elif item.tag == "harmony":
            self._pend(item, marks.chord_symbol(item, self.where))
        elif item.tag == "direction":
            for kind, text in marks.direction_marks(item, self.where):
                self._direction(item, kind, text)

    def _attributes(self, item: ET.Element) -> None:
        marks.only(item, ("divisions", "key", "time", "staves", "clef", "footnote", "level"), self.where)
        if self.cursor != 0 and (item.find("key") is not None or item.find("time") is not None or len(item) > 1):
            raise marks.unsupported("attributes in the middle of a bar", self.where)
        if self.cursor != 0 and item.find("clef") is not None:
            raise marks.unsupported("clef in the middle of a bar", self.where)
        for tag in ("key", "time"):
            if len(item.findall(tag)) > 1 or any(each.get("number") for each in item.findall(tag)):
                raise marks.unsupported(f"{tag} of one staff alone", self.where)
        self.divisions = int(marks.text_of(item, "divisions", str(self.divisions)))
        if not 0 < self.divisions <= LARGEST_VALUE:
            raise BadRow("wrong-form", f"<divisions> of 1 to {LARGEST_VALUE}", self.divisions)
        if (key := item.find("key")) is not None:
            self.key, self.signs = marks.key_of(key, self.where)
            self.altered = {voice: Alterations(self.signs) for voice in self.voices}
        if (time := item.find("time")) is not None:
            self.meter = marks.meter_of(time, self.where)
        for clef in item.findall("clef"):
            self.clefs[int(clef.get("number", "1"))] = marks.clef_of(clef, self.where)

    def _direction(self, item: ET.Element, kind: str, text: str) -> None:
        staff = marks.text_of(item, "staff", "1")
        if kind == "tempo":
            if self.cursor != 0:
                raise marks.unsupported("metronome in the middle of a bar", self.where)
            self.tempo = text
        elif kind == "mark":
            self._pend(item, text)
        elif text == "stop":
            begun, which = self._close("wedge", staff, "1")
            last = next((events[-1] for key, events in self.events.items() if key[0] == int(staff) and events), None)
            if last is None:
                raise marks.unsupported("wedge that ends before the first note of a bar", self.where)
            last.text = f"!{'<' if which == 'crescendo' else '>'})!{last.text}"
            self.spans.append(("wedge", begun, self.index))
        else:
            self.open["wedge", staff, "1"] = (self.index, text)
            self._pend(item, f"!{'<' if text == 'crescendo' else '>'}(!")

    def _pend(self, item: ET.Element, text: str) -> None:
        staff = int(marks.text_of(item, "staff", "1"))
        self.pending[staff] = self.pending.get(staff, "") + text

    def _close(self, kind: str, place: str, number: str) -> tuple[int, str]:
        if (kind, place, number) not in self.open:
            raise BadRow("wrong-form", f"a beginning of every {kind}", f"an end alone in {self.where}")
        return self.open.pop((kind, place, number))

    # ------------------------------------------------------------ notes

    def _notes(self, notes: list[ET.Element]) -> None:
        """Grace notes and the note, chord or rest that they lead to."""
        groups = _chords(notes)
        graces, main = groups[:-1], groups[-1]
        for each in notes:
            check_once(each, self.where)
        if main[0].find("chord") is not None:
            raise marks.unsupported("chord behind another element", self.where)
        staff, voice = int(marks.text_of(main[0], "staff", "1")), marks.text_of(main[0], "voice", "1")
        key = (staff, voice)
        alone = sum(other == staff for other, _ in self.voices) == 1
        if main[0].find("grace") is not None:  # behind the last note
            event = Event(
                self.cursor, Fraction(0), grace_text(groups, self.altered[key], self.where, alone_on_staff=alone)
            )
            self._slurs(notes, event, f"{staff}/{voice}")
            self.events[key].append(event)
            return
        lasts = sounding_length(main[0], self.divisions, self.where)
        marked = self.pending.pop(staff, "")
        grace = grace_text(graces, self.altered[key], self.where, alone_on_staff=alone)
        if main[0].find("rest") is not None:
            event = Event(self.cursor, lasts, f"{grace}{marked}{rest_text(main[0], lasts, self.where)}")
            event.whole_bar = is_whole_bar(main[0])
        else:
            text = chord_text(main, self.altered[key], self.where, alone_on_staff=alone)
            event = Event(self.cursor, lasts, f"{grace}{marked}{text}")
            event.syllables = syllables_of(main[0], self.where)
        event.joined = any(beam.text in ("begin", "continue") for beam in main[0].findall("beam"))
        self._slurs([note for group in groups for note in group], event, f"{staff}/{voice}")
        self._tuplet(key, main[0], event)
        self.events[key].append(event)
        self.cursor += lasts
        self.furthest = max(self.furthest, self.cursor)
        if self.furthest > LARGEST_VALUE:
            raise BadRow("wrong-form", "a bar of music", f"{self.furthest} quarters in {self.where}")

    def _slurs(self, notes: list[ET.Element], event: Event, voice: str) -> None:
        """Of one note ends come before beginnings, which may have the same number."""
        slurs = [sorted(note.findall("notations/slur"), key=lambda slur: slur.get("type") != "stop") for note in notes]
        for slur in (slur for of_note in slurs for slur in of_note):
            number = slur.get("number", "1")
            if slur.get("type") == "start":
                if ("slur", voice, number) in self.open:
                    raise BadRow("wrong-form", "an end of a slur before another of its number", f"none in {self.where}")
                self.open["slur", voice, number] = (self.index, "")
                event.text = f"({event.text}"
            elif slur.get("type") == "stop":
                begun, _ = self._close("slur", voice, number)
                event.text = f"{event.text})"
                self.spans.append(("slur", begun, self.index))

    def _tuplet(self, key: tuple[int, str], note: ET.Element, event: Event) -> None:
        """(p:q:r before the first note: p notes in the time of q, for r notes."""
        ratio, ends = tuplet_of(note), [item.get("type") for item in note.findall("notations/tuplet")]
        if len(ends) > 1 and ends != ["start", "stop"]:
            raise marks.unsupported("tuplet in a tuplet", self.where)
        if "start" in ends:
            self.tuplets[key] = _Tuplet(event, *ratio)
        tuplet = self.tuplets.get(key)
        if (tuplet is None) != (ratio == (1, 1)) or (tuplet is not None and (tuplet.actual, tuplet.normal) != ratio):
            raise BadRow("wrong-form", "notes of one <time-modification> between start and stop of a <tuplet>",
                         f"{ratio[0]} for {ratio[1]} in {self.where}")  # fmt: skip
        if tuplet is None:
            return
        tuplet.count += 1
        if "stop" in ends:
            tuplet.first.text = f"({tuplet.actual}:{tuplet.normal}:{tuplet.count}{tuplet.first.text}"
            del self.tuplets[key]


def _voices_of(part: ET.Element) -> set[tuple[int, str]]:
    """(staff, voice) of all notes. Raises BadRow: a voice on two staves, or too many."""
    found = {
        (int(marks.text_of(note, "staff", "1")), marks.text_of(note, "voice", "1"))
        for note in part.iterfind("measure/note")
    }
    where = f"part {part.get('id')}"
    if twice := next((name for name, times in Counter(name for _, name in found).items() if times > 1), None):
        raise marks.unsupported(f"voice {twice} on several staves", where)
    if len(found) > MOST_VOICES:
        raise BadRow("unsupported", f"at most {MOST_VOICES} voices in a part", f"{len(found)} in {where}")
    return found


def _grouped(measure: ET.Element) -> Iterator[tuple[str, list[ET.Element]]]:
    """Notes with the grace notes before them and the rest of their chord; everything else alone, in order."""
    notes: list[ET.Element] = []
    for item in measure:
        goes_on = bool(notes) and (item.find("chord") is not None or notes[-1].find("grace") is not None)
        if notes and not (item.tag == "note" and goes_on):
            yield "notes", notes
            notes = []
        if item.tag == "note":
            notes.append(item)
        else:
            yield "other", [item]
    if notes:
        yield "notes", notes


def _chords(notes: list[ET.Element]) -> list[list[ET.Element]]:
    found: list[list[ET.Element]] = []
    for note in notes:
        if note.find("chord") is not None and found:
            found[-1].append(note)
        else:
            found.append([note])
    return found


def _filled(events: list[Event], length: Fraction, where: str) -> list[Event]:
    """Invisible rests where a voice says nothing. Raises BadRow: two notes of a voice at once."""
    found, at = [], Fraction(0)
    if any(event.whole_bar for event in events) and len(events) > 1:
        raise BadRow("wrong-form", "<type> in a rest that does not fill its bar", f"none in {where}")
    for event in sorted(events, key=lambda item: item.start):
        if event.start < at:
            raise BadRow("wrong-form", "notes of a voice one after the other", f"two at once in {where}")
        if event.start > at:
            found.append(Event(at, event.start - at, f"x{length_text(event.start - at)}"))
        found.append(event)
        at = event.start + event.length
    return [*found, Event(at, length - at, f"x{length_text(length - at)}")] if at < length else found

"""Voices of bars as a tune in ABC 2.1, a line of music for every system of the picture.

One voice: X, T (empty: no title is drawn), M, L:1/8, Q, K with the clef, music. Several: %%score groups voices of a
staff by ( ), staves of a part by { }, parts as they are bracketed; V: names them, and the music of each follows its V:.
Bars of a later page begin with the key, meter and clef that hold there. Chords have the length inside: [C2E2].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pipelines.prepare.formats.rows import BadRow
from pipelines.prepare.scores.notes import Syllable
from pipelines.prepare.scores.score import Bar, Score, Voice


def abc_of(score: Score, systems: Sequence[int] | None = None, first: int = 0) -> str:
    """`systems`: bars in each line; None: all in one. `first`: the bar that they begin with.

    Raises:
        BadRow: a slur or wedge goes over the border of these bars: one half of it would mean something else.
    """
    counts = [score.num_bars - first] if systems is None else list(systems)
    stop = first + sum(counts)
    for kind, begin, end in score.spans:
        if (begin < first) != (end < first) or (begin < stop) != (end < stop):
            raise BadRow("unsupported", "slurs and wedges within a page", f"a {kind} from bar {begin + 1} to {end + 1}")
    start = score.voices[0].bars[first]
    head = ["X:1", "T:", f"M:{start.meter}", "L:1/8"]
    head += [f"Q:{start.tempo}"] if start.tempo else []
    if len(score.voices) == 1:
        clef = "" if start.clef == "treble" else f" clef={start.clef}"
        return "\n".join([*head, f"K:{start.key}{clef}", *_lines(score.voices[0], counts, first)])
    head.append(f"%%score {_braces(score)}")
    head += [_voice(number, voice, first) for number, voice in enumerate(score.voices, 1)]
    body: list[str] = []
    for number, voice in enumerate(score.voices, 1):
        body += [f"V:{number}", *_lines(voice, counts, first)]
    return "\n".join([*head, f"K:{start.key}", *body])


def _voice(number: int, voice: Voice, first: int) -> str:
    label = voice.label if first == 0 else voice.short
    named = f' name="{label}"' if label else ""
    short = f' snm="{voice.short}"' if voice.short and first == 0 else ""
    return f"V:{number} clef={voice.bars[first].clef}{named}{short}"


def _braces(score: Score) -> str:
    numbered = list(enumerate(score.voices, 1))
    found = []
    for part, of_part in groupby(numbered, key=lambda item: item[1].part):
        staves = []
        for _, of_staff in groupby(of_part, key=lambda item: item[1].staff):
            names = " ".join(str(number) for number, _ in of_staff)
            staves.append(f"({names})" if " " in names else names)
        named = f"{{{' '.join(staves)}}}" if len(staves) > 1 else staves[0]
        opens = "".join(group.signs[0] for group in score.groups if group.first == part)
        closes = "".join(group.signs[1] for group in reversed(score.groups) if group.last == part)
        through = any(group.through and group.first <= part < group.last for group in score.groups)
        found.append(f"{opens}{named}{closes}{' |' if through else ''}")
    return " ".join(found)


def _lines(voice: Voice, counts: Sequence[int], first: int) -> list[str]:
    found, at = [], first
    for count in counts:
        bars = voice.bars[at : at + count]
        before = voice.bars[at - 1] if at > first else None
        found += [_music(bars, before, begins=at == first), *_words(bars)]
        at += count
    return found


def _music(bars: Sequence[Bar], before: Bar | None, *, begins: bool) -> str:
    """`begins`: the first line, whose key, meter, clef and tempo the head has."""
    text = ""
    for place, bar in enumerate(bars):
        changes = _changes(bar, before, head=begins and place == 0)
        sign = bar.left
        if place and sign and bars[place - 1].right == "|":
            text = text.removesuffix("|").rstrip()  # one line is drawn, the sign's
        ending = f"[{bar.ending}" if bar.ending else ""
        text = " ".join(filter(None, (text, sign, ending, *changes, _events(bar), bar.after, bar.right)))
        before = bar
    return text


def _changes(bar: Bar, before: Bar | None, *, head: bool) -> list[str]:
    found = [f"[Q:{bar.tempo}]"] if bar.tempo and not head else []
    if before is None:
        return found
    clef = f" clef={bar.clef}" if bar.clef != before.clef else ""
    if bar.key != before.key or clef:
        found.append(f"[K:{bar.key}{clef}]")
    if bar.meter != before.meter:
        found.append(f"[M:{bar.meter}]")
    return found


def _events(bar: Bar) -> str:
    return "".join(f"{event.text}{'' if event.joined else ' '}" for event in bar.events).rstrip()


def _words(bars: Sequence[Bar]) -> list[str]:
    """A w: line for every verse: a syllable for every note, _ where one is held, * where there is none."""
    sung = [event.syllables for bar in bars for event in bar.events if event.syllables is not None]
    verses = sorted({verse for syllables in sung for verse in syllables})
    return [f"w: {_joined([syllables.get(verse) for syllables in sung])}".rstrip(" *") for verse in verses]


def _joined(syllables: Sequence[Syllable | None]) -> str:
    """A blank between words; none after the hyphen of a word that goes on, nor before the sign of a held note."""
    text, held = "", False
    for found in syllables:
        syllable = found.text if found and found.text else "_" if held or found else "*"
        held = found.held if found else held
        apart = bool(text) and syllable != "_" and not (text.endswith("-") and not text.endswith("\\-"))
        text += f" {syllable}" if apart else syllable
    return text

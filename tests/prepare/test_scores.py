"""MusicXML: exact ABC, which verovio reads as it reads the MusicXML; what ABC cannot say is refused by name."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.prepare.formats.rows import Bad, BadRow
from pipelines.prepare.scores.abc import abc_of
from pipelines.prepare.scores.score import read_score
from tests.prepare.music import FIRST, heard, note, score
from tests.prepare.through import read

HEAD = "X:1\nT:\nM:4/4\nL:1/8\nK:G\n"


def abc(text: str, systems: list[int] | None = None, first: int = 0) -> str:
    return abc_of(read_score(ET.fromstring(text)), systems, first)


def triplet(pitches: str, length: int = 4, kind: str = "eighth") -> str:
    ratio = "<time-modification><actual-notes>3</actual-notes><normal-notes>2</normal-notes></time-modification>"
    found = ""
    for at, pitch in enumerate(pitches.split()):
        beam = "begin" if at == 0 else "end" if at == 2 else "continue"
        end = {0: '<notations><tuplet type="start"/></notations>', 2: '<notations><tuplet type="stop"/></notations>'}
        found += (
            f"<note><pitch><step>{pitch[0]}</step><octave>{pitch[1]}</octave></pitch><duration>{length}</duration>"
            f'<voice>1</voice><type>{kind}</type>{ratio}<beam number="1">{beam}</beam>{end.get(at, "")}</note>'
        )
    return found


def notations(inner: str) -> str:
    return f"<notations>{inner}</notations>"


def direction(inner: str, more: str = "", placement: str = "above") -> str:
    return f'<direction placement="{placement}"><direction-type>{inner}</direction-type>{more}</direction>'


def lyric(text: str, syllabic: str = "single", verse: int = 1) -> str:
    return f'<lyric number="{verse}"><syllabic>{syllabic}</syllabic><text>{text}</text></lyric>'


CHORD = "<chord/>"
BEGIN, END = '<beam number="1">begin</beam>', '<beam number="1">end</beam>'
TRIPLETS = FIRST.replace("<divisions>4", "<divisions>12")  # triplets of eighths last 4 then
CASES = {
    "lengths and octaves": (
        [FIRST + note("C4", 6) + note("D5", 3) + note("E6", 1) + note("B2", 2) + note("r", 4), note("G4", 16)],
        "C3 d3/2 e'/2 B,, z2 | G8 |",
    ),
    "beams": (
        [FIRST + note("G4", 2, BEGIN) + note("A4", 2, END) + note("G4", 2) + note("A4", 2) + note("G4", 8)],
        "GA G A G4 |",
    ),
    "accidentals": (
        [
            FIRST
            + note("F5", 4, "<accidental>natural</accidental>")
            + note("F5", 4)
            + note("F5", 4, "<accidental>sharp</accidental>", alter=1)
            + note("F5", 4, alter=1),
            note("F5", 8, alter=1) + note("G5", 8, "<accidental>double-sharp</accidental>", alter=2),
        ],
        "=f2 f2 ^f2 f2 | f4 ^^g4 |",
    ),
    "chords": (
        [FIRST + note("G4", 8) + note("B4", 8, before=CHORD) + note("D5", 8, before=CHORD) + note("G4", 8)],
        "[G4B4d4] G4 |",
    ),
    "ties and slurs": (
        [
            FIRST + note("G4", 16, notations('<tied type="start"/>')),
            note("G4", 8, notations('<tied type="stop"/><slur type="start" number="1"/>'))
            + note("A4", 4)
            + note("B4", 4, notations('<slur type="stop" number="1"/>')),
        ],
        "G8- | (G4 A2 B2) |",
    ),
    "repeats": (
        [
            f'{FIRST}<barline location="left"><repeat direction="forward"/></barline>{note("G4", 16)}'
            '<barline location="right"><repeat direction="backward"/></barline>',
            f'<barline location="left"><repeat direction="forward"/></barline>{note("A4", 16)}',
            f'{note("B4", 16)}<barline><repeat direction="backward"/></barline>',
            f"{note('G4', 16)}<barline><bar-style>light-light</bar-style></barline>",
            f"{note('G4', 16)}<barline><bar-style>light-heavy</bar-style></barline>",
        ],
        "|: G8 :| |: A8 | B8 :| G8 || G8 |]",
    ),
    "marks": (
        [
            FIRST
            + direction("<dynamics><mf/></dynamics>")
            + note("G4", 4, notations("<articulations><staccato/></articulations>"))
            + note("A4", 4, notations("<ornaments><trill-mark/></ornaments>"))
            + note("B4", 8, notations("<fermata/>"))
        ],
        "!mf!.G2 !trill!A2 !fermata!B4 |",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_score_becomes_exactly_this_abc_and_verovio_reads_the_same_notes_out_of_both(name: str):
    bars, want = CASES[name]
    text = abc(score(bars))
    assert text == HEAD + want
    assert same_music(heard(text, "abc"), heard(score(bars), "xml"))


def same_music(one: list, other: list) -> bool:
    """Bars, and what stands at the borders between them: verovio puts a repeat's sign on either side."""
    borders = [
        [
            {left, right} - {"", "single"}
            for (_, _, right), (_, left, _) in pairwise([([], "", ""), *bars, ([], "", "")])
        ]
        for bars in (one, other)
    ]
    return [bar for bar, *_ in one] == [bar for bar, *_ in other] and borders[0] == borders[1]


def test_triplets_and_words_read_the_same():
    bars = [
        TRIPLETS
        + triplet("G4 A4 B4")
        + note("C5", 4, lyric("hel", "begin")).replace("<duration>4", "<duration>12")
        + note("D5", 4, lyric("lo", "end")).replace("<duration>4", "<duration>12")
        + note("D5", 4, lyric("you")).replace("<duration>4", "<duration>12")
    ]
    text = abc(score(bars))
    assert text == f"{HEAD}(3:2:3GAB c2 d2 d2 |\nw: * * * hel-lo you"
    ours, theirs = heard(text, "abc")[0][0], heard(score(bars), "xml")[0][0]
    without = [[replace(sound, words=()) for sound in sounds] for sounds in (ours, theirs)]
    assert without[0] == without[1]
    assert [sound.tuplet for sound in ours] == ["3:2"] * 3 + [""] * 3
    assert [word for sound in theirs for word in sound.words] == ["hel", "lo", "you"]


def test_a_wrong_note_in_the_abc_would_be_noticed():
    bars, _ = CASES["accidentals"]
    text = abc(score(bars))
    for right, wrong in (("=f2", "f2"), ("f4", "f3"), ("f4", "g4"), ("| f4", "f4"), (" |", " :|")):
        assert not same_music(heard(text.replace(right, wrong, 1), "abc"), heard(score(bars), "xml")), right


def test_what_verovio_does_not_read_in_abc_is_written_as_the_standard_says():
    """Several voices, changes of key, endings, grace notes, chord symbols, tempo, held syllables."""
    upper = [
        FIRST
        + direction("<metronome><beat-unit>quarter</beat-unit><per-minute>96</per-minute></metronome>")
        + direction("<words>dolce</words>")
        + "<harmony><root><root-step>B</root-step><root-alter>-1</root-alter></root>"
        + "<kind>minor-seventh</kind></harmony>"
        + note("A4", 2, before='<grace slash="yes"/>')
        + note("G4", 4, lyric("Ah").replace("</lyric>", '<extend type="start"/></lyric>'))
        + note("A4", 4)
        + note("G4", 4, '<lyric number="1"><extend type="stop"/></lyric>')
        + note("A4", 4),
        '<attributes><key><fifths>-3</fifths><mode>minor</mode></key><time symbol="cut"><beats>2</beats>'
        "<beat-type>2</beat-type></time><clef><sign>C</sign><line>3</line></clef></attributes>"
        '<barline location="left"><ending number="1" type="start"/></barline>'
        + direction('<wedge type="crescendo"/>')
        + note("E4", 8, alter=-1)
        + note("D4", 8)
        + direction('<wedge type="stop"/>')
        + '<barline location="right"><ending number="1" type="stop"/><repeat direction="backward"/></barline>',
        '<barline location="left"><ending number="2" type="start"/></barline>' + note("C4", 16),
    ]
    lower = [
        FIRST.replace("<sign>G</sign><line>2</line>", "<sign>F</sign><line>4</line>")
        + note("G3", 8)
        + "<backup><duration>8</duration></backup><forward><duration>4</duration></forward>"
        + note("D3", 4, voice=2)
        + note("r", 8, voice=2),
        '<attributes><key><fifths>-3</fifths><mode>minor</mode></key><time symbol="cut"><beats>2</beats>'
        "<beat-type>2</beat-type></time></attributes>" + note("C3", 16),
        note("C3", 16),
    ]
    assert abc(score(upper, lower, names=("Violin", "Cello")), [2, 1]) == (
        "X:1\nT:\nM:4/4\nL:1/8\nQ:1/4=96\n%%score 1 (2 3)\n"
        'V:1 clef=treble name="Violin"\nV:2 clef=bass name="Cello"\nV:3 clef=bass\nK:G\n'
        'V:1\n{/A}"^dolce""Bbm7"G2 A2 G2 A2 | [1 [K:Cm clef=alto] [M:C|] !<(!E4 !<)!D4 :|\nw: Ah__\n'
        "[2 C8 |\n"
        "V:2\nG,4 x4 | [1 [K:Cm] [M:C|] C,8 :|\n[2 C,8 |\n"
        "V:3\nx2 D,2 z4 | [1 [K:Cm] [M:C|] x8 :|\n[2 x8 |"
    )


def test_grace_notes_stand_where_they_are_and_a_slur_may_end_where_the_next_begins():
    grace, slashed = "<grace/>", '<grace slash="yes"/>'
    ends = '<slur type="start" number="1"/><slur type="stop" number="1"/>'
    bars = [
        FIRST
        + note("D5", 1, "<accidental>flat</accidental>", before=grace, alter=-1)
        + note("E5", 1, before=grace)
        + note("C5", 4, notations('<slur type="start" number="1"/>'))
        + note("D5", 4, notations(ends))
        + note("E5", 4, notations('<slur type="stop" number="1"/>'))
        + note("F5", 2, before=slashed, alter=1)
        + note("C5", 4, "<accidental>natural</accidental>")
        + note("A4", 1, before=grace)
    ]
    assert abc(score(bars)) == f"{HEAD}({{_d/2e/2}}c2 (d2) e2) {{/f}}=c2 {{A/2}} |"


def test_the_staves_of_a_piano_are_voices_in_a_brace():
    head = (
        FIRST.replace("<clef>", "<staves>2</staves><clef>", 1)
        .replace("</attributes>", '<clef number="2"><sign>F</sign><line>4</line></clef></attributes>')
        .replace("<clef><sign>G", '<clef number="1"><sign>G')
    )
    right = note("G4", 8, "<staff>1</staff>") + note("A4", 8, "<staff>1</staff>")
    left = note("G2", 16, "<staff>2</staff>", voice=5)
    below = direction("<words>ped</words>", "<staff>2</staff>", "below")
    text = abc(score([head + right + "<backup><duration>16</duration></backup>" + below + left], names=("Piano",)))
    assert text == (
        'X:1\nT:\nM:4/4\nL:1/8\n%%score {1 2}\nV:1 clef=treble name="Piano"\nV:2 clef=bass\nK:G\n'
        'V:1\nG4 A4 |\nV:2\n"_ped"G,,8 |'
    )
    with pytest.raises(BadRow, match="voice 1 on several staves"):
        abc(score([head + right + note("B4", 4, "<staff>2</staff>")]))


def test_brackets_and_braces_of_parts_are_told():
    group = (
        '<part-group number="{0}" type="start"><group-symbol>{1}</group-symbol>'
        "<group-barline>{2}</group-barline></part-group>"
    )
    text = score(*[[FIRST + note("G4", 16)]] * 4, names=("A", "B", "C", "D"))
    before = text.index('<score-part id="P1"')
    after = text.index('<score-part id="P4"')
    text = (
        f"{text[:before]}{group.format(1, 'bracket', 'yes')}{group.format(2, 'brace', 'no')}{text[before:after]}"
        f'<part-group number="2" type="stop"/><part-group number="1" type="stop"/>{text[after:]}'
    )
    assert "%%score [{1 | 2 | 3}] 4" in abc(text)
    for wrong, told_so in (
        ("line", "group-symbol line"),
        ("bracket</group-symbol><group-name>x</group-name><group-symbol>", "group-name"),
    ):
        with pytest.raises(BadRow, match=told_so):
            abc(text.replace("brace", wrong, 1))
    with pytest.raises(BadRow, match="a stop of every"):
        abc(text.replace('<part-group number="1" type="stop"/>', ""))


def test_a_later_page_begins_with_what_holds_there():
    change = (
        "<attributes><key><fifths>2</fifths></key><time><beats>3</beats><beat-type>4</beat-type></time></attributes>"
    )
    bars = [FIRST + note("G4", 16), change + note("A4", 12), note("B4", 12), note("D5", 12)]
    assert abc(score(bars), [1, 1], 2) == "X:1\nT:\nM:3/4\nL:1/8\nK:D\nB6 |\nd6 |"
    assert abc(score(bars), [2], 0) == f"{HEAD}G8 | [K:D] [M:3/4] A6 |"


def test_a_slur_over_the_border_of_pages_is_refused_on_both():
    bars = [FIRST + note("G4", 16, notations('<slur type="start"/>')), note("A4", 16, notations('<slur type="stop"/>'))]
    assert abc(score(bars)) == f"{HEAD}(G8 | A8) |"
    for first in (0, 1):
        with pytest.raises(BadRow, match="slur from bar 1 to 2"):
            abc(score(bars), [1], first)


FAULTS = {
    "unsupported: .*<pitch/alter 1/2>": FIRST + note("G4", 16).replace("<octave>", "<alter>0.5</alter><octave>"),
    "unsupported: .*<note/notehead>": FIRST + note("G4", 16, "<notehead>x</notehead>"),
    "unsupported: .*<note/cue>": FIRST + note("G4", 16, before="<cue/>"),
    "unsupported: .*<note/unpitched>": FIRST
    + "<note><unpitched/><duration>16</duration><voice>1</voice><type>whole</type></note>",
    "unsupported: .*one that is not printed": FIRST + note("G4", 16).replace("<note>", '<note print-object="no">'),
    "unsupported: .*<notations/glissando>": FIRST + note("G4", 16, notations('<glissando type="start"/>')),
    "unsupported: .*<notations/shake>": FIRST + note("G4", 16, notations("<ornaments><shake/></ornaments>")),
    "unsupported: .*<direction-type/pedal>": FIRST + direction('<pedal type="start"/>') + note("G4", 16),
    "unsupported: .*<dynamics/fz>": FIRST + direction("<dynamics><fz/></dynamics>") + note("G4", 16),
    "unsupported: .*<direction/offset>": FIRST
    + direction("<words>a</words>", "<offset>2</offset>") + note("G4", 16),
    "unsupported: .*<attributes/transpose>": FIRST.replace("<clef>", "<transpose/><clef>")
    + note("G4", 16),
    "unsupported: .*<clef percussion0>": FIRST.replace("<sign>G</sign><line>2</line>", "<sign>percussion</sign>")
    + note("G4", 16),
    "unsupported: .*<clef in the middle": FIRST
    + note("G4", 8) + "<attributes><clef><sign>F</sign></clef></attributes>" + note("G4", 8),
    "unsupported: .*<measure/figured-bass>": FIRST + "<figured-bass><figure/></figured-bass>" + note("G4", 16),
    "unsupported: .*<repeat backward, times 3>": FIRST
    + note("G4", 16) + '<barline><repeat direction="backward" times="3"/></barline>',
    "unsupported: .*<bar-style dashed>": FIRST
    + note("G4", 16) + "<barline><bar-style>dashed</bar-style></barline>",
    "unsupported: .*<lyric 'a\\|b'": FIRST + note("G4", 16, lyric("a|b")),
    "unsupported: .*<harmony of the kind Neapolitan>": FIRST
    + "<harmony><root><root-step>C</root-step></root><kind>Neapolitan</kind></harmony>" + note("G4", 16),
    "unsupported: .*<chord behind another": FIRST
    + note("G4", 16) + direction("<words>a</words>") + note("B4", 16, before="<chord/>"),
    "unsupported: .*<time drawn as single-number>": FIRST.replace("<time>", '<time symbol="single-number">')
    + note("G4", 16),
    "wrong-form: .*an end of a slur before another": FIRST
    + note("G4", 8, notations('<slur type="start"/>')) + note("G4", 8, notations('<slur type="start"/>')),
    "wrong-form: .*as <type> says, got 2 in bar 1": FIRST
    + note("G4", 16).replace("<duration>16", "<duration>8"),
    "wrong-form: .*an <accidental> at F5": FIRST + note("F5", 16),
    "wrong-form: .*the <alter> of a flat, got 0": FIRST + note("G4", 16, "<accidental>flat</accidental>"),
    "wrong-form: .*notes or rests in every bar": FIRST,
    "wrong-form: .*<type> in a rest that does": FIRST
    + note("G4", 8) + note("r", 8).replace("<type>half</type>", ""),
    "wrong-form: .*one <octave> in a <note>, got 2": FIRST
    + note("G4", 16).replace("<octave>", "<octave>5</octave><octave>"),
    "wrong-form: .*<duration> above 0": FIRST + note("G4", 16).replace("<duration>16", "<duration>0"),
    "wrong-form: .*a place within the bar": FIRST + "<backup><duration>4</duration></backup>" + note("G4", 16),
    "wrong-form: .*a beginning of every slur": FIRST + note("G4", 16, notations('<slur type="stop"/>')),
    "wrong-form: .*an end of every slur": FIRST + note("G4", 16, notations('<slur type="start"/>')),
    "wrong-form: .*tuplets that end": TRIPLETS + triplet("G4 A4 B4").replace('<tuplet type="stop"/>', ""),
    "wrong-form: .*of one <time-modification>": TRIPLETS + triplet("G4 A4 B4").replace('<tuplet type="start"/>', ""),
    "wrong-form: .*notes of a voice one after the other": FIRST
    + note("G4", 16) + "<backup><duration>8</duration></backup>" + note("A4", 8),
    "wrong-form: .*a number in <duration> of <note>": FIRST
    + note("G4", 16).replace("<duration>16", "<duration>1e999999999"),
    "wrong-form: .*a meter as 3/4": FIRST.replace("<beats>4", "<beats>four") + note("G4", 16),
    "wrong-form: .*a meter as .*4/0": FIRST.replace("<beat-type>4", "<beat-type>0") + note("G4", 16),
    "wrong-form: .*an <octave> of 0 to 9": FIRST + note("G4", 16).replace("<octave>4", "<octave>300000000"),
    "unsupported: .*<root-step 'H'>": FIRST
    + "<harmony><root><root-step>H</root-step></root><kind>major</kind></harmony>" + note("G4", 16),
    "wrong-form: .*<divisions> of 1": FIRST.replace("<divisions>4", "<divisions>0") + note("G4", 16),
}  # fmt: skip


@pytest.mark.parametrize("told_so", FAULTS)
def test_what_abc_cannot_say_is_a_bad_row_that_names_it(told_so: str, tmp_path: Path):
    path = tmp_path / "a.musicxml"
    path.write_text(score([FAULTS[told_so]]))
    with pytest.raises(BadRow, match=told_so):
        abc(path.read_text())
    [row] = read("musicxml", path)
    assert isinstance(row, Bad) and row.reason == told_so.partition(":")[0]


def test_the_faults_are_why_these_scores_are_refused():
    assert abc(score([FIRST + note("G4", 16)])) == f"{HEAD}G8 |"

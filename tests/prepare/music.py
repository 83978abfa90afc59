"""MusicXML for the tests, and what verovio reads out of a score, whatever notation it is written in."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

import verovio

TYPES = {8: "half", 4: "quarter", 6: "quarter", 2: "eighth", 3: "eighth", 1: "16th", 16: "whole", 12: "half"}
MEI = "{http://www.music-encoding.org/ns/mei}"
XML_ID = "{http://www.w3.org/XML/1998/namespace}id"
FIRST = (
    "<attributes><divisions>4</divisions><key><fifths>1</fifths></key><time><beats>4</beats>"
    "<beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes>"
)


def note(pitch: str, length: int = 4, more: str = "", *, voice: int = 1, alter: int = 0, before: str = "") -> str:
    """`pitch`: letter and octave, or r; `length` in sixteenths; `more`: elements behind <type> and <dot>."""
    at = "<rest/>" if pitch == "r" else f"<pitch><step>{pitch[0]}</step>"
    if pitch != "r":
        at += (f"<alter>{alter}</alter>" if alter else "") + f"<octave>{pitch[1]}</octave></pitch>"
    dot = "<dot/>" if length in (3, 6, 12) else ""
    lasts = "" if "<grace" in before else f"<duration>{length}</duration>"
    return f"<note>{before}{at}{lasts}<voice>{voice}</voice><type>{TYPES[length]}</type>{dot}{more}</note>"


def score(*parts: list[str], names: tuple[str, ...] = ()) -> str:
    """Each part a list of what stands in its measures."""
    listed = "".join(
        f'<score-part id="P{number}"><part-name>{name}</part-name></score-part>'
        for number, name in enumerate(names or ("",) * len(parts), 1)
    )
    written = "".join(
        f'<part id="P{number}">'
        + "".join(f'<measure number="{at}">{bar}</measure>' for at, bar in enumerate(bars, 1))
        + "</part>"
        for number, bars in enumerate(parts, 1)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 4.0 Partwise//EN" '
        '"http://www.musicxml.org/dtds/partwise.dtd">\n'
        f'<score-partwise version="4.0"><part-list>{listed}</part-list>{written}</score-partwise>'
    )


@dataclass(frozen=True)
class Sound:
    """A note or rest as verovio understood it."""

    what: str
    """note or rest"""
    pitch: str
    length: tuple[str, str]
    """Value and dots."""
    sign: str
    tuplet: str
    tied: bool
    words: tuple[str, ...]


def heard(text: str, notation: str) -> list[tuple[list[Sound], str, str]]:
    """Every bar of the first voice: its notes, its left and its right barline. `notation`: xml or abc."""
    verovio.enableLog(verovio.LOG_OFF)
    toolkit = verovio.toolkit()
    toolkit.setOptions({"inputFrom": notation})
    assert toolkit.loadData(text)
    root = ET.fromstring(toolkit.getMEI())
    tied = {tie.get("startid", "").removeprefix("#") for tie in root.iter(f"{MEI}tie")}
    found = []
    for bar in root.iter(f"{MEI}measure"):
        sounds: list[Sound] = []
        layer = next(bar.iter(f"{MEI}layer"))
        _hear(layer, (("", ""), ""), tied, sounds)
        found.append((sounds, bar.get("left") or "", bar.get("right") or "single"))
    return found


def _hear(element: ET.Element, above: tuple[tuple[str, str], str], tied: set[str], sounds: list[Sound]) -> None:
    length, tuplet = above
    for child in element:
        name = child.tag.removeprefix(MEI)
        own = (child.get("dur", ""), child.get("dots", ""))
        own = own if own[0] else length
        if name in ("note", "rest"):
            accid = child.find(f"{MEI}accid")
            sign = child.get("accid") or (accid.get("accid") if accid is not None else None) or ""
            pitch = f"{child.get('pname')}{child.get('oct')}" if name == "note" else ""
            words = tuple((syl.text or "").strip() for syl in child.iter(f"{MEI}syl"))
            sounds.append(Sound(name, pitch, own, sign, tuplet, child.get(XML_ID) in tied, words))
        elif name == "mRest":
            sounds.append(Sound("rest", "", ("bar", ""), "", "", False, ()))
        else:
            ratio = f"{child.get('num')}:{child.get('numbase')}" if name == "tuplet" else tuplet
            _hear(child, (own, ratio), tied, sounds)

"""The final answer of a text that reasons first, and the steps before it. Pure; any text in, nothing raised.

What counts as marked, the strongest mark first, its last place in the text: \\boxed{...}, <answer>...</answer>, "(the)
(final) answer is ..." or "answer: ..." up to the end of its paragraph. A text without a mark is its own final answer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SAID = re.compile(
    r"\*{0,2}\b(?:(?:so |hence |thus |therefore,? )?the (?:final |correct )?answer is|(?:final )?answer)\b"
    r"\*{0,2}\s{0,2}[::=]?\*{0,2}\s{0,2}|(?:最终)?答案(?:是|为)?\s{0,2}[::]?\s{0,2}",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\f?boxed\s{0,2}\{")
TRIED = 8
"""Marks that are looked at, from the last on: text that is nothing but marks costs no more than another."""
_STEP = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(\[*]|\d+[.)]\s)|(?<=[。!?;])|\n+")
_BARE = re.compile(r"^(?:\d+[.)]|[-*#>•]+|step \d+[.:)]*|\**)\s*", re.IGNORECASE)
MIN_STEP = 12
"""Characters from which on a sentence is a step; shorter ones are headings and interjections."""


class Answered(NamedTuple):
    reasoning: str
    """What stands before the final answer; empty where nothing marks one."""
    final: str


def answered(text: str) -> Answered:
    return _boxed(text) or _tagged(text) or _said(text) or Answered("", text)


def final_answer(text: str) -> str:
    return answered(text).final


def steps_of(text: str) -> list[str]:
    """Sentences and lines of the reasoning before a marked final answer."""
    pieces = (_BARE.sub("", piece).strip() for piece in _STEP.split(answered(text).reasoning))
    return [piece for piece in pieces if len(piece) >= MIN_STEP or (piece and not piece.isascii())]


def _boxed(text: str) -> Answered | None:
    """The last \\boxed or \\fbox whose braces close."""
    for match in list(_BOXED.finditer(text))[: -TRIED - 1 : -1]:
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0) * (text[at - 1] != "\\")
            at += 1
        if not depth and (inside := text[match.end() : at - 1].strip()):
            return Answered(text[: match.start()].strip(" $\n"), inside)
    return None


def _tagged(text: str) -> Answered | None:
    start = text.lower().rfind("<answer>")
    inside = re.split("</answer>", text[start + len("<answer>") :], maxsplit=1, flags=re.IGNORECASE)[0].strip()
    return Answered(text[:start].strip(), inside) if start >= 0 and inside else None


def _said(text: str) -> Answered | None:
    """`the answer is`, or `answer` with a colon; the last that something follows."""
    for match in list(_SAID.finditer(text))[: -TRIED - 1 : -1]:
        final = text[match.end() :].partition("\n\n")[0].strip()
        if final and re.search(r"\bis\b|[::=]|答案", match.group(), re.IGNORECASE):
            return Answered(text[: match.start()].strip(), final)
    return None

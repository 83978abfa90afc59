"""Which reasoning is good enough to learn from: the same for what a judge and what people write. Thresholds:
trainer/reasoning.py.

| reason | what is wrong |
| --- | --- |
| too-short, too-long | fewer or more words than the recipe says |
| markup | a call, a special token or a code fence in the words: the model would learn to write it twice |
| coordinates | numbers of a place: they would stay those of the picture that the writer saw |
| hindsight | it tells what only the writer saw: the mark, the screenshot after the action |
| copied-query, copied-step | most of its trigrams of words stand in the query, or in an earlier step's reasoning |
| inconsistent | it speaks of another action than the step's (consistent.py) |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipelines.prepare.curate.content import shingle_words, words_of
from pipelines.prepare.reasoning.consistent import contradiction
from pipelines.prepare.reasoning.steps import Step
from trainer.reasoning import Filters

REASONS = ("too-short", "too-long", "markup", "coordinates", "hindsight", "copied-query", "copied-step", "inconsistent")
MARKUP = re.compile(r"</?tool_call|</?tools>|<\|[^|]*\|>|```|\{\s*\"(?:name|action|arguments)\"", re.I)
COORDINATES = re.compile(
    r"[(\[]\s*\d{1,5}(?:\.\d+)?\s*,\s*\d{1,5}(?:\.\d+)?\s*[)\]]|\b[xy]\s*=\s*\d+|\d+\s*(?:px|pixels)\b", re.I
)
HINDSIGHT = re.compile(
    r"\bmagenta\b|\bcross-?hairs?\b|\b(?:circled|encircled)\b|"
    r"\bmarked (?:place|spot|position|location|point|area|element)\b|"
    r"\b(?:the|a) (?:mark|marker|annotation) (?:on|in|at|shows|is|points)\b|"
    r"\b(?:first|second|two|both|next|previous|before|after|following) (?:screen ?shots?|pictures?|images?)\b|"
    r"\bscreenshots? (?:before|after)\b|\bas (?:seen|shown) after\b|\bafter (?:the|this) (?:action|click|tap)\b",
    re.I,
)
GRAM = 3


def problem(text: str, step: Step, earlier: Iterable[str], filters: Filters) -> tuple[str, str] | None:
    """(reason, what was found) of the first filter that refuses the text; None where all let it pass.

    earlier: the reasoning of the steps before, as it stands."""
    words = words_of(text)
    if len(words) < filters.min_words:
        return "too-short", f"{len(words)} words"
    if len(words) > filters.max_words:
        return "too-long", f"{len(words)} words"
    for reason, pattern in (("markup", MARKUP), ("coordinates", COORDINATES), ("hindsight", HINDSIGHT)):
        if (found := pattern.search(text)) is not None:
            return reason, repr(found[0])
    if (share := copied(text, step.query)) > filters.max_of_query:
        return "copied-query", f"{share:.0%} of its trigrams"
    if (share := max((copied(text, other) for other in earlier), default=0.0)) > filters.max_of_step:
        return "copied-step", f"{share:.0%} of its trigrams"
    if filters.consistent and (told := contradiction(text, step.actions)) is not None:
        return "inconsistent", told
    return None


def copied(text: str, other: str) -> float:
    """Share 0..1 of the text's trigrams of words that the other has as well; letter case and signs do not count."""
    own, there = shingle_words(text), shingle_words(other)
    size = min(GRAM, len(own))
    if not size:
        return 0.0
    grams = [tuple(own[at : at + size]) for at in range(len(own) - size + 1)]
    known = {tuple(there[at : at + size]) for at in range(len(there) - size + 1)}
    return sum(gram in known for gram in grams) / len(grams)


def tidy(text: str) -> str:
    """One paragraph."""
    return " ".join(text.split())

"""Domain and sub-domain of a conversation by words: a baseline without a model. It reads what is asked, sees whether
there is a picture, a video, code, boxes or actions, and knows no meaning. Pure.

A sub-domain has as many points as the phrases of its list (trainer/domains.yaml) that the questions say have words.
What is in the sample adds some; a sub-domain of pictures or videos needs one. The most points win, the file's order
decides between equals.
"""

from __future__ import annotations

from functools import lru_cache

import regex

from pipelines.prepare.curate.conversations import answers_of, media_kinds, questions_of, turns_of
from trainer.data.sample import Sample
from trainer.domains import SubDomain, sub_domains

VERSION = 1
CODE = regex.compile(r"```|^\s*(?:def |class |import |#include|function |public |SELECT )", regex.MULTILINE)
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")


def classify(sample: Sample) -> tuple[str, str]:
    """(domain, sub-domain)"""
    points = points_of(sample)
    best = max(sub_domains(), key=lambda one: points.get(one.name, 0.0))  # the first of equals
    if points.get(best.name, 0.0) > 0:
        return best.domain, best.name
    return _fallback(sample)


def points_of(sample: Sample) -> dict[str, float]:
    """{sub-domain: points}, of those that may be."""
    asked = "\n".join(questions_of(sample)).lower()
    kinds, evidence = media_kinds(sample), _evidence(sample)
    found = {}
    for one in sub_domains():
        if one.needs and one.needs not in kinds and not (one.needs == "image" and kinds):
            continue
        said = {" ".join(phrase.split()) for phrase in _pattern(one).findall(asked)}
        points = float(sum(_weight(phrase) for phrase in said))
        found[one.name] = points + evidence.get(one.name, 0.0)
    return found


def _weight(phrase: str) -> int:
    return 2 if UNSPACED.search(phrase) else len(phrase.split())


def _evidence(sample: Sample) -> dict[str, float]:
    """Points for what a sample holds, whatever it says."""
    parts = {part.part for message in turns_of(sample) for part in message.parts}
    answered = {part.part for message in turns_of(sample) if message.role == "assistant" for part in message.parts}
    found: dict[str, float] = {}
    if "action" in parts or "tools" in parts:
        found["Interface_Operation"] = 9.0
    if "objects" in answered:
        found["Grounding_and_Space"] = 3.0
    if "video" in media_kinds(sample):
        found["Video_Understanding"] = 1.5
    asked, told = (bool(CODE.search("\n".join(texts))) for texts in (questions_of(sample), answers_of(sample)))
    if asked:  # code that is there is repaired, turned into other code, or explained
        found |= {"Code_Understanding": 1.2, "Code_Debugging": 1.1, "Code_Translation": 1.1}
    elif told:
        found["Code_Generation"] = 1.5
    return found


def _fallback(sample: Sample) -> tuple[str, str]:
    asked = " ".join(questions_of(sample))
    kinds = media_kinds(sample)
    if "video" in kinds:
        return "Vision", "Video_Understanding"
    if "image" in kinds:
        return "Vision", "Object_Recognition" if "?" in asked or "？" in asked else "Image_Description"
    return "Conversation", "Advice_and_Opinion" if len(asked.split()) > 8 else "Small_Talk"


@lru_cache(maxsize=64)
def _pattern(one: SubDomain) -> regex.Pattern:
    """Any of its phrases as whole words; in scripts without spaces wherever it stands."""
    words = sorted(one.words, key=len, reverse=True)
    spaced = "|".join(r"\s+".join(map(regex.escape, word.split())) for word in words if not UNSPACED.search(word))
    unspaced = [regex.escape(word) for word in words if UNSPACED.search(word)]
    return regex.compile("|".join([rf"(?<![\p{{L}}\p{{N}}])(?:{spaced})(?![\p{{L}}\p{{N}}])", *unspaced]))

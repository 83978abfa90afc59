"""What rules see in an answer: repetition, an end that is missing, faults of form, listed words. Pure: text in, numbers
out; thresholds are not their business.

Faults are counted where a reader of the file would see them; what is a matter of taste (long, short, plain) is none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import regex

from pipelines.prepare.curate.content import words_of
from pipelines.prepare.curate.signals import blocked_words, duplicate_ngram

VERSION = 2
FULL_SENTENCE = 12
"""Words from which on an answer in prose ends with a mark of punctuation; shorter ones are names, numbers, labels."""
LAST_SENTENCE = 5
"""Words of a last line that is a sentence and no name, heading or code."""
LOOP_TIMES = 3
LOOP_WORDS = 8
OPEN_ENDS = frozenset(
    (
        "and", "or", "but", "the", "a", "an", "of", "to", "in", "with", "because", "that", "which", "is", "are", "was",
        "for", "by", "from", "as", "if", "when", "such", "including",
    )
)  # fmt: skip
TERMINAL = regex.compile(r"""[.!?…。！？；;:：)）\]}>»”’"'`*_~|$%°\p{Emoji_Presentation}]\s*$""")
ENDED = regex.compile(r"https?://\S+$|\d$")
LIST_LINE = regex.compile(r"^\s*(?:[-*+•·–]|\d+[.)、]|[A-Za-z][.)]|#+|\||>)\s*")
FENCE = regex.compile(r"^[ \t]*(```|~~~)", regex.MULTILINE)
FENCED = regex.compile(r"^[ \t]*```(\w*)[^\n]*\n(.*?)^[ \t]*```", regex.MULTILINE | regex.DOTALL)
TEMPLATE = regex.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|vision_start|vision_end|image_pad)\|>"
    r"|\[/?INST\]|<</?SYS>>|<image>|<video>"
    r"|^[ \t]*(?:### ?(?:Response|Instruction|Human|Assistant)|USER|ASSISTANT|Human"
    r"|Assistant)[ \t]*:",
    regex.MULTILINE,
)
MOJIBAKE = regex.compile(r"�|â€[™œ“”˜¦]|Ã[©¨¼¶¤±³]|&amp;(?:amp|lt|gt|quot);")
ENVIRONMENT = regex.compile(r"\\(begin|end)\{(\w+\*?)\}")
HTML = regex.compile(r"<(/?)(table|tr|td|th|div|p|ul|ol|li|h[1-6]|body|html)\b[^<>]*?(/?)>", regex.IGNORECASE)


def repetition(text: str) -> float:
    """Share 0..1 of the characters that say again what was said: n-grams of five words, or a run of up to eight words
    that comes three times and more in a row."""
    words = [word.lower() for word in words_of(text)]
    return max(duplicate_ngram(words, 5), looped(words))


def looped(words: Sequence[str]) -> float:
    """Share of the characters in repeats of a run of words, beyond its first time."""
    covered = bytearray(len(words))
    for size in range(1, LOOP_WORDS + 1):
        start = 0
        while start + size * LOOP_TIMES <= len(words):
            end = start + size
            while words[end : end + size] == words[start : start + size]:
                end += size
            if end - start >= size * LOOP_TIMES:
                covered[start + size : end] = b"\1" * (end - start - size)
            start = end if end - start >= size * LOOP_TIMES else start + 1
    characters = sum(map(len, words))
    return sum(len(word) for word, mark in zip(words, covered, strict=True) if mark) / characters if characters else 0.0


def is_incomplete(text: str) -> bool:
    """Whether an answer breaks off: an open block of code, a comma, dash or conjunction at its end, or prose of a
    dozen words whose last line is a sentence without a mark. Items of lists, tables, code, headings and names may end
    as they like."""
    text = text.strip()
    if len(FENCE.findall(text)) % 2:
        return True
    if not text or text.startswith(("{", "[", "<")):
        return not text
    if regex.search(r"(?:[,，、（(\[{]|\s[-–—&])$", text):
        return True
    last = text.splitlines()[-1]
    words = words_of(text)
    if words[-1].lower() in OPEN_ENDS and len(words) > 3:
        return True
    if len(words) < FULL_SENTENCE or LIST_LINE.match(last) or TERMINAL.search(last) or ENDED.search(last):
        return False
    ending = [word.strip("\"'(),;:") for word in words_of(last)]
    plain = sum(bool(regex.fullmatch(r"[\p{L}'’-]+", word)) for word in ending)
    return len(ending) >= LAST_SENTENCE and plain >= 0.8 * len(ending)


def malformed(text: str) -> int:
    """Faults of form: each kind that an answer has counts once."""
    faults = (
        bool(TEMPLATE.search(text)),
        bool(MOJIBAKE.search(text)),
        _broken_json(text),
        _uneven_table(text),
        _open_latex(text),
        _open_tags(text),
    )
    return sum(faults)


def harmful_words(text: str, listed: frozenset[str]) -> int:
    return blocked_words(text.lower(), listed)


def _broken_json(text: str) -> bool:
    """An answer that is written as JSON, whole or in a block, and is none."""
    stripped = text.strip()
    pieces = [body for name, body in FENCED.findall(text) if name.lower() == "json"]
    if regex.match(r"\{\s*\"|\[\s*[\[{]\s*\"", stripped):
        pieces.append(stripped)
    for piece in pieces:
        try:
            json.loads(piece)
        except (ValueError, RecursionError):
            return True
    return False


def _uneven_table(text: str) -> bool:
    """A table of Markdown, known by its line of dashes, with a row of fewer or more cells than its head has."""
    lines = [line.strip() for line in text.splitlines()]
    end = 1  # of the table before: its rows are looked at once
    for number, line in enumerate(lines):
        if number < end or not regex.fullmatch(r"\|?\s*:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)+\|?", line):
            continue
        width = _cells(line)
        end = number + 1
        while end < len(lines) and "|" in lines[end]:
            end += 1
        if any(_cells(row) != width for row in (lines[number - 1], *lines[number + 1 : end])):
            return True
    return False


def _cells(row: str) -> int:
    return len(regex.split(r"(?<!\\)\|", row.strip().strip("|")))


def _open_latex(text: str) -> bool:
    text = FENCED.sub(" ", text)
    open_: list[str] = []
    for what, name in ENVIRONMENT.findall(text):
        if what == "begin":
            open_.append(name)
        elif not open_ or open_.pop() != name:
            return True
    opened, closed = (len(regex.findall(rf"(?<!\\)\\\{mark}", text)) for mark in "[]")
    return bool(open_) or text.count("$$") % 2 == 1 or opened != closed


def _open_tags(text: str) -> bool:
    """Of an answer that is HTML: tags that are opened and not closed, or the other way round. Items, cells and
    paragraphs may leave their ends out, as HTML allows."""
    if not text.lstrip().startswith("<"):
        return False
    counts: dict[str, int] = {}
    for close, name, empty in HTML.findall(text):
        if not empty:
            counts[name.lower()] = counts.get(name.lower(), 0) + (-1 if close else 1)
    optional = {"p", "li", "tr", "td", "th", "body", "html"}
    return any(count < 0 or (count > 0 and name not in optional) for name, count in counts.items())

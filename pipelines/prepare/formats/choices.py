"""Questions about pictures as benchmarks write them: choices beside the question, <image 1> where a picture belongs.

Choices become lettered lines under the question, followed by what asks for the letter, and the answer is the letter:
as MMMU's own evaluation words it (construct_prompt of its data_utils.py, and its config llava1.5.yaml).
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from pipelines.prepare.formats.rows import BadRow, MediaRef, field_of, text

CHOICES = ("options", "choices")
COLUMNS = ("{}", "choice_{}", "option_{}")
"""Names of columns of which each holds one choice: A, B, ... (MMBench), choice_a, choice_b, ... (SEED-Bench)."""
ASKS = "Answer with the option's letter from the given choices directly."
ANSWERS = ("answer", "multiple_choice_answer", "answers")
NO_LITERAL = (ValueError, SyntaxError, MemoryError, RecursionError)
"""What ast.literal_eval raises for a string that is no literal."""
MARK = re.compile(r"<(image|video)(?: ?(\d+))?>")


def question_and_answer(entry: dict) -> tuple[str, Any]:
    """The words of the question, with its choices where it has some, and of the answer.

    Raises:
        BadRow: choices that are no list, or an answer that is none of them.
    """
    asked = entry["question"]
    if not isinstance(asked, str):
        raise BadRow("wrong-form", "question: words", type(asked).__name__)
    listed = choices_of(entry)
    if not listed:
        return asked, _answer(entry)
    hint = entry.get("hint")  # what the question is about: ScienceQA, MMBench, where a missing one is nan
    if isinstance(hint, str) and hint.strip() not in ("", "nan"):
        asked = f"{hint.strip()}\n{asked}"
    lines = "\n".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, listed, strict=False))
    return f"{asked}\n\n{lines}\n\n{ASKS}", _letter(field_of(entry, "answer"), listed)


def choices_of(entry: dict) -> list[str]:
    """The choices of a question: a list, a list written in a string (MMMU), or a column each; none: an open question.

    Raises:
        BadRow
    """
    name = next((name for name in CHOICES if entry.get(name) is not None), None)
    found = entry[name] if name else _of_columns(entry)
    if isinstance(found, str):
        with contextlib.suppress(*NO_LITERAL):
            found = ast.literal_eval(found)
    if not isinstance(found, list) or not all(isinstance(item, str | int | float) for item in found):
        raise BadRow(
            "wrong-form", f"{name}: a list of choices, or one written in a string", repr(entry.get(name or ""))
        )
    if len(found) > len(ascii_uppercase):
        raise BadRow("unsupported", f"{name}: at most {len(ascii_uppercase)} choices, a letter each", len(found))
    return [str(item) for item in found]


def _of_columns(entry: dict) -> list[Any]:
    for form in COLUMNS:
        names = [form.format(letter if form == "{}" else letter.lower()) for letter in ascii_uppercase]
        found = [entry.get(name) for name in names]
        num_choices = found.index(None) if None in found else len(found)
        if num_choices > 1:
            return found[:num_choices]
    return []


def _letter(answer: object, listed: Sequence[str]) -> str:
    """The letter of an answer that is one, or a choice's words, or its number from 0. Raises BadRow."""
    letters = ascii_uppercase[: len(listed)]
    if isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer} & set(range(len(listed)))
    else:
        said = answer.strip() if isinstance(answer, str) else ""
        places = {place for place, choice in enumerate(listed) if choice.strip() == said}
        letter = said.removeprefix("(").removesuffix(")")
        places |= {letters.index(letter)} if len(letter) == 1 and letter in letters else set()
        if not places and said.isascii() and said.isdecimal():
            places = {int(said)} & set(range(len(listed)))
    if len(places) != 1:
        expected = f"answer: one of the letters {letters}, or the words or the number (from 0) of one choice"
        raise BadRow("wrong-answer", expected, f"{answer!r}, which {'may be several' if places else 'is none'} of them")
    return letters[places.pop()]


def _answer(entry: dict) -> Any:
    """The answer to an open question; of several the first, of VQAv2's by ten people the most frequent."""
    value = field_of(entry, *ANSWERS)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return Counter(str(field_of(item, "answer")) for item in value).most_common(1)[0][0]
    if isinstance(value, str) and any(entry.get(name) is not None for name in CHOICES):  # MMMU's: "['7', '7.0']"
        with contextlib.suppress(*NO_LITERAL):
            several = ast.literal_eval(value)
            value = list(map(str, several)) if isinstance(several, list) else value
    return value[0] if isinstance(value, list) and value else value


class Shown:
    """Where the pictures of questions stand: where they are named (<image>: the next one, <image 2>: the second), all
    others before the first question."""

    def __init__(self, media: Sequence[MediaRef]):
        self.media = media
        self.next: Counter[str] = Counter()
        self.named: set[int] = set()

    def split(self, asked: str) -> list[dict]:
        """The words and pictures of one question in order. Raises BadRow: a picture that is not there."""
        parts: list[dict] = []
        at = 0
        for mark in MARK.finditer(asked):
            parts += self._between(asked[at : mark.start()], after=at > 0, before=True)
            at = mark.end()
            medium = self._medium(mark)
            self.named.add(medium)
            parts.append({"part": self.media[medium].kind, "media": medium})
        return [*parts, *self._between(asked[at:], after=at > 0, before=False)]

    def _medium(self, mark: re.Match[str]) -> int:
        of_kind = [number for number, item in enumerate(self.media) if item.kind == mark[1]]
        self.next[mark[1]] += mark[2] is None
        place = int(mark[2]) if mark[2] else self.next[mark[1]]
        if not 1 <= place <= len(of_kind):
            raise BadRow(
                "placeholder-without-media", f"{place} {mark[1]} files for {mark[0]}", f"{len(of_kind)} of them"
            )
        return of_kind[place - 1]

    @staticmethod
    def _between(words: str, *, after: bool, before: bool) -> list[dict]:
        """Without a line break that only sets a picture apart."""
        words = words.removeprefix("\n") if after else words
        words = words.removesuffix("\n") if before else words
        return [text(words)] if words else []

    def first(self) -> list[dict]:
        """Parts of the media that no question names. Raises BadRow where <image> was said too few times for them."""
        for kind, times in self.next.items():
            if times and times != (num := sum(item.kind == kind for item in self.media)):
                raise BadRow("media-without-placeholder", f"{num} placeholders <{kind}>", f"{times} of them")
        return [
            {"part": item.kind, "media": number} for number, item in enumerate(self.media) if number not in self.named
        ]

"""JSON files read from their beginning on, a few megabytes at a time: one entry of a list is in memory, not the list.

    stream = JsonStream(file, path)
    for value in stream.entries(): ...      the file is a list
    for name in stream.members(): ...       the file is an object: value(), or entries() of a list, comes next
    stream.end()                            nothing follows

Python's own decoder reads the values: what a file may hold is what json.loads takes. (ijson 3.6 writes ? for a lone
surrogate without a word, and ends the file at a NaN or a number of many digits, where here one row is bad.) A value is
tried on what has been read; where that ends within it, more is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.errors import DataError


def not_utf8(path: str, at: int) -> DataError:
    """Of an annotation file; `at` counts bytes from its beginning."""
    expected = "text in UTF-8"
    do = "write it as UTF-8 (iconv -f ITS_ENCODING -t UTF-8 FILE); a binary file is no annotation, name one with SOURCE"
    return DataError("the annotation file is not UTF-8", where=path, expected=expected, got=f"byte {at}", do=do)


CHUNK = 1 << 20
NEAR_END = 16
SHOWN = 40
"""Characters on either side of what is wrong."""
"""Characters before the end of what was read in which an error may be the end's: a name, a number, an escape."""
_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"|\\?\Z)|[][{},]', re.DOTALL)
"""A string may end with what was read, and go on in what is read next."""


class TooMuch(ValueError):
    """A value that Python does not read, though it may be JSON: nested too deeply, a number of too many digits. It is
    passed over; `text` is what it says, `line` where it begins."""

    def __init__(self, text: str, line: int):
        super().__init__("a value that Python does not read")
        self.text, self.line = text, line


class JsonStream:
    """Raises DataError with the file and line of what is not JSON, or not UTF-8."""

    def __init__(self, file: BinaryIO, path: str):
        self.path = path
        self._file, self._decode = file, json.JSONDecoder()
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0
        """The line of the character of _text up to which line feeds were counted."""
        self._start = 0
        """Where the last value begins."""
        self._bytes, self._whole = 0, False
        self._rest = b""

    # ------------------------------------------------------------ what is read of the file

    def _more(self) -> bool:
        """Reads on; what lies before the place where we are is forgotten. False at the end of the file."""
        if self._whole:
            return False
        data = self._file.read(max(CHUNK, len(self._text) - self._at))  # doubles, so that a large value costs little
        self._whole = not data
        text = self._decoded(self._rest + data)
        self._line, self._counted = self.line, 0
        self._text, self._at, self._start = self._text[self._at :] + text, 0, 0
        return True

    def _decoded(self, data: bytes) -> str:
        """The text of the bytes, but for a last character that is not whole yet."""
        try:
            text = data.decode()
            self._rest = b""
        except UnicodeDecodeError as error:
            if self._whole or error.end < len(data) or len(data) - error.start > 3:
                raise not_utf8(self.path, self._bytes + error.start) from None
            text, self._rest = data[: error.start].decode(), data[error.start :]
        first = self._bytes == 0
        self._bytes += len(data) - len(self._rest)
        return text.removeprefix("\ufeff") if first else text

    def peek(self) -> str:
        """The next character that is no space; nothing at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    @property
    def line(self) -> int:
        """The line of the place where we are."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    @property
    def text(self) -> str:
        """The last value as the file has it; asked for before anything else is read."""
        return self._text[self._start : self._at]

    def wrong(self, got: str, further: int = 0) -> DataError:
        """Not JSON, that many characters from here."""
        at = self._at + further
        line = self.line + self._text.count("\n", self._at, at)
        byte = self._bytes - len(self._text[at:].encode())
        shown = self._text[max(0, at - SHOWN) : at + SHOWN]
        return DataError(
            "the annotation file is not JSON",
            where=f"{self.path}, line {line}, byte {byte}",
            got=f"{got}, in {shown!r}" if shown else f"{got}, at the end of the file",
            do="mend the file there, or write it again: it may be cut",
        )

    def take(self, characters: str, told: str) -> str:
        """One of the characters, which has to come next."""
        if (found := self.peek()) == "" or found not in characters:
            raise self.wrong(told)
        self._at += 1
        return found

    # ------------------------------------------------------------ values

    def value(self) -> Any:
        """The value that comes next.

        Raises:
            DataError. TooMuch: Python cannot hold it; what follows can still be read.
        """
        self.peek()
        while True:
            try:
                found, end = self._decode.raw_decode(self._text, self._at)
                if end < len(self._text) - NEAR_END or not self._more():  # of 1.5e+7 the first half is one, too
                    break
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - NEAR_END or error.msg.startswith("Unterminated string")
                if not (cut and self._more()):
                    raise self.wrong(error.msg, error.pos - self._at) from None
            except (RecursionError, ValueError):
                line = self.line
                raise TooMuch(self._passed_over(), line) from None
        self._start, self._at = self._at, end
        return found

    def entries(self) -> Iterator[Any]:
        """Values of the list that comes next; TooMuch for one that Python cannot hold, after which it goes on."""
        self.take("[", "no list")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            try:
                yield self.value()
            except TooMuch as error:
                yield error
            if self.take(",]", "Expecting ',' delimiter") == "]":
                return

    def members(self) -> Iterator[str]:
        """Names of the object that comes next; before the next one is asked for, the value has to be read."""
        self.take("{", "no object")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self.wrong("Expecting property name enclosed in double quotes")
            name = self.value()
            self.take(":", "Expecting ':' delimiter")
            yield name
            if self.take(",}", "Expecting ',' delimiter") == "}":
                return

    def beginning(self, num: int) -> dict[str, Any]:
        """The object that comes next, of the lists in it the first `num` entries."""
        found: dict[str, Any] = {}
        for name in self.members():
            if self.peek() != "[":
                found[name] = self.value()
                continue
            found[name] = []
            for value in self.entries():
                if isinstance(value, TooMuch):
                    raise value
                if len(found[name]) < num:
                    found[name].append(value)
        return found

    def end(self) -> None:
        if self.peek():
            raise self.wrong("Extra data")

    def _passed_over(self) -> str:
        """The text of the value that comes next, cut at the comma or bracket behind it without parsing it."""
        while True:
            depth = 0
            for token in _TOKEN.finditer(self._text, self._at):
                if token["end"] not in (None, '"') and not self._whole:
                    break
                if depth == 0 and token[0] in ",]}":
                    text = self._text[self._at : token.start()]
                    self._at = token.start()
                    return text
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if not self._more():
                text, self._at = self._text[self._at :], len(self._text)
                return text

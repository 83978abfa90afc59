"""COCO's one object of images, annotations and categories, read once and as a stream: what belongs to a picture may
stand anywhere in the file, so images and annotations lie in a temporary table on disk (SQLite) until they are asked
for. Only the names of categories are held.

    with coco_file(path) as found:
        found.names, found.faults            categories by id, and what is none
        for bad in found.strangers(): ...    annotations of no image
        for where, image in found.images(): found.annotations(image["id"])
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.prepare.formats.rows import WRONG, Bad, BadRow, check_sound, opened, told
from pipelines.prepare.formats.streams import JsonStream, TooMuch
from trainer.errors import DataError

TABLES = """
create table images (number integer primary key, id text, entry text);
create table annotations (number integer primary key, id text, image text, entry text);
"""
INDEXES = """
create index images_id on images (id);
create index annotations_id on annotations (id);
create index annotations_image on annotations (image);
"""


@dataclass
class CocoFile:
    path: str
    database: sqlite3.Connection
    names: dict[int | str, str] = field(default_factory=dict)
    """Of categories, by id."""
    faults: list[Bad] = field(default_factory=list)
    """Categories that are none."""

    def images(self) -> Iterator[tuple[str, Any]]:
        """(where, entry) in the file's order."""
        for number, entry in self.database.execute("select number, entry from images order by number"):
            yield f"{self.path}, images[{number}]", json.loads(entry)

    def image(self, identity: object) -> dict | None:
        """The last one with the id."""
        return self._last("images", identity)

    def annotation(self, identity: object) -> dict | None:
        """The last one with the id."""
        return self._last("annotations", identity)

    def _last(self, table: str, identity: object) -> dict | None:
        asked = f"select entry from {table} where id = ? order by number desc limit 1"
        row = self.database.execute(asked, (_key(identity),)).fetchone()
        return json.loads(row[0]) if row else None

    def annotations(self, image: object) -> list[dict]:
        """Those of an image, in the file's order."""
        asked = "select entry from annotations where image = ? order by number"
        return [json.loads(entry) for (entry,) in self.database.execute(asked, (_key(image),))]

    def strangers(self) -> Iterator[Bad]:
        """Annotations of none of the images. What else is wrong with an annotation costs its image, which would be
        incomplete without it."""
        asked = "select number, entry from annotations where image is null or image not in (select id from images "
        asked += "where id is not null) order by number"
        for number, entry in self.database.execute(asked):
            where, found = f"{self.path}, annotations[{number}]", json.loads(entry)
            if isinstance(found, dict):
                yield Bad(where, "an image_id of `images`", repr(found.get("image_id"))[:200], "unknown-image")
            else:
                yield Bad(where, "an object", type(found).__name__, "wrong-form")


@contextlib.contextmanager
def coco_file(path: str) -> Iterator[CocoFile]:
    """
    Raises:
        DataError: no such file, not JSON, or not of this form.
    """
    with contextlib.closing(sqlite3.connect("", check_same_thread=False)) as database:  # a file that nobody else sees
        database.executescript(TABLES)
        found = CocoFile(path, database)
        with opened(path) as stream:
            try:
                _read(stream, found)
            except TooMuch as error:
                got = "an entry that is nested too deeply, or a number of too many digits"
                where = f"{path}, line {error.line}"
                raise DataError("the annotation file is not JSON that can be read", where=where, got=got) from None
        database.executescript(INDEXES)
        yield found


def _read(stream: JsonStream, found: CocoFile) -> None:
    if stream.peek() not in ("{", ""):
        value = stream.value()
        got = type(value).__name__
        raise DataError("the annotation file has another form", where=stream.path, expected="a JSON object", got=got)
    for name in stream.members():
        if name not in ("images", "annotations", "categories"):
            stream.value()
            continue
        if stream.peek() != "[":
            got = type(stream.value()).__name__
            expected = f"{name}: a list"
            raise DataError("the annotation file has another form", where=stream.path, expected=expected, got=got)
        if name == "categories":
            _categories(stream, found)
        else:
            put = f"insert into {name} values ({'?, ?, ?' if name == 'images' else '?, ?, ?, ?'})"
            found.database.executemany(put, _rows(stream, name))
    stream.end()


def _rows(stream: JsonStream, name: str) -> Iterator[tuple]:
    for number, entry in enumerate(_entries(stream)):
        keys = ["id"] if name == "images" else ["id", "image_id"]
        yield (number, *(_key(id_of(entry, key)) for key in keys), stream.text)


def _entries(stream: JsonStream) -> Iterator[Any]:
    for entry in stream.entries():
        if isinstance(entry, TooMuch):
            raise entry
        yield entry


def _categories(stream: JsonStream, found: CocoFile) -> None:
    for number, category in enumerate(_entries(stream)):
        where = f"{found.path}, categories[{number}]"
        try:
            check_sound(category)
            found.names[category["id"]] = str(category["name"])
        except BadRow as error:
            found.faults.append(Bad(where, error.expected, error.got, error.reason))
        except WRONG as error:
            found.faults.append(Bad(where, "a category: {id, name}", told(error), "wrong-form"))


def id_of(entry: Any, name: str) -> int | str | None:
    """An id that can be looked up; 1.0, as tables of numbers write it, is 1."""
    found = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(found, float) and found.is_integer():
        return int(found)
    return found if isinstance(found, int | str) else None


def _key(identity: object) -> str | None:
    """An id as the tables have it: 1 is 1.0 and not "1". Raises TypeError for what is no id."""
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)
    if identity is None or isinstance(identity, int | str):
        return None if identity is None else json.dumps(identity)
    raise TypeError(f"an id that is a {type(identity).__name__}")

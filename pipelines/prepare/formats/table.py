"""A row of a container (tar, Parquet) whose form its fields say: which reader of rows takes it."""

from __future__ import annotations

from importlib import import_module

from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import BadRow, Draft
from trainer.recipe import Source

ROWS = ("captions", "interleaved", "llama_factory", "llava", "mmc4", "ms_swift", "openai", "points", "preference")
ROWS = (*ROWS, "qwen_vl", "text")
"""Formats whose rows may stand in a container."""


def readers_of(entry: dict) -> list[str]:
    """The formats of ROWS that would take a row."""
    peek = Peek("", "rows", (entry,))
    return [name for name in ROWS if import_module(f"pipelines.prepare.formats.{name}").looks(peek) is not None]


def draft_of_row(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    """
    Raises:
        BadRow: no reader, or several of them, know the row.
    """
    found = readers_of(entry)
    if len(found) != 1:
        told = f"fields {sorted(entry)}" + (f", which {' and '.join(found)} would take" if found else "")
        raise BadRow("wrong-form", f"the fields of one of {', '.join(ROWS)}", told)
    return import_module(f"pipelines.prepare.formats.{found[0]}").draft(entry, where, media_root, source)

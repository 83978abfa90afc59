"""`format: auto`: which reader knows an annotation file by its first entries, its members or its columns.

    recognise(path) -> (format, why)

Exactly one reader must know the file; none or several are an error that says what was looked at, who would take it, and
how to name a format. The readers say themselves by what they know a file (`looks`).
"""

from __future__ import annotations

from importlib import import_module

from pipelines.prepare.formats.peek import Peek, peek_at
from trainer import storage
from trainer.errors import DataError

AUTO = "auto"
FIELDS = {
    "agent": (("instruction", "steps"), ("instruction", "targets")),
    "layout": (("pages",), ("image", "blocks")),
    "android_control": (("actions", "screenshots"),),
    "aitw": (("step_id", "goal_info"), ("step_id", "goal")),
    "web_dom": (("screens",),),
}
"""Of readers that do not say themselves: the fields that one of their rows has."""


def recognise(path: str, formats: tuple[str, ...]) -> tuple[str, str]:
    """
    Raises:
        DataError: no reader knows the file, or several do.
    """
    peek = peek_at(path)
    known = {name: why for name in formats if (why := _why(name, peek)) is not None}
    if len(known) == 1:
        return next(iter(known.items()))
    if not known and peek.holds == "rows" and not peek.entries:
        raise DataError(
            "a file without an entry that tells its format",
            where=path,
            expected="JSON objects, in a list or one a line",
            got="no whole object at its beginning" if storage.size(path) else "an empty file",
            do="look at the file; a reader that is named (format: NAME, --format NAME) tells the line that is broken",
        )
    told = "; ".join(f"{name} ({why})" for name, why in known.items())
    raise DataError(
        "the format of a file is ambiguous" if known else "the format of a file is not recognised",
        where=path,
        expected="a file that one reader knows",
        got=f"{peek.seen()}" + (f"; taken by {told}" if known else ""),
        do=f"name it: format: {next(iter(known), 'NAME')} in the recipe, --format {next(iter(known), 'NAME')} here"
        + ("" if known else f"; there is {', '.join(formats)}"),
    )


def _why(name: str, peek: Peek) -> str | None:
    module = import_module(f"pipelines.prepare.formats.{name}")
    if hasattr(module, "looks"):
        return module.looks(peek)
    if peek.holds == "xml" and name in ("uiautomator", "accessibility"):
        views = peek.names == ("hierarchy",)
        if "".join(peek.names).startswith("score-"):  # MusicXML
            return None
        return f"XML of {peek.names[0]}" if views == (name == "uiautomator") else None
    fields = next((names for names in FIELDS.get(name, ()) if peek.all(*names)), None)
    return " and ".join(fields) if fields else None

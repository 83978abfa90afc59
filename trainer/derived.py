"""Sources of a recipe that are made from another one (`path: source://OTHER`) by a section of their own: what has to
fit between the two. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer.grounding import SCHEME, origin_of

Refusal = Callable[[str], str | None]


def problems_of(
    sources: Mapping[str, Any], *, section: str, format: str, kind: str, about: str, refused: Refusal
) -> list[str]:
    """What is wrong between the sources of a recipe (recipe.Source by name), of those whose format is `format`.

    Args:
        section: the field of a source that this format has, and no other.
        kind: what is made, always as a chat; `about`: what it is, for people.
        refused: from the kind of the other source to why nothing can be made from it.
    """
    found: list[str] = []
    for name, source in sources.items():
        at = f"prepare.sources.{name}"
        if (getattr(source, section) is not None) != (source.format == format):
            found.append(f"{at}.{section}: the format {format} has this section, and no other format")
        elif source.format == format:
            problems = _origins(source, sources, refused)
            if source.rendering != "chat" or source.kind != kind:
                problems.append(("kind", f"{about} have the kind {kind} and the rendering chat"))
            given = [field for field in ("media", "curate") if getattr(source, field) is not None]
            problems += [(field, "has no meaning for what is made from another source") for field in given]
            found += [f"{at}.{field}: {told}" for field, told in problems]
    return found


def _origins(source: Any, sources: Mapping[str, Any], refused: Refusal) -> list[tuple[str, str]]:
    found = []
    for field in ("path", "held_out"):
        if not (path := getattr(source, field)):
            continue
        if (other := origin_of(path)) is None:
            found.append((field, f"{SCHEME}NAME of a source, got {path!r}"))
        elif other not in sources:
            found.append((field, f"no such source {other!r}; there are {sorted(sources)}"))
        elif (told := refused(sources[other].kind)) is not None:
            found.append((field, f"{other!r} {told}"))
        elif field == "held_out" and sources[other].held_out is None:
            found.append((field, f"{other!r} has nothing held out"))
    return found

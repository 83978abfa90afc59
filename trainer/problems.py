"""What is wrong with a file that pydantic refuses, in our words: every problem at once, by field path.

validated(MODEL, content, where=...)     the model, or RecipeError with all that is wrong
problems_of(error, MODEL)                (field path, message) of an error of pydantic
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trainer.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


def validated(root: type[Model], content: Mapping[str, Any], *, where: str, subject: str = "the recipe") -> Model:
    """
    Raises:
        RecipeError: with every problem at once, by field path.
    """
    try:
        made = root.model_validate(content)
    except ValidationError as error:
        raise RecipeError(problems_of(error, root), where=where, subject=subject) from None
    if mistaken := list(_mistaken(content, made, "")):
        raise RecipeError(mistaken, where=where, subject=subject)
    return made


def _mistaken(given: Any, made: Any, path: str) -> Iterator[tuple[str, str]]:
    """Numbers given as true, and the other way round: pydantic takes each for the other."""
    if isinstance(given, Mapping):
        pairs = [(key, value, _inside(made, key)) for key, value in given.items()]
    elif isinstance(given, Sequence) and isinstance(made, Sequence) and not isinstance(given, str):
        pairs = [(index, *both) for index, both in enumerate(zip(given, made, strict=False))]
    else:
        if isinstance(made, bool | int | float) and isinstance(given, bool) != isinstance(made, bool):
            yield path, f"expected {'true or false' if isinstance(made, bool) else 'a number'}, got {given!r}"
        return
    for key, value, inner in pairs:
        yield from _mistaken(value, inner, f"{path}.{key}" if path else str(key))


def _inside(made: Any, key: Any) -> Any:
    if isinstance(made, BaseModel):
        return getattr(made, str(key), None)
    return made.get(key) if isinstance(made, Mapping) else None


# ---------------------------------------------------------------- pydantic's errors

EXPECTED = {
    "greater_than": "a number greater than {gt:.15g}",
    "greater_than_equal": "a number greater than or equal to {ge:.15g}",
    "less_than": "a number less than {lt:.15g}",
    "less_than_equal": "a number less than or equal to {le:.15g}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "a mapping"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "string_type": "text",
    "none_required": "nothing (null)",
}
"""pydantic's kinds of errors in our words; others keep pydantic's."""


def wording(detail: Mapping[str, Any]) -> str:
    """One of pydantic's error details as `expected ..., got ...`."""
    got = repr(detail["input"])
    shown = got if len(got) <= 200 else f"{got[:197]}..."
    template = EXPECTED.get(detail["type"])
    told = detail["msg"] if template is None else f"expected {template.format(**detail.get('ctx', {}))}"
    one = re.sub(r"\b1 (item|character)s", r"1 \1", told)
    return f"{one}, got {shown}"


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[tuple[str, str]]:
    """(field path, message) of everything that pydantic found wrong with a file whose model is `root`."""
    return list(_problems(error, root))


def _problems(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        path = ".".join(location)
        if detail["type"] == "extra_forbidden":
            siblings = _siblings(location, root)
            close = difflib.get_close_matches(location[-1], siblings, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(siblings)}"
            yield path, f"unknown key{hint}"
        elif detail["type"] == "missing":
            yield path, "required, but missing"
        elif detail["type"] == "value_error":
            for line in str(detail.get("ctx", {}).get("error", detail["msg"])).splitlines():
                inner, colon, message = line.partition(": ")
                if colon and " " not in inner:  # a field below the model whose validator it is
                    yield ".".join(filter(None, (path, inner))), message
                else:
                    yield path, line
        else:
            yield path, wording(detail)


def _siblings(location: list[str], root: type[BaseModel]) -> list[str]:
    """Field names of the model that the last part of `location` was looked up in."""
    at: Any = root
    for part in location[:-1]:
        if (model := _model_of(at)) is None:
            return []
        tagged = [inner for inner in get_args(at) if isinstance(inner, type) and issubclass(inner, BaseModel)]
        if get_origin(at) in (dict, list):  # the part is a key or an index
            at = model
        elif len(tagged) > 1:  # a union told apart by `kind`, and the part is its value
            at = next((one for one in tagged if part in get_args(one.model_fields["kind"].annotation)), model)
        elif part in model.model_fields:
            at = model.model_fields[part].annotation
    model = _model_of(at)
    return sorted(model.model_fields) if model else []


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside Optional[Model] or dict[str, Model]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (model := _model_of(inner)) is not None:
            return model
    return None

"""Sections and sizes of a config.json, each with its field's path: a null or a text where a number belongs is one
ModelError that lists every such field. Without torch.

    vision = section(config, "vision_config")                     -> {} where left out
    filled(vision, VISION_DEFAULTS, "vision_config")["depth"]     -> int
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from trainer.errors import ModelError

KINDS = {int: "a whole number above 0", float: "a number above 0", tuple: "a list of whole numbers"}


def check_model_type(config: Mapping[str, Any], expected: str) -> None:
    """
    Raises:
        ModelError: the config is of another model.
    """
    if (found := config.get("model_type")) != expected:
        got = "nothing" if found is None else found
        raise ModelError("the config is of another model", where="model_type", expected=expected, got=got)


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of config[name]; empty where it is left out or null, which transformers takes for the same.

    Raises:
        ModelError: it is no object.
    """
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ModelError("a section of config.json is no object", where=name, expected="an object", got=repr(found))
    return dict(found or {})


def filled(
    stated: Mapping[str, Any], defaults: Mapping[str, Any], where: str, *, nullable: Collection[str] = ()
) -> dict[str, Any]:
    """`defaults` with everything of `stated`; a field is of the kind of its default, or null where that is `nullable`.

    Raises:
        ModelError: a field is of another kind.
    """
    values = dict(defaults) | dict(stated)
    kinds = {name: type(default) for name, default in defaults.items()}
    check(
        values, {name: kind for name, kind in kinds.items() if name not in nullable or values[name] is not None}, where
    )
    return values


def check(values: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> None:
    """
    Raises:
        ModelError: fields are missing or of another kind than int (above 0), float (above 0) or tuple (a list of
            whole numbers); all are listed.
    """
    problems = [
        f"{name}: {repr(values[name]) if name in values else 'missing'}, expected {KINDS[kind]}"
        for name, kind in kinds.items()
        if name not in values or not _is(values[name], kind)
    ]
    if problems:
        raise ModelError(
            "config.json has not the sizes that the family needs",
            where=where or "the language model's fields",
            got="\n    ".join(["", *problems]),
            do="compare with config.json of the released model",
        )


def _is(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(one, int) and one >= 0 for one in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > 0 and (kind is float or isinstance(value, int))

"""What every section of a recipe is made of: strict models, and fields that say by `role` what a change of them means
once a stage has begun (trainer/recipe.py has the three roles)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


def result(default: Any = ..., *, later: bool = False, **more: Any) -> Any:
    """A field that changes what is learned. `later`: recipes of format 1 did not have it from the beginning. Its
    default then keeps the behaviour of before, and no digest mentions it while it has it: what was begun without the
    field goes on."""
    return _field("result", default, later, more)


def execution(default: Any = ..., *, later: bool = False, **more: Any) -> Any:
    """A field that changes how a stage runs, not what it learns."""
    return _field("execution", default, later, more)


def _field(role: str, default: Any, later: bool, more: dict[str, Any]) -> Any:
    return Field(default, json_schema_extra={"role": role, **({"later": True} if later else {})}, **more)


def note(default: Any = ..., **more: Any) -> Any:
    """A field for people."""
    return Field(default, json_schema_extra={"role": "note"}, **more)


def is_unsaid(info: FieldInfo, value: Any) -> bool:
    """Whether a field was added later and has its default: digests leave it out."""
    extra = info.json_schema_extra
    later = isinstance(extra, dict) and bool(extra.get("later"))
    return later and value == info.get_default(call_default_factory=True)


def identity(value: Any) -> Any:
    """A section as plain JSON without the fields that are unsaid, at any depth: what digests of it cover."""
    return _identity(value, value.model_dump(mode="json"))


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        said = {name: getattr(value, name) for name, info in type(value).model_fields.items()
                if not is_unsaid(info, getattr(value, name))}  # fmt: skip
        return {name: _identity(one, dumped[name]) for name, one in said.items()}
    if isinstance(value, Mapping):
        return {key: _identity(one, plain) for one, (key, plain) in zip(value.values(), dumped.items(), strict=True)}
    if isinstance(value, list | tuple):
        return [_identity(one, plain) for one, plain in zip(value, dumped, strict=True)]
    return dumped


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

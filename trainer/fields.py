"""What every section of a recipe is made of: strict models, and fields that say by `role` what a change of them means
once a stage has begun (trainer/recipe.py has the three roles)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def result(default: Any = ..., **more: Any) -> Any:
    """A field that changes what is learned."""
    return Field(default, json_schema_extra={"role": "result"}, **more)


def execution(default: Any = ..., **more: Any) -> Any:
    """A field that changes how a stage runs, not what it learns."""
    return Field(default, json_schema_extra={"role": "execution"}, **more)


def note(default: Any = ..., **more: Any) -> Any:
    """A field for people."""
    return Field(default, json_schema_extra={"role": "note"}, **more)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

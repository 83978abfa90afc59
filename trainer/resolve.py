"""From what a person names (a shipped recipe, a file, a URI, YAML text, --set overrides) to one resolved recipe.

A resolved recipe is the recipe with every default filled in, as plain JSON, with its sha256; it is stored beside every
output. A stage's digest covers its own result fields, the parent's model digest and the data digest, nothing else, so
that a new node pool does not make a finished stage look unfinished.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import UnionType
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer import storage
from trainer.errors import RecipeError, UsageError
from trainer.fields import identity, is_unsaid
from trainer.problems import validated
from trainer.recipe import Recipe, Stage

Json = dict[str, Any]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error instead of the last one winning, and 1e-5 is a number."""


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1  # type: ignore[no-untyped-call]
        if not isinstance(key, str | int | float | bool | None):
            got = type(key).__name__
            raise RecipeError([(f"line {line}", f"a key must be a word, got a {got}: {str(key)[:80]}")])
        if key in seen:
            raise RecipeError([(str(key), f"given twice in one mapping, the second time in line {line}")])
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; people mean the number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "0123456789.-+" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("trainer") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_text(ref: str) -> tuple[str, str]:
    """(YAML text, where it came from) of a shipped name, a path or URI, or YAML itself."""
    if "\n" in ref:
        return ref, "inline YAML"
    if ref in shipped():
        return (resources.files("trainer") / "recipes" / f"{ref}.yaml").read_text(encoding="utf-8"), ref
    return text_at(ref, what="recipe", names=shipped()), ref


def text_at(ref: str, *, what: str, names: Sequence[str]) -> str:
    """The text of a path or URI; `what` and the shipped `names` are for the messages.

    Raises:
        UsageError: nothing is there, or no text. StorageError: no credentials, or the storage does not answer.
    """
    try:
        return storage.read_bytes(ref).decode("utf-8-sig")
    except IsADirectoryError:
        raise UsageError(f"not a {what}", where=ref, expected="a file", got="a folder") from None
    except UnicodeDecodeError as error:
        got = f"byte {error.start} is not"
        raise UsageError(f"not a {what}", where=ref, expected="YAML in UTF-8", got=got) from None
    except (FileNotFoundError, NotADirectoryError):
        close = difflib.get_close_matches(ref, names, n=1)
        raise UsageError(
            f"no such {what}",
            where=ref,
            expected=f"a file, a URI or one of {', '.join(names)}",
            do=f"did you mean {close[0]}?" if close else None,
        ) from None


def load_recipe(ref: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        ref: name of a shipped recipe, path, URI, or YAML text.
        overrides: `a.b=value` strings, the value in YAML; null removes an optional section.

    Raises:
        RecipeError: with every problem at once, by field path.
        UsageError: when there is no such recipe or an override is not of the form a.b=value.
    """
    content, where = read_recipe(ref)
    for override in overrides:
        apply_override(content, override)
    stored = content.pop("sha256", None)  # a resolved recipe is a recipe: what its sha256 covers may be overridden
    recipe = validate(content, where=where)
    if stored is not None and not overrides:
        _check_sha256(recipe, stored, where=where)
    return recipe


def read_recipe(ref: str, *, below: tuple[str, ...] = ()) -> tuple[Json, str]:
    """(content, where it came from); `extends: OTHER` is another recipe with this one's keys laid over it."""
    text, where = read_text(ref)
    content = parse_yaml(text, where=where)
    parent = content.pop("extends", None)
    if parent is None:
        return content, where
    if parent in (*below, ref):
        raise RecipeError([("extends", f"goes in a circle: {' -> '.join((*below, ref, str(parent)))}")], where=where)
    if not isinstance(parent, str):
        raise RecipeError([("extends", f"expected the name, path or URI of a recipe, got {parent!r}")], where=where)
    return _laid_over(read_recipe(parent, below=(*below, ref))[0], content), where


def _laid_over(base: Json, top: Json) -> Json:
    """Sections are merged key by key; any other value, null included, replaces, and so does the config of another
    model: what is left of a model type says nothing of the next."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        both = both and value.get("model_type") in (None, merged[key].get("model_type"))
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def validate(content: Mapping[str, Any], *, where: str) -> Recipe:
    return validated(Recipe, content, where=where)


def parse_yaml(text: str, *, where: str, subject: str = "the recipe") -> Json:
    """A YAML mapping with unique keys, 1e-5 read as a number; `subject` names the file's kind in errors."""
    try:
        content = _loaded(text)
    except RecipeError as error:  # a key given twice, or one that is no word
        raise RecipeError(error.problems, where=where, subject=subject) from None
    except yaml.YAMLError as error:
        raise RecipeError([(where, f"not YAML: {error}")], subject=subject) from None
    if not isinstance(content, dict):
        kind = "nothing: the file is empty" if content is None else _KINDS.get(type(content), type(content).__name__)
        raise RecipeError([(where, f"expected a mapping, got {kind}")], subject=subject)
    return content


_KINDS = {list: "a list", str: "plain text", int: "a number", float: "a number", bool: "true or false"}


def _loaded(text: str) -> Any:
    """Raises RecipeError for keys, YAMLError for whatever else is wrong with the text."""
    try:
        return _numbers(yaml.load(text, _UniqueKeys))
    except ValueError as error:  # a date that is none, a number too long for Python
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply, or an anchor that holds itself") from None


def apply_override(content: Json, override: str) -> None:
    """Set `a.b.c=value` in place; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UsageError("not an override", where=f"--set {override}", expected="a.b.c=value")
    try:
        value = _loaded(text)
    except RecipeError as error:
        raise RecipeError(error.problems, subject=f"--set {override}") from None
    except yaml.YAMLError:
        raise UsageError("the override's value is not YAML", where=f"--set {override}") from None
    *parents, last = path.split(".")
    at: Any = content
    for depth, key in enumerate(parents):
        at = at.setdefault(key, {})
        if at is None:
            raise UsageError(
                "nothing to override", where=f"--set {override}", got=f"{'.'.join(parents[: depth + 1])} is null"
            )
        if not isinstance(at, dict):
            raise UsageError(
                "not a section", where=f"--set {override}", got=f"{'.'.join(parents[: depth + 1])} = {at!r}"
            )
    at[last] = value


# ---------------------------------------------------------------- resolved


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: what digests are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def resolved(recipe: Recipe) -> Json:
    """The recipe with every default filled in, as plain JSON; `sha256` covers all the rest, less fields that were added
    later and have their default, so that what was stored before them reads back."""
    return {**recipe.model_dump(mode="json"), "sha256": digest(identity(recipe))}


def from_resolved(content: Mapping[str, Any], *, where: str) -> Recipe:
    """Read a stored resolved recipe and check its sha256."""
    content = dict(content)
    stored = content.pop("sha256", None)
    recipe = validate(content, where=where)
    if stored is not None:
        _check_sha256(recipe, stored, where=where)
    return recipe


def _check_sha256(recipe: Recipe, stored: str, *, where: str) -> None:
    if (found := resolved(recipe)["sha256"]) != stored:
        raise RecipeError(
            [("sha256", f"stored {stored[:12]}, computed {found[:12]}: the file was edited")], where=where
        )


def fields(model: BaseModel, role: str, prefix: str = "", *, unsaid: bool = True) -> dict[str, Any]:
    """Leaf fields of one role as {path: JSON value}; a section's role is that of each of its leaves. `unsaid`: also
    those that were added to recipes later and have their default, which digests leave out."""
    found: dict[str, Any] = {}
    dumped = model.model_dump(mode="json") if unsaid else identity(model)
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if name not in dumped:
            continue
        if isinstance(value, BaseModel):
            found |= fields(value, role, f"{prefix}{name}.", unsaid=unsaid)
        elif _role(info) == role:
            found[f"{prefix}{name}"] = dumped[name]
    return found


def _role(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    if not isinstance(extra, dict) or "role" not in extra:
        raise AssertionError("a recipe field without a role: use result(), execution() or note()")
    return str(extra["role"])


def stage_fields(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What a stage's outcome depends on, besides its parent's weights and its data: its own result fields and the
    model settings that the trainer itself applies."""
    return {
        **fields(stage, "result", unsaid=False),
        "family": recipe.family,
        "seed": recipe.seed,
        "model.tokens_per_second": recipe.model.tokens_per_second,
        "prepare.variants": recipe.prepare.variants,
    }


def stage_digest(recipe: Recipe, stage: Stage, *, parent_model: str, data: str) -> str:
    """sha256 over the stage's result fields, the parent's model digest and the data digest."""
    return digest({"fields": stage_fields(recipe, stage), "parent_model": parent_model, "data": data})


@dataclass(frozen=True)
class Change:
    """One result field that differs between a stored stage and the one asked for."""

    field: str
    stored: Any
    asked: Any


def changes(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Change]:
    """Result fields that differ. A field that one of them lacks has its default there where it was added to recipes
    later; one below a section that the other has as null was switched on or off; any other is of other code, and its
    default keeps the behaviour of before, so it is no change."""
    stored, asked = _said(stored), _said(asked)
    found = []
    for key in sorted(stored.keys() | asked.keys()):
        if key in stored and key in asked:
            differs = stored[key] != asked[key]
        else:
            other = asked if key in stored else stored
            differs = any(section in other for section in _sections(key))
        if differs:
            found.append(Change(key, stored.get(key), asked.get(key)))
    return found


def _said(stage: Mapping[str, Any]) -> Json:
    """Fields that were added later and are not there, with their defaults."""
    below = {section for key in stage for section in _sections(key)}
    return {key: value for key, value in _later(Stage).items() if key not in below} | dict(stage)


def _sections(path: str) -> list[str]:
    """a.b.c -> a, a.b"""
    return [path[:at] for at, character in enumerate(path) if character == "."]


def _later(model: type[BaseModel], prefix: str = "") -> Json:
    """{path: JSON of the default} of the fields that were added later, in sections of sections too."""
    found: Json = {}
    for name, info in model.model_fields.items():
        inner = _section_of(info.annotation)
        if not info.is_required() and is_unsaid(info, default := info.get_default(call_default_factory=True)):
            whole = isinstance(default, BaseModel)
            found |= fields(default, "result", f"{prefix}{name}.") if whole else {f"{prefix}{name}": default}
        elif inner is not None:
            found |= _later(inner, f"{prefix}{name}.")
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is a section, or may be null; lists and mappings of sections are leaves."""
    inner = [annotation, *(get_args(annotation) if isinstance(annotation, UnionType) else ())]
    return next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), None)


def json_schema() -> Json:
    """JSON Schema of a recipe, for editors. One that extends another is checked whole only when it is loaded."""
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    extending = {"type": "object", "required": ["extends"], "properties": {"extends": {"type": "string"}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "if": extending,
        "then": True,
        "else": schema,
        "$defs": definitions,
    }

"""OUT/recipe.json: the resolved recipe of an output, written at first use and compared ever after.

A run into an output that holds work goes on only if the recipe still asks for what was made there. Fields of stages
that have not begun may change freely, execution fields and notes always; a result field of something that has begun
is refused by name, unless --accept-change names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from trainer import storage
from trainer.errors import RecipeError, StageMismatch, UsageError
from trainer.recipe import STAGES, Recipe
from trainer.resolve import fields, from_resolved, load_recipe, resolved

NAME = "recipe.json"


def asked_recipe(recipe: str, overrides: Iterable[str], base_model: str = "") -> Recipe:
    """The recipe that a person asks for; `base_model` takes the place of `model.base` or of `model.init`.

    Raises:
        RecipeError: the recipe is not valid, or asks for what no reader, corpus or model family provides.
    """
    extra = [f"model.base={base_model}", "model.init=null", "model.config=null"] if base_model else []
    found = load_recipe(recipe, [*overrides, *extra])
    if problems := problems_before_data(found):
        raise RecipeError(problems, where=recipe if "\n" not in recipe else "inline YAML")
    return found


def problems_before_data(recipe: Recipe) -> list[tuple[str, str]]:
    """(field path, message) of what is wrong with a valid recipe and can be known without reading data or models.

    Imports here: 0.2 s that later steps, which read the stored recipe, save.
    """
    from pipelines.prepare.formats import problems_of_sources
    from trainer.models.cautions import stated_family
    from trainer.models.family import FAMILIES, class_of

    problems = problems_of_sources(recipe.prepare.sources)
    known = ", ".join(sorted(FAMILIES))
    if recipe.family not in FAMILIES:
        problems.append(("family", f"no such model family {recipe.family!r}; there is {known}"))
    config = recipe.model.config
    model_type = class_of(recipe.family).model_type if recipe.family in FAMILIES else recipe.family
    if isinstance(config, dict) and config.get("model_type") != model_type:
        expected, got = f"{model_type}, that of family {recipe.family}", config.get("model_type")
        problems.append(("model.config.model_type", f"expected {expected}, got {got!r}"))
    elif recipe.family in FAMILIES:
        try:
            stated_family(recipe)
        except RecipeError as error:
            problems += error.problems
    for name in recipe.evaluate.sources:
        if recipe.prepare.sources[name].held_out is None:
            problems.append((f"evaluate.sources.{name}", f"prepare.sources.{name} has no held_out data to measure on"))
    return problems


def stored_recipe(out: str) -> Recipe:
    """The recipe that this output was settled with.

    Raises:
        UsageError: none yet. RecipeError: it is damaged, or of a version that is not read.
    """
    uri = storage.join(out, NAME)
    try:
        content = storage.read_json(uri)
    except FileNotFoundError:
        do = f"start one with qwenvl run RECIPE --out {out}, or give --recipe where the command has it"
        raise UsageError("no run has written into this output", where=uri, do=do) from None
    return from_resolved(content, where=uri)


def settle(
    recipe: str, overrides: Iterable[str], *, out: str, base_model: str = "", accept: Iterable[str] = ()
) -> Recipe:
    """Write OUT/recipe.json, or check that what is there already allows this recipe.

    Raises:
        UsageError: there is no such base model.
        RecipeError: the recipe is not valid, or `accept` names a field that there is not.
        StageMismatch: the output holds work made with other result fields.
    """
    if base_model and not storage.exists(storage.join(base_model, "config.json")):
        expected = "a model folder in Hugging Face layout, with its config.json"
        raise UsageError("no such base model", where=f"--base-model {base_model}", expected=expected)
    asked = asked_recipe(recipe, overrides, base_model)
    content, uri = resolved(asked), storage.join(out, NAME)
    stored = stored_recipe(out) if storage.exists(uri) else None
    refuse_unknown(accept := tuple(accept), *(one for one in (asked, stored) if one is not None))
    if stored is None:
        storage.write_json(uri, content)
        return asked
    refuse_changes(stored, asked, out=out, accept=accept)
    if resolved(stored)["sha256"] != content["sha256"]:
        storage.write_json(uri, content)
    return asked


def refuse_changes(stored: Recipe, asked: Recipe, *, out: str, accept: Iterable[str] = ()) -> None:
    before, now = fields(stored, "result"), fields(asked, "result")
    accepted = tuple(accept)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    refused = sorted(key for key in changed if begun(key, out) and not _covered(key, accepted))
    if not refused:
        return
    raise StageMismatch(
        "the output holds work made with other settings",
        where=storage.join(out, NAME),
        expected="\n".join(f"    {key}: {_shown(before.get(key))} (stored)" for key in refused).lstrip(),
        got="\n".join(f"    {key}: {_shown(now.get(key))} (asked for)" for key in refused).lstrip(),
        do="use another --out, undo the change, or repeat with "
        + " ".join(f"--accept-change {key}" for key in refused[:3])
        + (" ..." if len(refused) > 3 else ""),
    )


def refuse_unknown(accepted: Iterable[str], *recipes: Recipe) -> None:
    """A name that accepts nothing is a mistake, which would be told hours later by what it did not accept."""
    roles = ("result", "execution", "note")
    known = {key for recipe in recipes for role in roles for key in fields(recipe, role)}
    problems = []
    for name in accepted:
        if any(_covered(key, (name,)) for key in known):
            continue
        close = difflib.get_close_matches(name, sorted(known | {_in_stage(key) for key in known}), n=1)
        problems.append((f"--accept-change {name}", f"no such field{f'; did you mean {close[0]}?' if close else ''}"))
    if problems:
        raise RecipeError(problems, subject="the command")


def begun(field: str, out: str) -> bool:
    """Whether something in the output was made from this field."""
    section, _, rest = field.partition(".")
    if section == "stages":
        stage = rest.partition(".")[0]
        return stage in STAGES and _any(out, f"{stage}/plan/plan.json", f"{stage}/result.json")
    if section in ("export", "evaluate"):
        return _any(out, f"{section}/README.md" if section == "export" else "evaluate/evaluation.json")
    return _any(out, "data/funnel.json", "init/result.json")


def _any(out: str, *names: str) -> bool:
    return any(storage.exists(storage.join(out, name)) for name in names)


def _covered(field: str, accepted: tuple[str, ...]) -> bool:
    """`optim.lr` accepts it in every stage, `stages.sft.optim.lr` in one; a section's name accepts all of it."""
    paths = (field, _in_stage(field))
    return any(path == name or path.startswith(f"{name}.") for name in accepted for path in paths)


def _in_stage(field: str) -> str:
    """stages.sft.optim.lr -> optim.lr; others as they are."""
    return field.split(".", 2)[2] if field.startswith("stages.") and field.count(".") > 1 else field


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."

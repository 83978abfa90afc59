"""qwenvl recipe list|show|check|schema|diff: what a recipe says once it is resolved."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pipelines.cli.changes import add_set
from trainer.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="qwenvl recipe", description=__doc__)
    what = made.add_subparsers(dest="what", required=True)
    what.add_parser("list", help="the recipes that come with the package")
    what.add_parser("schema", help="JSON Schema, for editors")
    show = what.add_parser("show", help="the resolved recipe: every default filled in, with its sha256")
    check = what.add_parser("check", help="validate without reading data; every problem at once, exit code 2 if any")
    told = "fields in which two recipes differ, and what a change of each means; exit code 0: the same, 1: they differ"
    diff = what.add_parser("diff", help=told, description=told)
    for one in (show, check):
        one.add_argument("recipe", help="shipped name, file, URI, or an OUT/recipe.json")
        add_set(one)
    show.add_argument("--json", action="store_true", help="JSON instead of YAML")
    check.add_argument("--cluster", help="also check against a cluster file, and that the file is no example any more")
    diff.add_argument("one", help="shipped name, file, URI, or an OUT/recipe.json")
    diff.add_argument("other", help="likewise: what the first one is compared with")
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    return {"list": _list, "schema": _schema, "show": _show, "check": _check, "diff": _diff}[asked.what](asked)


def _list(asked: argparse.Namespace) -> int:
    from trainer.resolve import load_recipe, shipped

    for name in shipped():
        recipe = load_recipe(name)
        print(f"{name:24} {' '.join(recipe.stages.named()):34} {recipe.description}")
    return 0


def _schema(asked: argparse.Namespace) -> int:
    from trainer.resolve import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0


def _show(asked: argparse.Namespace) -> int:
    import yaml

    from trainer.resolve import load_recipe, resolved

    content = resolved(load_recipe(asked.recipe, asked.overrides))
    print(json.dumps(content, indent=1) if asked.json else yaml.safe_dump(content, sort_keys=False, width=120), end="")
    if asked.json:
        print()
    return 0


def _check(asked: argparse.Namespace) -> int:
    from pipelines.settle import asked_recipe
    from trainer.models.cautions import cautions
    from trainer.resolve import resolved

    recipe = asked_recipe(asked.recipe, asked.overrides)
    for field, caution in cautions(recipe):
        print(f"warning: {field}: {caution}", file=sys.stderr)
    if asked.cluster:
        _check_cluster(recipe, asked.cluster)
    print(f"{recipe.name}: valid; stages {', '.join(recipe.stages.named())}; sha256 {resolved(recipe)['sha256'][:12]}")
    return 0


def _check_cluster(recipe: Recipe, ref: str) -> None:
    """The recipe fits, and the file is somebody's own: what is left of the example is an error, and only a warning of
    an example that is asked for by its name."""
    from k8s.cluster import check, load_cluster, shipped
    from pipelines.placeholders import reserved, unfilled
    from trainer.errors import RecipeError

    cluster = load_cluster(ref)
    problems = [(f"on cluster {cluster.name}", problem) for problem in check(recipe, cluster)]
    if problems:
        raise RecipeError(problems)
    left, warnings = unfilled(cluster), reserved(cluster)
    if left and ref not in shipped():
        raise RecipeError(left, where=ref if "\n" not in ref else "inline YAML", subject="the cluster file")
    for field, told in [*left, *warnings]:
        print(f"warning: cluster {cluster.name}: {field}: {told}", file=sys.stderr)


def _diff(asked: argparse.Namespace) -> int:
    """Like diff(1): 0 when nothing differs, 1 otherwise; what is no recipe is 2, as everywhere."""
    from trainer.resolve import load_recipe

    one, other = load_recipe(asked.one), load_recipe(asked.other)
    differ = 0
    for role in ("result", "execution", "note"):
        before, now = _leaves(one, role), _leaves(other, role)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                differ = 1
                print(f"{role:9} {key}: {_shown(before.get(key))} -> {_shown(now.get(key))}")
    if not differ:
        print("the same")
    return differ


def _leaves(recipe: Recipe, role: str) -> dict[str, Any]:
    from trainer.resolve import fields

    return fields(recipe, role)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."

"""Files that are made from code and committed: `python -m tests.generated --check | --write`.

Resolved dumps of the shipped recipes (an accidental change of a default shows in review as one line), the recipe's JSON
Schema, the compiled pipeline, the recipes inside the chart, the rendered manifests, the reference of commands and the
table of what the families' rules measured.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.full_recipe import compile_to
from tests import commands, tables
from tests.k8s.golden import manifests
from tests.models import table as families
from tests.prepare.way import systems
from trainer.resolve import json_schema, load_recipe, resolved, shipped

ROOT = Path(__file__).parents[1]


def as_json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def wanted() -> Iterator[tuple[str, str]]:
    """(path from the root, content) of every generated file."""
    for name in shipped():
        yield f"tests/golden/recipes/{name}.json", as_json(resolved(load_recipe(name)))
    yield "trainer/recipe.schema.json", as_json(json_schema())
    yield commands.REFERENCE, commands.reference()
    for told in (families, systems):
        text = (ROOT / told.README).read_text(encoding="utf-8")
        yield told.README, tables.between(text, told.MARKS, told.table(), where=told.README)
    yield from manifests()
    yield "pipelines/full_recipe.yaml", compiled_pipeline()


def compiled_pipeline() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full_recipe.yaml"
        compile_to(path)
        return path.read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="fail when a file differs from what the code makes")
    mode.add_argument("--write", action="store_true", help="write them")
    arguments = parser.parse_args()
    stale = 0
    for name, content in wanted():
        path = ROOT / name
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found == content:
            continue
        stale += 1
        if arguments.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(f"wrote {name}")
        else:
            lines = difflib.unified_diff(found.splitlines(), content.splitlines(), name, "made now", lineterm="", n=1)
            print("\n".join(list(lines)[:40]))
    if stale and arguments.check:
        print(f"{stale} generated files are not what the code makes: run `make generated` and read the difference")
        return 1
    print(f"generated files: {stale} written" if arguments.write else "generated files: up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tiny recipe of every family, a few steps a stage on the small corpus, through `qwenvl run`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.prepare.corpus.names import SCHEME, SMALL
from pipelines.prepare.ingest import prepare_corpus
from tests.integration.runs import qwenvl
from tests.prepare.builders import small_recipe
from trainer import handover
from trainer.models.family import FAMILIES
from trainer.recipe import GROUPS, Recipe
from trainer.resolve import load_recipe, shipped

pytestmark = pytest.mark.extended
RECIPES = {load_recipe(name).family: name for name in reversed(shipped()) if name.startswith("tiny_") or name == "tiny"}
STEPS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus, drawn once for all families."""
    out = tmp_path_factory.mktemp("corpus")
    prepare_corpus(small_recipe(), str(out))
    return out / "data" / "corpus"


def short(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe on the small corpus, STEPS steps a stage, its stages and freeze configuration as they are."""
    stages: dict[str, Any] = {}
    for stage, config in recipe.stages.named().items():
        stages[stage] = {"checkpoint": {"every_steps": STEPS}, "held_out_packs": 2}
        if stage != "dpo":  # one pass: each pair is used once
            stages[stage]["schedule"] = {"steps": STEPS}
        if config.sampling is not None:
            stages[stage]["sampling"] = {"requests": 4, "answers": 2, "max_new_tokens": 4}
    sources = {
        source: {key: small(value) for key in ("path", "held_out") if (value := getattr(config, key))}
        for source, config in recipe.prepare.sources.items()
    }
    return {
        "extends": name,
        "name": f"{name}_short"[:40],
        "prepare": {"sources": sources},
        "model": {"pretrain": {"llm_steps": 3, "vision_steps": 3}},
        "stages": stages,
        "evaluate": {"samples": 2, "max_new_tokens": 4},
    }


def small(path: str) -> str:
    return path.replace(SCHEME, f"{SCHEME}{SMALL}/")


def test_every_family_has_a_tiny_recipe() -> None:
    assert set(RECIPES) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_the_tiny_recipe_goes_through_its_stages(family: str, corpus: Path, tmp_path: Path) -> None:
    name, out = RECIPES[family], tmp_path / "out"
    recipe = load_recipe(name)
    shutil.copytree(corpus, out / "data" / "corpus")
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump(short(recipe, name)))
    began = time.monotonic()
    ended = qwenvl("run", str(file), "--out", str(out), timeout_s=600)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    print(f"{name}: {time.monotonic() - began:.0f} s")
    assert "finished in" in ended.stdout
    for stage, config in recipe.stages.named().items():
        result = handover.read(str(out), stage)
        assert result.metrics["steps"] == STEPS or (stage == "dpo" and result.metrics["steps"] >= 1)
        check_frozen(result.freeze_table, {group: getattr(config.train, group) for group in GROUPS})
        logs = "".join(path.read_text() for path in (out / stage).rglob("rank0.log"))
        assert "attention: sdpa, " in logs, "the choice is told at start"
    export = handover.read(str(out), list(recipe.stages.named())[-1])
    assert export.model.files and (out / "export" / "config.json").exists()


def check_frozen(table: Any, train: Mapping[str, bool]) -> None:
    """As the recipe says, proved by digests; what is constant has its reason."""
    for row in table:
        same = row.digest_before == row.digest_after
        assert same == (row.state != "trained"), row
        if row.state == "constant":
            assert row.reason
        else:
            assert row.state == ("trained" if train[row.group] else "frozen"), row
    assert {row.group for row in table} == set(GROUPS)

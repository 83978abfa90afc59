"""The pipeline's definition: what depends on what, what kfp may not do on its own, and the committed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.full_recipe import COMPILED, compile_to
from trainer.recipe import STAGES


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_to(path)
    return yaml.safe_load(path.read_text())


def steps(compiled: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tasks by the name that people see."""
    inner = next(part["dag"]["tasks"] for name, part in compiled["components"].items() if "dag" in part)
    return {task["taskInfo"]["name"]: task | {"key": key} for key, task in inner.items()}


def test_the_committed_file_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    compile_to(tmp_path / "one.yaml")
    compile_to(tmp_path / "two.yaml")
    assert (tmp_path / "one.yaml").read_text() == (tmp_path / "two.yaml").read_text()
    assert (tmp_path / "one.yaml").read_text() == COMPILED.read_text(), "run python pipelines/full_recipe.py"


@pytest.mark.parametrize(
    ("step", "want"),
    [
        ("init", {"prepare-data"}),
        ("prepare-stage1", {"prepare-data"}),
        ("prepare-stage3", {"prepare-stage2"}),
        ("stage1", {"prepare-stage1", "init"}),
        ("stage3", {"prepare-stage3", "stage2"}),
        ("prepare-sft-requests", {"prepare-data"}),
        ("prepare-sft-answers", {"prepare-sft-requests", "stage3"}),
        ("prepare-sft-select", {"prepare-sft-answers"}),
        ("prepare-sft", {"prepare-sft-select", "prepare-stage3"}),
        ("prepare-dpo-answers", {"prepare-dpo-requests", "sft"}),
        ("dpo", {"prepare-dpo", "sft"}),
        ("export", {"dpo"}),
        ("evaluate", {"export"}),
        ("report", {"evaluate"}),
    ],
)
def test_a_step_waits_for_what_it_reads(compiled: dict[str, Any], step: str, want: set[str]) -> None:
    found = steps(compiled)
    name_of = {task["key"]: name for name, task in found.items()}
    assert {name_of[key] for key in found[step].get("dependentTasks", [])} == want


def test_plans_of_later_stages_need_no_earlier_training(compiled: dict[str, Any]) -> None:
    found = steps(compiled)
    trained = {found[stage]["key"] for stage in STAGES}
    for stage in ("stage1", "stage2", "stage3"):
        assert not trained & set(found[f"prepare-{stage}"]["dependentTasks"])


def test_no_step_is_cached_by_kfp_and_every_one_is_tried_again_when_its_pod_is_lost(compiled: dict[str, Any]) -> None:
    for name, task in steps(compiled).items():
        assert not task.get("cachingOptions", {}).get("enableCache"), name
        assert task["retryPolicy"]["maxRetryCount"] == 2, name


def test_an_exit_task_cleans_up_whatever_happens(compiled: dict[str, Any]) -> None:
    task = compiled["root"]["dag"]["tasks"]["clean-up"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_the_body_of_a_step_is_one_call(compiled: dict[str, Any]) -> None:
    for name, executor in compiled["deploymentSpec"]["executors"].items():
        source = executor["container"]["command"][-1]
        assert source.count("work.") == 1, name
        assert "pip install" not in str(executor["container"]["command"]), name

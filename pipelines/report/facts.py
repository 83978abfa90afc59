"""What a report says, read from storage alone: results, plans, committed metrics, counts, evaluation.

facts = read_facts(out)     everything the page needs
run_json(facts)             the same for programs: OUT/run.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pipelines import spent
from pipelines.session import Session
from trainer import handover, storage
from trainer import manifest as manifests
from trainer.data.drops import HELD_OUT, cautions
from trainer.handover import StageResult
from trainer.observe import tracking
from trainer.observe.metrics import Row, history
from trainer.recipe import GROUPS, Recipe, Stage
from trainer.resolve import load_recipe, resolved

SAMPLING_STAGES = ("sft", "dpo")


@dataclass(frozen=True)
class StageFacts:
    name: str
    stage: Stage
    result: StageResult
    rows: list[Row]
    plan: dict[str, Any]
    """plan.json; empty where it is gone."""
    held_out: dict[str, Any]
    """What is left out of the held-out sources, as plan.json says it; empty where none is measured."""
    events: list[dict[str, Any]]
    """Of all attempts, in order."""
    mlflow_run_id: str | None = None
    """As it is known now: MLflow may have answered after a short stage's result was written."""

    @property
    def freeze(self) -> dict[str, str]:
        return {group: "trained" if getattr(self.stage.train, group) else "frozen" for group in GROUPS}

    @property
    def frozen_unchanged(self) -> bool:
        rows = [row for row in self.result.freeze_table if row.state != "trained"]
        return all(row.digest_before == row.digest_after for row in rows)

    @property
    def trained_changed(self) -> bool:
        rows = [row for row in self.result.freeze_table if row.state == "trained"]
        return bool(rows) and all(row.digest_before != row.digest_after for row in rows)


@dataclass(frozen=True)
class Facts:
    out: str
    recipe: Recipe
    digest: str
    init: StageResult | None
    stages: list[StageFacts]
    sampling: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> selection.json."""
    funnel: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    wall_s: float = 0.0


def read_facts(out: str) -> Facts:
    """Whatever the run has so far; parts that are not there yet are empty."""
    recipe = load_recipe(storage.join(out, "recipe.json"))
    evaluation = _json(out, "evaluate", "evaluation.json")
    shown = [entry["picture"] for entry in evaluation.get("pictures", [])]
    init = _result(out, handover.INIT)
    stages = [found for name, stage in recipe.stages.named().items() if (found := _stage(out, name, stage))]
    return Facts(
        out=out,
        recipe=recipe,
        digest=resolved(recipe)["sha256"],
        init=init,
        stages=stages,
        sampling={
            name: found for name in SAMPLING_STAGES if (found := _json(out, f"prepare-{name}", "selection.json"))
        },
        funnel=_json(out, "data", "funnel.json"),
        evaluation=evaluation,
        export=_json(out, "export", "export.json"),
        pictures={name: storage.read_bytes(storage.join(out, "evaluate", name)) for name in shown},
        wall_s=_wall_s(out, [result for result in (init, *(one.result for one in stages)) if result]),
    )


def _json(out: str, *parts: str) -> dict[str, Any]:
    try:
        return storage.read_json(storage.join(out, *parts))
    except FileNotFoundError:
        return {}


def _result(out: str, stage: str) -> StageResult | None:
    try:
        return handover.read(out, stage, verify="none")
    except FileNotFoundError:
        return None


def _stage(out: str, name: str, stage: Stage) -> StageFacts | None:
    result = _result(out, name)
    if result is None:
        return None
    uri = storage.join(out, name)
    manifest = manifests.newest(uri)
    rows = history(uri, manifest) if manifest is not None else []
    run_id = result.mlflow_run_id or tracking.run_id(uri)
    plan, held_out = _json(uri, "plan", "plan.json"), _held_out(uri) if stage.held_out_packs else {}
    return StageFacts(name, stage, result, rows, plan, held_out, _events(uri), run_id)


def _held_out(stage_uri: str) -> dict[str, Any]:
    """Outputs of before have the held-out plan alone, without the sources of which nothing fits."""
    return _json(stage_uri, "plan", HELD_OUT) or _json(stage_uri, "plan", "held_out", "plan.json")


def _events(stage_uri: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    folder = storage.join(stage_uri, "attempts")
    for attempt in storage.list_dir(folder):
        names = storage.list_dir(storage.join(folder, attempt))
        for name in names:
            if name.startswith("events") and name.endswith(".jsonl"):
                lines = storage.read_bytes(storage.join(folder, attempt, name)).decode().splitlines()
                found += [json.loads(line) for line in lines if line.strip()]
    return found


def _wall_s(out: str, results: list[StageResult]) -> float:
    """Seconds that all attempts of `qwenvl run` have taken, this one until now; where none was recorded (a cluster,
    where steps run side by side), the seconds that the programs took."""
    session = Session.of_environment()
    total = spent.total_s(out, session.name if session else None)
    return total if total is not None else round(sum(result.wall_s for result in results), 3)


# ---------------------------------------------------------------- run.json


def run_json(facts: Facts) -> dict[str, Any]:
    """The run for programs; keys are a contract."""
    return {
        "recipe": facts.recipe.name,
        "digest": facts.digest,
        "wall_s": facts.wall_s,
        "stages": [stage_json(stage) for stage in facts.stages],
        "export": _export(facts),
        "evaluation": facts.evaluation.get("evaluation", {}),
        "media_matter": facts.evaluation.get("media_matter", {}),
        "warnings": [{"field": field, "message": message} for field, message in warnings(facts)],
    }


def warnings(facts: Facts) -> list[tuple[str, str]]:
    """(field of the recipe, message) of what went well and lost something: sources, also held-out ones, that lose much
    to packing, and sources that no step uses."""
    return [told for stage in facts.stages for plan in (stage.plan, stage.held_out) if plan for told in cautions(plan)]


def _export(facts: Facts) -> dict[str, Any] | None:
    if not facts.export:
        return None
    names = ("stage", "model", "result")
    return {"uri": "export", "num_files": len(facts.export["files"]), **{name: facts.export[name] for name in names}}


def stage_json(facts: StageFacts) -> dict[str, Any]:
    result, metrics = facts.result, facts.result.metrics
    found = {
        "name": facts.name,
        "freeze": facts.freeze,
        "packing_length": facts.stage.packing.length,
        "patch_budget": facts.stage.packing.patch_budget,
        "world_size": result.world_size,
        **{name: metrics.get(name) for name in ("steps", "tokens", "target_tokens", "padding_tokens", "fill")},
        "loss_first": metrics.get("loss_first"),
        "loss_last": metrics.get("loss_last"),
        "frozen_unchanged": facts.frozen_unchanged,
        "trained_changed": facts.trained_changed,
        "checkpoint": result.checkpoint,
        "plan_digest": result.plan_digest,
        "resumed_from": metrics.get("resumed_from"),
        "mlflow_run_id": facts.mlflow_run_id,
    }
    if facts.stage.dpo is not None:
        found |= {"accuracy": metrics.get("accuracy_last"), "margin": metrics.get("margin_last")}
    return found

"""The end of a stage: the model in Hugging Face layout, the freeze proof, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist

from trainer import handover, storage
from trainer import manifest as manifests
from trainer.errors import CheckpointError
from trainer.handover import FreezeRow, StageResult
from trainer.heartbeat import utc
from trainer.manifest import Change
from trainer.models import freeze, hub
from trainer.models.family import Family
from trainer.observe.metrics import Row, history
from trainer.resolve import resolved, stage_digest, stage_fields
from trainer.step.asked import Job
from trainer.step.inputs import Inputs
from trainer.step.packed import PackedModel


@dataclass(frozen=True)
class Weights:
    """What the stage began with: the freeze proof compares with it."""

    plan: freeze.FreezePlan
    read: Mapping[str, str]
    """Digests of every tensor as the parent stored it."""
    frozen: Mapping[str, str]
    """Of this rank's part of each frozen parameter."""
    masters: Mapping[str, str]
    """Of this rank's fp32 masters."""


def weights_of(
    packed: PackedModel, engine: Any, plan: freeze.FreezePlan, family: Family, *, read: Mapping[str, str]
) -> Weights:
    """Taken while the engine holds the parent's weights, before a checkpoint replaces them. No communication.

    Raises:
        FreezeError: the optimizer does not hold exactly what the stage trains.
    """
    freeze.check_optimizer(plan, engine, hub_names(family))
    frozen = freeze.frozen_digests(packed.model, plan, family)
    return Weights(plan, read, frozen, masters=freeze.master_digests(engine))


def freeze_table(
    before: Weights, packed: PackedModel, engine: Any, inputs: Inputs, saved: hub.Saved
) -> list[FreezeRow]:
    """The proof, from memory and from the stored tensors. Every rank calls it.

    Raises:
        FreezeError: a frozen parameter changed, or a trained one did not move.
    """
    hub_name = hub_names(inputs.family)
    freeze.check_optimizer(before.plan, engine, hub_name)
    now = freeze.frozen_digests(packed.model, before.plan, inputs.family)
    return freeze.prove(
        before.plan,
        sizes=sizes_of(packed, inputs),
        read=before.read,
        handed_over=saved.digests,
        changed_in_memory=changed_in_memory(before.frozen, now),
        moved=freeze.moved(engine, before.masters, freeze.trained_names(before.plan), hub_name),
    )


def hub_names(family: Family) -> freeze.HubName:
    """Of parameters as a PackedModel names them."""
    return lambda name: family.hub_name(name.removeprefix("model."))


def changed_in_memory(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """Frozen parameters of which any rank's part changed. Every rank calls it."""
    mine = {name for name in before if before[name] != after.get(name)}
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return set().union(*everyone)


def save_model(job: Job, inputs: Inputs, packed: PackedModel, plan: freeze.FreezePlan) -> hub.Saved:
    """OUT/STAGE/model: trained groups gathered, frozen ones copied. Every rank calls it."""
    uri = storage.join(job.uri, "model")
    if inputs.mesh.rank == 0:
        storage.remove_tree(uri)  # what an attempt that died here left
    dist.barrier()
    return hub.save(
        packed.model,
        uri,
        inputs.family,
        dtype=inputs.handover_dtype,
        file_bytes=job.recipe.export.file_bytes,
        parent=(inputs.parent_uri, inputs.parent.model.files),
        frozen_groups=freeze.frozen_groups(plan),
    )


def sizes_of(packed: PackedModel, inputs: Inputs) -> dict[str, int]:
    """Hub name -> elements."""
    parameters = hub.parameters_by_hub_name(packed.model, inputs.family)
    return {name: prod(hub.shape_of(parameter)) for name, parameter in parameters.items()}


def result_of(
    job: Job,
    inputs: Inputs,
    saved: hub.Saved,
    table: Sequence[FreezeRow],
    changes: tuple[Change, ...],
    *,
    held_out: tuple[Mapping[str, float], Mapping[str, float]],
    resumed_from: int | None,
    mlflow_run_id: str | None,
    wall_s: float,
) -> StageResult:
    """What is handed to the next stage; figures come from the metrics committed with the last checkpoint."""
    manifest = _last_checkpoint(job, inputs)
    rows = history(job.uri, manifest)
    parent = inputs.parent
    return StageResult(
        stage=job.name,
        recipe_sha256=resolved(job.recipe)["sha256"],
        resolved_stage=stage_fields(job.recipe, job.stage),
        stage_digest=stage_digest(job.recipe, job.stage, parent_model=parent.model.digest, data=inputs.data_digest),
        accepted_changes=changes,
        parent=handover.Parent(stage=parent.stage, digest=handover.result_digest(parent)),
        model=handover.Model(uri=f"{job.name}/model", files=saved.files, digest=handover.model_digest(saved.files)),
        plan_digest=inputs.plan.digest,
        data_digest=inputs.data_digest,
        checkpoint=manifests.manifest_uri(job.name, manifest.step),
        checkpoint_digest=manifests.digest(manifest),
        freeze_table=tuple(table),
        init_origin=parent.init_origin,
        metrics=_figures(inputs, rows) | {
            "held_out_before": dict(held_out[0]), "held_out_after": dict(held_out[1]), "resumed_from": resumed_from,
            "left_out": manifest.extra.get("left_out", {}),
        },
        attempts=job.attempt,
        world_size=inputs.mesh.world_size,
        mlflow_run_id=mlflow_run_id,
        wall_s=round(wall_s, 3),
        finished_at=utc(),
    )  # fmt: skip


def _last_checkpoint(job: Job, inputs: Inputs) -> manifests.Manifest:
    """
    Raises:
        CheckpointError: it is gone, or of another step than the plan's last.
    """
    manifest, want = manifests.newest(job.uri), inputs.plan.num_steps
    if manifest is None or manifest.step != want:
        raise CheckpointError(
            "the stage's last step has no checkpoint",
            where=manifests.folder(job.uri),
            expected=f"step {want}, committed by this attempt",
            got="no checkpoint" if manifest is None else f"step {manifest.step} is the newest",
            do="somebody removed it, or another run lives in this output: run the stage again, alone",
        )
    return manifest


def _figures(inputs: Inputs, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of the whole stage. First and last are means over the first and last tenth of the logged steps."""
    plan, tenth = inputs.plan, max(1, len(rows) // 10)
    found: dict[str, Any] = {
        "steps": plan.num_steps,
        "packs": plan.num_packs,
        "packing_length": plan.length,
        "patch_budget": plan.patch_budget,
        "tokens": plan.statistics["tokens"],
        "target_tokens": plan.statistics["targets"],
        "padding_tokens": plan.statistics["padding_tokens"],
        "patches": plan.statistics["patches"],
        "fill": plan.fill,
        "read_amplification": plan.statistics.get("read_amplification", 0.0),
        "skip_samples": list(inputs.skips),
        "held_out_samples": inputs.held_out.statistics["samples"] if inputs.held_out is not None else 0,
    }
    for name in ("loss", "accuracy", "margin"):
        if rows and name in rows[0].values:
            found[f"{name}_first"] = _mean(rows[:tenth], name)
            found[f"{name}_last"] = _mean(rows[-tenth:], name)
    for name in ("tokens_per_s", "step_s", "data_wait_s", "balance.vision", "balance.llm", "mfu"):
        if rows and name in rows[-1].values:
            found[name] = _mean(rows[len(rows) // 10 :], name)
    return found


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [row.values[name] for row in rows if name in row.values]
    return sum(values) / max(1, len(values))


def leave_together() -> None:
    """No rank ends before all are done: an elastic job counts as succeeded when any worker exits with 0."""
    dist.barrier()
    dist.destroy_process_group()

"""What a stage starts from: its plan, its parent's model, the family, and the model built from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer import handover, storage
from trainer.data.layout import Rules, stage_rules
from trainer.data.loader import Loader
from trainer.data.plan import Plan, assign
from trainer.data.tokenizer import Tokenizer
from trainer.errors import PlanError, StageMismatch
from trainer.handover import StageResult
from trainer.manifest import Change, Manifest
from trainer.models import freeze, hub
from trainer.models.config import tokenizer_uri
from trainer.models.family import Family, Parts, load_family, parts_of
from trainer.recipe import SAMPLED
from trainer.resolve import resolved, stage_digest, stage_fields
from trainer.state.upload import Identity
from trainer.step import attention, reference
from trainer.step.asked import Job
from trainer.step.dpo import preference
from trainer.step.engine import evaluate, sharded, zero_config
from trainer.step.mesh import Mesh
from trainer.step.packed import Pack, PackedModel, place, token_sum
from trainer.step.preflight import same_everywhere, versions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STAGE_FILE = "stage.json"
Place = Callable[[Any], Pack]


@dataclass(frozen=True)
class Inputs:
    mesh: Mesh
    plan: Plan
    held_out: Plan | None
    rules: dict[str, Rules]
    out: str
    parent: StageResult
    parent_uri: str
    """Of its model folder."""
    family: Family
    parts: Parts
    """The family's torch module."""
    skips: tuple[str, ...]
    """SOURCE/ID of samples that are left out."""
    zero_config: dict[str, Any]
    compute_dtype: torch.dtype
    handover_dtype: torch.dtype

    def loader(self, *, start_step: int = 0, plan: Plan | None = None) -> Loader:
        """Of this rank's group; the stage's skipped samples are left out, of held-out data, too."""
        return Loader(
            plan or self.plan,
            self.out,
            self.rules,
            group=self.mesh.group,
            num_groups=self.mesh.num_groups,
            start_step=start_step,
            skips=self.skips,
        )

    def group_of(self, name: str) -> str:
        """Module group of a parameter of the PackedModel."""
        return self.family.group_of(name.removeprefix("model."))

    @property
    def data_digest(self) -> str:
        return self.plan.header["facts"]["data_digest"]


def read_inputs(job: Job, mesh: Mesh) -> Inputs:
    """Plan, parent and family; ranks are compared with each other.

    Raises:
        UsageError: the parent is not finished, or ranks differ. StageMismatch: the parent is stale.
        PlanError: there is no plan, or it has fewer lanes than there are groups.
    """
    plan = Plan.read(storage.join(job.uri, "plan"))
    held_out_uri = storage.join(job.uri, "plan", "held_out")
    held_out = Plan.read(held_out_uri) if storage.exists(storage.join(held_out_uri, "plan.json")) else None
    parent = handover.lineage(job.recipe, job.out, job.name)[-1]
    parent_uri = handover.model_uri(job.out, parent.model.uri)
    config = storage.read_json(storage.join(parent_uri, "config.json"))
    family = load_family(job.recipe.family, config, tokens_per_second=job.recipe.model.tokens_per_second)
    tokenizer = Tokenizer.load(tokenizer_uri(job.recipe, job.out))
    check_planned(job, plan)
    if plan.num_steps == 0:
        raise PlanError("the plan has no step", where=plan.uri, do="give the stage more data, or fewer packs_per_step")
    inputs = Inputs(
        mesh=mesh,
        plan=plan,
        held_out=held_out if held_out is not None and held_out.num_steps and job.stage.held_out_packs else None,
        rules=stage_rules(job.recipe, job.stage, family, tokenizer),
        out=job.out,
        parent=parent,
        parent_uri=parent_uri,
        family=family,
        parts=parts_of(family),
        skips=tuple(job.stage.skip_samples),
        zero_config=zero_config(job.stage, len(assign(plan, 0, mesh.num_groups)[0])),
        compute_dtype=DTYPES[job.stage.compute.precision],
        handover_dtype=DTYPES[job.recipe.export.dtype],
    )
    same_everywhere(
        {
            "recipe": resolved(job.recipe)["sha256"],
            "plan": plan.digest,
            "parent": parent.model.digest,
            "attempt": job.attempt,
            **versions(),
        }
    )
    return inputs


def check_planned(job: Job, plan: Plan) -> None:
    """The plan was made for this stage as it is asked for; what samples are laid out by, the loader compares.

    Raises:
        PlanError: another mixture, length, step or seed: a stage by hand after a change, without its preparation.
    """
    facts, schedule = plan.header["facts"], job.stage.schedule
    asked = {
        "schedule.steps": schedule.steps,
        "schedule.tokens": schedule.tokens,
        "schedule.packs_per_step": schedule.packs_per_step,
        "seed": job.recipe.seed,
        **{f"data.{name}": weight for name, weight in job.stage.data.items() if name != SAMPLED},
    }
    planned = {
        **{f"schedule.{name}": value for name, value in facts["schedule"].items()},
        "schedule.packs_per_step": plan.packs_per_step,
        "seed": plan.header["seed"],
        **{f"data.{name}": weight for name, weight in facts["weights"].items() if name != SAMPLED},
    }
    if other := sorted(name for name in asked.keys() | planned.keys() if asked.get(name) != planned.get(name)):
        raise PlanError(
            "the plan was made for other settings",
            where=plan.uri,
            expected=", ".join(f"{name} {asked.get(name)}" for name in other),
            got=", ".join(f"{name} {planned.get(name)}" for name in other),
            do=f"prepare {job.name} again; one that has begun keeps its plan: undo the change, or use another output",
        )


def claim(job: Job, inputs: Inputs, manifest: Manifest | None) -> tuple[Change, ...]:
    """Write what this stage learns from into OUT/STAGE/stage.json at its first step; later, compare. All ranks.

    A stage begins with its first committed checkpoint: before that, stage.json is written anew. From then on its steps
    are steps of one plan, and its weights have one parent; no accepted change covers another one.

    Returns:
        Accepted changes since the stage began, in order, each with the step after which it holds. One that a checkpoint
        records need not be accepted again.

    Raises:
        StageMismatch: a result field, the plan or the parent differs from those that the stage began with.
    """
    uri = storage.join(job.uri, STAGE_FILE)
    asked = {
        "fields": stage_fields(job.recipe, job.stage),
        "plan": inputs.plan.digest,
        "parent": inputs.parent.model.digest,
    }
    begins = manifest is None or not storage.exists(uri)
    stored = asked if begins else storage.read_json(uri)
    changes = compared(stored, asked, manifest, where=uri, accept=job.accept)
    dist.barrier()  # everyone has read before anyone writes
    if begins and inputs.mesh.rank == 0:
        storage.write_json(uri, asked)
    return changes


def compared(
    stored: Mapping[str, Any], asked: Mapping[str, Any], manifest: Manifest | None, *, where: str, accept: Iterable[str]
) -> tuple[Change, ...]:
    """What the checkpoint records as accepted, and what is accepted now, between a stored stage.json and the one asked
    for.

    Raises:
        StageMismatch: a field differs that was not accepted, or the plan or the parent differs.
    """
    for name in ("plan", "parent"):
        if stored[name] != asked[name]:
            raise StageMismatch(
                f"the stage has begun with another {name}",
                where=where,
                expected=f"{name} {stored[name]} (stored)",
                got=f"{name} {asked[name]} (asked for)",
                do="bring back the recipe and data of before (no --accept-change covers another plan or parent), use "
                "another output, or remove the stage's folder to begin it again",
            )
    earlier, step = (manifest.accepted_changes, manifest.step) if manifest is not None else ((), 0)
    before = {**stored["fields"], **{change.field: change.asked for change in earlier}}
    return (*earlier, *handover.compare(before, asked["fields"], where=where, accept=accept, step=step))


def identity_of(job: Job, inputs: Inputs, changes: tuple[Change, ...]) -> Identity:
    digest = stage_digest(job.recipe, job.stage, parent_model=inputs.parent.model.digest, data=inputs.data_digest)
    return Identity(
        stage=job.name,
        attempt=job.attempt,
        stage_digest=digest,
        plan_digest=inputs.plan.digest,
        base_model_digest=inputs.parent.model.digest,
        accepted_changes=changes,
    )


# ---------------------------------------------------------------- model


def build_model(job: Job, inputs: Inputs, device: torch.device) -> tuple[PackedModel, freeze.FreezePlan, hub.Digests]:
    """The parent's weights in a sharded model, with the stage's freeze configuration and objective.

    Raises:
        ModelError: a file is damaged, or its tensors are not those of the config.
    """
    family = inputs.family
    with sharded(inputs.zero_config):
        model = inputs.parts.build(
            family.export_config(), dtype=inputs.compute_dtype, attn_implementation=attention.NAME, init=False
        )
    if inputs.mesh.rank == 0:
        choice = attention.chosen(device, inputs.compute_dtype)
        print(f"attention: {choice.name}, {choice.reason}", flush=True)
    files = inputs.parent.model.files
    digests = hub.load(model, inputs.parent_uri, family, files=files, dtype=inputs.handover_dtype)
    plan = freeze.freeze_plan([name for name, _ in model.named_parameters()], family, job.stage.train)
    freeze.apply(model, plan, family)
    if job.stage.compute.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = preference(job.stage.dpo) if job.stage.dpo else token_sum
    packed = PackedModel(model, inputs.parts, mean=family.image_mean, std=family.image_std, objective=objective)
    return packed.to(device) if device.type == "cuda" else packed, plan, digests


def placer(packed: PackedModel, device: torch.device, *, known: reference.Reference | None = None) -> Place:
    """Batch -> pack on the device, with the reference of its pairs."""
    return lambda batch: place(batch, packed, device, reference=known)


def references(
    job: Job, inputs: Inputs, engine: Any, device: torch.device
) -> tuple[reference.Reference | None, reference.Reference | None]:
    """dpo: log-probabilities of the plan's and the held-out plan's pairs under the weights of now; else None."""
    if job.stage.dpo is None:
        return None, None
    found = []
    for plan, name in ((inputs.plan, reference.NAME), (inputs.held_out, f"held_out.{reference.NAME}")):
        if plan is None:
            found.append(None)
            continue
        key = reference.key_of(plan.digest, inputs.parent.model.digest, inputs.skips)
        found.append(
            reference.reference_for(
                engine,
                storage.join(job.uri, name),
                key,
                lambda plan=plan: inputs.loader(plan=plan),
                placer(engine.module, device),
            )
        )
    return found[0], found[1]


def held_out_loss(job: Job, inputs: Inputs, engine: Any, held_place: Place) -> dict[str, float]:
    """Mean loss on the held-out plan (dpo: also accuracy and margin); empty without one."""
    if inputs.held_out is None:
        return {}
    count = "pairs" if job.stage.dpo else "target tokens"
    loader = inputs.loader(plan=inputs.held_out)
    totals: dict[str, float] = {}
    try:
        for step in loader:
            sums = evaluate(engine, [held_place(batch) for batch in step.batches], count)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
    finally:
        loader.close()
    number = max(1.0, totals["counted"])
    return means(totals, number) | {"count": totals["counted"]}


def means(sums: dict[str, float], number: float) -> dict[str, float]:
    """Loss, and for pairs accuracy and margin, from sums over `number` target tokens or pairs."""
    found = {"loss": sums["loss_sum"] / number}
    if "correct" in sums:
        found |= {"accuracy": sums["correct"] / number, "margin": sums["margin_sum"] / number}
    return found

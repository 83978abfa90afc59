"""The plan of a stage: counts of its sources, then packs, steps and lanes; and the same for what is held out.

    prepare_stage(recipe, "stage1", out)     OUT/stage1/plan/ and OUT/stage1/plan/held_out/
    python -m pipelines.prepare prepare-stage --recipe tiny --stage stage1 --out DIR

A plan is made once. Asked again it is recognised by its facts; a stage that has begun keeps its plan, and a recipe that
would need another one is an error.
"""

from __future__ import annotations

import time
from typing import Any

from pipelines.prepare.count import Counter, family_facts
from pipelines.prepare.ingest import source_uri
from trainer import storage
from trainer.data.mixture import SourceCounts
from trainer.data.plan import Order, Plan, make_plan
from trainer.data.shards import Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import PlanError, StageMismatch, UsageError
from trainer.models.config import family_of, tokenizer_uri
from trainer.recipe import SAMPLED, Recipe, Stage
from trainer.resolve import digest

Json = dict[str, Any]


def prepare_stage(recipe: Recipe, stage: str, out: str) -> Plan:
    """Counts and plans of one stage; returns the training plan.

    Raises:
        ShardError: a source of the mixture is not prepared. PlanError: nothing fits. StageMismatch: the stage has begun
        with another plan.
    """
    named = recipe.stages.named()
    if stage not in named:
        raise UsageError("the recipe has no such stage", where=stage, expected=", ".join(named))
    started = time.monotonic()
    counter = Counter(recipe, stage, out)
    target = storage.join(out, stage, "plan")
    plan = _make(recipe, stage, "train", counter, target)
    if named[stage].held_out_packs and _folders(recipe, stage, "held_out", out):
        _make(recipe, stage, "held_out", counter, storage.join(target, "held_out"))
    print(f"plan: {stage} done ({time.monotonic() - started:.1f} s, {counter.tokenised} samples tokenised)", flush=True)
    return plan


def sampled_name(stage: str) -> str:
    """The source that prepare-STAGE selected: sampled-sft, sampled-dpo."""
    return f"{SAMPLED}-{stage}"


def _folders(recipe: Recipe, stage: str, split: str, out: str) -> dict[str, str]:
    """Mixture name -> folder of the source, for those that have this split and a sample in it."""
    found = {}
    for name in recipe.stages.named()[stage].data:
        folder = sampled_name(stage) if name == SAMPLED else name
        if split == "held_out" and (name == SAMPLED or recipe.prepare.sources[name].held_out is None):
            continue
        if name == SAMPLED and not Source.open(source_uri(out, folder, split)).num_samples:
            print(f"plan: {stage} goes on without {SAMPLED}: no answer was kept", flush=True)
            continue
        found[name] = folder
    return found


def _kind(recipe: Recipe, stage: str, name: str) -> str:
    if name == SAMPLED:
        return "preference" if stage == "dpo" else "instruction"
    return recipe.prepare.sources[name].kind


def _facts(recipe: Recipe, stage: str, split: str, folders: dict[str, str], out: str) -> Json:
    """What the plan depends on: equal facts, equal plan."""
    config = recipe.stages.named()[stage]
    data = {name: Source.open(source_uri(out, folder, split)).digest for name, folder in folders.items()}
    family = family_of(recipe, out)
    return {
        "stage": stage,
        "split": split,
        "family": family_facts(family),
        "tokens_per_second": getattr(family, "tokens_per_second", None),
        "tokenizer": Tokenizer.load(tokenizer_uri(recipe, out)).digest,
        "data": data,
        "data_digest": digest(data),
        "weights": {name: config.data[name] if split == "train" else 1.0 for name in folders},
        "renderings": {name: "chat" if name == SAMPLED else recipe.prepare.sources[name].rendering for name in folders},
        "pixels": config.pixels.model_dump(mode="json"),
        "packing": config.packing.model_dump(mode="json"),
        "schedule": {"steps": config.schedule.steps, "tokens": config.schedule.tokens} if split == "train" else {},
        "max_packs": config.held_out_packs if split == "held_out" else None,
        "variants": recipe.prepare.variants,
        "window_shards": recipe.prepare.window_shards,
    }


def _order(recipe: Recipe, config: Stage, split: str, facts: Json) -> Order:
    train = split == "train"
    lanes = recipe.prepare.lanes
    return Order(
        length=config.packing.length,
        patch_budget=config.packing.patch_budget,
        lanes=lanes,
        packs_per_step=config.schedule.packs_per_step if train else lanes,
        seed=recipe.seed,
        steps=config.schedule.steps if train else None,
        tokens=config.schedule.tokens if train else None,
        max_packs=None if train else config.held_out_packs,
        window_shards=recipe.prepare.window_shards,
        facts=facts,
    )


def _make(recipe: Recipe, stage: str, split: str, counter: Counter, target: str) -> Plan:
    out, config = counter.out, recipe.stages.named()[stage]
    folders = _folders(recipe, stage, split, out)
    facts = _facts(recipe, stage, split, folders, out)
    order = _order(recipe, config, split, facts)
    stored = _stored(target, order)
    if stored is not None:
        print(f"plan: {stage} {split} is already there ({stored.num_steps} steps)", flush=True)
        return stored
    _refuse_if_begun(out, stage, split)
    counts = [
        counter.count(
            name,
            f"data/sources/{folder}/{split}",
            kind=_kind(recipe, stage, name),
            split=split,
            weight=facts["weights"][name],
        )
        for name, folder in folders.items()
    ]
    counts = [source for source in counts if split == "train" or (source.fit >= 0).any()]
    if not counts:
        raise PlanError("the stage has no data", where=f"stages.{stage}.data", got=f"{sorted(config.data)} ({split})")
    plan = make_plan(counts, order)
    plan.write(target)
    _print(plan, stage, split, counts)
    return plan


def _stored(target: str, order: Order) -> Plan | None:
    """The stored plan when it was made from the same facts and order."""
    if not storage.exists(storage.join(target, "plan.json")):
        return None
    plan = Plan.read(target)
    same = plan.header["facts"] == dict(order.facts) and all(
        plan.header[name] == getattr(order, name)
        for name in ("length", "patch_budget", "lanes", "packs_per_step", "seed")
    )
    return plan if same else None


def _refuse_if_begun(out: str, stage: str, split: str) -> None:
    """A begun stage keeps its plan: its checkpoints say `step` of that plan."""
    target = storage.join(out, stage, "plan", *([] if split == "train" else ["held_out"]), "plan.json")
    begun = storage.exists(target) and storage.list_dir(storage.join(out, stage, "checkpoints"))
    if begun:
        raise StageMismatch(
            "the stage has begun with another plan",
            where=target,
            expected="the recipe and data that it was begun with",
            got="a recipe or data that need another plan",
            do=f"use the recipe of before, another output, or remove {storage.join(out, stage)} to begin again",
        )


def _print(plan: Plan, stage: str, split: str, counts: list[SourceCounts]) -> None:
    """Fill, and what each source gives and loses."""
    facts = plan.statistics
    print(
        f"plan: {stage} {split}: {plan.num_steps} steps, {plan.num_packs} packs of {plan.length} tokens, "
        f"fill {facts['fill']:.2%}, patches {facts['patch_fill']:.0%} of {plan.patch_budget}, "
        f"{facts['epochs']} epochs, node cache {facts['node_cache_bytes'] / 1e6:.0f} MB",
        flush=True,
    )
    print(
        f"  {'source':<14}{'samples':>9}{'uses':>9}{'tokens':>11}{'targets':>10}{'patches':>10}{'fitted':>8}  dropped"
    )
    for row in plan.sources:
        drops = ", ".join(f"{count} {reason}" for reason, count in row["drops"].items()) or "-"
        print(
            f"  {row['name']:<14}{row['num_samples']:>9}{row['uses']:>9}{row['tokens']:>11}{row['targets']:>10}"
            f"{row['patches']:>10}{row['fitted']:>8}  {drops}",
            flush=True,
        )

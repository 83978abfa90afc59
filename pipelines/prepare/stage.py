"""The plan of a stage: counts of its sources, then packs, steps and lanes; and the same for what is held out.

    prepare_stage(recipe, "stage1", out)     OUT/stage1/plan/ and OUT/stage1/plan/held_out/
    python -m pipelines.prepare prepare-stage --recipe tiny --stage stage1 --out DIR

A plan is made once. Asked again it is recognised by its facts; a stage that has begun keeps its plan, and a recipe that
would need another one is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.prepare.count import Counter, family_facts, natural, rules_for, rules_ref
from pipelines.prepare.ingest import source_uri
from pipelines.prepare.pairs import check_used_once
from trainer import cache, storage
from trainer.data import kept
from trainer.data.drops import HELD_OUT, much_left_out, unused
from trainer.data.layout import REASONS, Rules
from trainer.data.mixture import SourceCounts, drops_of
from trainer.data.plan import Order, Plan, make_plan, refuse_unfit
from trainer.data.shards import Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import PlanError, StageMismatch, UsageError
from trainer.fields import identity
from trainer.models.cautions import stage_cautions
from trainer.models.config import family_of, tokenizer_uri
from trainer.recipe import SAMPLED, Recipe, Stage
from trainer.resolve import digest

Json = dict[str, Any]
SIZES_OF = 64
"""Samples that do not fit whose own size is looked at for a warning: 64 tell a median, and take a moment."""


def prepare_stage(recipe: Recipe, stage: str, out: str) -> Plan:
    """Counts and plans of one stage; returns the training plan.

    Raises:
        ShardError: a source of the mixture is not prepared. PlanError: nothing fits, or a preference pair is used more
        than once. StageMismatch: the stage has begun with another plan.
    """
    named = recipe.stages.named()
    if stage not in named:
        raise UsageError("the recipe has no such stage", where=stage, expected=", ".join(named))
    started = time.monotonic()
    _check_skips(recipe, stage, out)
    for field, caution in stage_cautions(family_of(recipe, out), named[stage].pixels):
        print(f"plan: warning: stages.{stage}.{field}: {caution}", flush=True)
    counter = Counter(recipe, stage, out)
    target = storage.join(out, stage, "plan")
    plan = _make(recipe, stage, "train", counter, target)
    if named[stage].held_out_packs and _folders(recipe, stage, "held_out", out):
        _make(recipe, stage, "held_out", counter, storage.join(target, "held_out"))
    assert plan is not None
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
    data = {name: kept.data_digest(Source.open(source_uri(out, folder, split))) for name, folder in folders.items()}
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
        "pixels": identity(config.pixels),
        "packing": identity(config.packing),
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


def _make(recipe: Recipe, stage: str, split: str, counter: Counter, target: str) -> Plan | None:
    """The plan of one split; None when nothing of what is held out fits, which is told and is no error: a user's own
    data may have no such part, and the stage then goes on without a held-out loss."""
    out, config = counter.out, recipe.stages.named()[stage]
    folders = _folders(recipe, stage, split, out)
    facts = _facts(recipe, stage, split, folders, out)
    order = _order(recipe, config, split, facts)
    rules = {name: rules_for(rules_ref(recipe, stage, name, out)).digest for name in folders}
    stored = _stored(target, order, rules)
    if stored is not None:
        _refuse_unbalanced(stored, config, stage, split)
        _refuse_unreached(stored, config, stage, split)
        print(f"plan: {stage} {split} is already there ({stored.num_steps} steps)", flush=True)
        _warn((_header_of_all(out, stage) if split == "held_out" else None) or stored.header)
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
    fitting = [source for source in counts if (source.fit >= 0).any()]
    header = _left_out_of(counts, order)
    if split == "held_out":
        storage.write_json(_held_out_uri(out, stage), header)
    if split == "held_out" and not fitting:
        print(f"plan: {stage} {split}: {_nothing_fits(counts, order)}", flush=True)
        storage.remove_tree(target)  # of a recipe before
        return None
    if not counts:
        raise PlanError(
            "the stage has no data",
            where=f"stages.{stage}.data ({split})",
            expected="a source with samples",
            got=f"{', '.join(sorted(config.data))}, without a sample",
            do="add a source, or give stages.*.sampling more requests",
        )
    known = {source.name: source for source in counts}

    def sizes(name: str) -> str:
        return _sizes(known[name], rules_for(rules_ref(recipe, stage, name, out)), out)

    if split == "train":
        for name in sorted(known.keys() - {source.name for source in fitting}):
            refuse_unfit(known[name], order, sizes(name))
    plan = make_plan(counts if split == "train" else fitting, order)
    _refuse_unbalanced(plan, config, stage, split)
    _refuse_unreached(plan, config, stage, split)
    _refuse_too_large(plan, out, stage)
    if split == "train":
        check_used_once(plan, out, where=f"stages.{stage}")
    plan.write(target)
    _print(plan, stage, split)
    _warn(header if split == "held_out" else plan.header, sizes)
    return plan


def _nothing_fits(counts: list[SourceCounts], order: Order) -> str:
    """What was dropped of each source and why, in one line."""
    dropped = "; ".join(
        f"{source.name}: {len(source.row)} samples, dropped: "
        + (", ".join(f"{count} {reason}" for reason, count in drops_of(source).items()) or "none")
        for source in counts
    )
    return (
        f"no held-out samples fit packs of {order.length} tokens and {order.patch_budget} patches ({dropped}); the "
        "stage goes on without a held-out loss. To have one, raise packing.length or packing.patch_budget, or hold out "
        "shorter samples"
    )


def _refuse_too_large(plan: Plan, out: str, stage: str) -> None:
    """A node whose cache cannot hold what the lanes have open fetches each shard again and again."""
    limit, need = cache.limit_bytes(), plan.statistics["node_cache_bytes"]
    if limit is None or storage.local_path(out) is not None or need <= limit:
        return
    raise PlanError(
        "the plan needs a larger node cache than the cluster has",
        where=f"stages.{stage}",
        expected=f"at most {limit / 1e9:.1f} GB ({cache.BYTES}, from storage.cache.size of the cluster file)",
        got=f"{need / 1e9:.1f} GB of shards open at a time",
        do="lower prepare.window_shards or prepare.lanes, or give nodes a larger cache",
    )


def _refuse_unbalanced(plan: Plan, config: Stage, stage: str, split: str) -> None:
    """The share of the plan's samples without image or video is the recipe's."""
    wanted, known = config.balance, plan.statistics
    if wanted is None or split != "train" or not known["samples"]:
        return
    found = text_samples(plan) / known["samples"]
    if abs(found - wanted.text) <= wanted.tolerance:
        return
    if 0 < found < 1 and 0 < wanted.text < 1:
        factor = wanted.text * (1 - found) / (found * (1 - wanted.text))
        others = f"or those of the others by {1 / factor:.3g}"
        do = f"multiply the weights of the text sources in `data` by {factor:.3g}, {others}"
    else:
        do = f"add a source of {'multimodal samples' if found == 1 else 'text'} to `data`, or change its weight"
    rows = ", ".join(f"{row['name']} {row.get('text_uses', '?')} of {row['uses']}" for row in plan.sources)
    raise PlanError(
        "the mixture of text and multimodal samples is not the recipe's",
        where=f"stages.{stage}.balance",
        expected=f"{wanted.text:.1%} of the samples without image or video, by at most {wanted.tolerance:.1%}",
        got=f"{found:.1%} of {known['samples']} samples; text by source: {rows}",
        do=do,
    )


def _refuse_unreached(plan: Plan, config: Stage, stage: str, split: str) -> None:
    """Text alone gives vision and merger gradients of zero: the proof of the freeze configuration would fail the stage
    after its last step."""
    groups = [group for group in ("vision", "merger") if getattr(config.train, group)]
    known = plan.statistics
    if split != "train" or not groups or known["patches"] or not known["samples"]:
        return
    raise PlanError(
        "the stage trains a group that none of its samples reaches",
        where=", ".join(f"stages.{stage}.train.{group}" for group in groups),
        expected="a sample with an image or a video in the plan",
        got=f"{known['samples']} uses of {', '.join(row['name'] for row in plan.sources)}, all of them text",
        do=f"add a source with pictures to stages.{stage}.data, or set "
        + ", ".join(f"stages.{stage}.train.{group}=false" for group in groups),
    )


def text_samples(plan: Plan) -> int:
    """Uses of samples without image or video in a plan, also one of before these were counted."""
    if "text_samples" in plan.statistics:
        return plan.statistics["text_samples"]
    return sum(place.patches == 0 for pack in range(plan.num_packs) for place in plan.pack(pack).places)


def _check_skips(recipe: Recipe, stage: str, out: str) -> None:
    """Every sample that the stage is to leave out is one of its sources'."""
    asked = recipe.stages.named()[stage].skip_samples
    unknown = set(asked)
    for split in ("train", "held_out") if asked else ():
        for name, folder in _folders(recipe, stage, split, out).items():
            mine = {skip for skip in unknown if skip.startswith(f"{name}/")}
            source = Source.open(source_uri(out, folder, split))
            for shard in range(source.num_shards if mine else 0):
                unknown -= mine & {f"{name}/{known}" for known in source.index(shard)["id"].to_pylist()}
    if unknown:
        raise UsageError(
            "a sample that is to be left out does not exist",
            where=f"stages.{stage}.skip_samples",
            expected="SOURCE/ID as an error names it",
            got=", ".join(sorted(unknown)[:8]),
        )
    if asked:
        print(f"plan: {stage} leaves out {len(asked)} samples: {', '.join(asked[:8])}", flush=True)


def _stored(target: str, order: Order, rules: dict[str, str]) -> Plan | None:
    """The stored plan when it was made from the same facts and order, and by code that lays samples out alike: `rules`
    are digests by source, with the versions of layout and rendering in them."""
    if not storage.exists(storage.join(target, "plan.json")):
        return None
    plan = Plan.read(target)
    same = (
        plan.header["facts"] == dict(order.facts)
        and all(
            plan.header[name] == getattr(order, name)
            for name in ("length", "patch_budget", "lanes", "packs_per_step", "seed")
        )
        and all(row["rules_digest"] == rules.get(row["name"]) for row in plan.sources)
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
            expected="the recipe, data and version of the data code that it was begun with",
            got="a recipe, data or code that need another plan",
            do=f"use those of before, another output, or remove {storage.join(out, stage)} to begin again",
        )


def _print(plan: Plan, stage: str, split: str) -> None:
    """Fill, and what each source gives and loses."""
    facts = plan.statistics
    print(
        f"plan: {stage} {split}: {plan.num_steps} steps, {plan.num_packs} packs of {plan.length} tokens, "
        f"fill {facts['fill']:.2%}, patches {facts['patch_fill']:.0%} of {plan.patch_budget}, "
        f"{facts['epochs']} epochs, node cache {facts['node_cache_bytes'] / 1e6:.0f} MB, a node that runs all lanes "
        f"fetches {facts['fetched_bytes'] / 1e6:.0f} MB, read amplification {facts['read_amplification']:.2f}",
        flush=True,
    )
    numbers = ("num_samples", "uses", "text_uses", "tokens", "targets", "patches", "fitted")
    names = ("samples", "uses", "text", "tokens", "targets", "patches", "fitted")
    print(f"  {'source':<14}{'weight':>8}" + "".join(f"{name:>11}" for name in names) + "  dropped")
    for row in plan.sources:
        drops = ", ".join(f"{count} {reason}" for reason, count in row["drops"].items()) or "-"
        counted = "".join(f"{row[name]:>11}" for name in numbers)
        print(f"  {row['name']:<14}{row['weight']:>8g}{counted}  {drops}", flush=True)


def _warn(header: Json, sizes: Callable[[str], str] = lambda source: "") -> None:
    """Of sources that lose much, or that no step uses; `sizes` tells how large what does not fit of a source is."""
    for field, told in much_left_out(header):
        print(f"plan: warning: {field}: {told}{sizes(field.rpartition('.')[2])}", flush=True)
    for field, told in unused(header):
        print(f"plan: warning: {field}: {told}", flush=True)


def _left_out_of(counts: list[SourceCounts], order: Order) -> Json:
    """What of plan.json says what is left out, also of held-out sources of which nothing fits: these are no part of
    the plan."""
    rows = [
        {"name": source.name, "split": source.split, "num_samples": len(source.row), "drops": drops_of(source)}
        for source in counts
    ]
    facts = {"length": order.length, "patch_budget": order.patch_budget, "facts": dict(order.facts)}
    return {"format": 1, **facts, "sources": rows}


def _held_out_uri(out: str, stage: str) -> str:
    return storage.join(out, stage, "plan", HELD_OUT)


def _header_of_all(out: str, stage: str) -> Json | None:
    """None in an output of before."""
    uri = _held_out_uri(out, stage)
    return storage.read_json(uri) if storage.exists(uri) else None


def _sizes(counts: SourceCounts, rules: Rules, out: str) -> str:
    """Tokens and patches of samples that do not fit, as they are, from some of them, evenly spaced."""
    rows = np.flatnonzero((counts.drop == REASONS.index("over_long")).any(axis=1))
    if not rows.size:
        return ""
    some = rows[:: -(-rows.size // SIZES_OF)]
    source = Source.open(storage.join(out, counts.uri), keep_indexes=1)
    found = []
    for shard, row in zip(counts.shard[some].tolist(), counts.row[some].tolist(), strict=True):
        counted = natural(source.index(shard)["sample_json"][row].as_py(), counts.num_variants, rules)
        found.append((max(counted["tokens"]), max(counted["patches"])))
    tokens, patches = np.array(found).T
    return (
        f". As they are, half of those that do not fit have over {int(np.median(tokens)):,} tokens and "
        f"{int(np.median(patches)):,} patches, the largest {tokens.max():,} and {patches.max():,} "
        f"(of {len(found)} looked at)"
    )

"""Preference pairs are used once each (Qwen2.5-VL report, post-training: DPO goes through its data once): not again in
a second epoch, by a weight above 1, or under another id or source. Checked on the plan, before anything is trained.
"""

from __future__ import annotations

from trainer import storage
from trainer.data.plan import Plan
from trainer.data.sample import Sample, from_json
from trainer.data.shards import Source
from trainer.errors import PlanError
from trainer.resolve import digest

SHOWN = 5


def check_used_once(plan: Plan, out: str, *, where: str) -> int:
    """Number of different pairs in the plan.

    Raises:
        PlanError: a pair is used more than once; names some.
    """
    preference = {number for number, row in enumerate(plan.sources) if row["kind"] == "preference"}
    sources = {number: Source.open(storage.join(out, plan.sources[number]["uri"])) for number in preference}
    seen: dict[str, str] = {}
    again: list[str] = []
    for pack in range(plan.num_packs if preference else 0):
        for place in plan.pack(pack).places:
            if place.source not in preference:
                continue
            sample = from_json(sources[place.source].index(place.shard)["sample_json"][place.row].as_py())
            name = f"{plan.sources[place.source]['name']}/{sample.id}"
            first = seen.setdefault(pair_digest(sample), name)
            if first is not name:
                again.append(name if first == name else f"{name} (the same as {first})")
    if again:
        raise PlanError(
            "preference pairs are used more than once",
            where=where,
            expected=f"{len(seen)} pairs, each of them once",
            got=f"{len(again)} further uses: {', '.join(again[:SHOWN])}{', ...' if len(again) > SHOWN else ''}",
            do="leave schedule.steps and tokens out (one pass) or lower them, keep weights in `data` at 1 or below, "
            "and take out what is there twice: prepare.sources.NAME.curate: {dedup: {exact: true}}",
        )
    return len(seen)


def pair_digest(sample: Sample) -> str:
    """Of what a pair asks, shows, prefers and rejects: not its id, source, key, or where its files came from."""
    content = sample.model_dump(mode="json", include={"messages", "chosen", "rejected"})
    return digest({**content, "media": [media.digest for media in sample.media]})

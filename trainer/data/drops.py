"""What a plan leaves out of a source, and from which share on that is a warning: told when a stage is planned, and in
the report.

    cautions(plan.header)          (field of the recipe, message) of both of these
    much_left_out(plan.header)     of every source that loses much
    unused(plan.header)            of every source that has a weight, samples that fit, and no part in the steps
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.layout import REASONS

HELD_OUT = "held_out_sources.json"
"""Beside plan.json: what of it says what is left out, of every held-out source. A source of which nothing fits is no
part of the held-out plan, which there may not be at all."""

MUCH = 0.1
"""Share of a source's samples from which on what is left out is a warning. Ours: `tiny` loses at most 3 % of a source
(agents in stage2), and a tenth less of a source is a mixture that nobody asked for."""


def cautions(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, message) from plan.json or HELD_OUT."""
    return [*much_left_out(header), *unused(header)]


def unused(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, message) of training sources that steps use nothing of: a pack holds what is alike in cost, so a stage of
    few steps can end before the packs of a source come up. HELD_OUT has no uses."""
    rows = [row for row in header["sources"] if row["split"] == "train" and "uses" in row]
    stage, uses = header["facts"].get("stage", "STAGE"), sum(row["uses"] for row in rows)
    offers = {row["name"]: row["weight"] * (row["num_samples"] - row["num_dropped"]) for row in rows}
    return [
        (
            f"stages.{stage}.data.{row['name']}",
            f"none of its {row['num_samples']:,} samples is in the {header['num_steps']:,} steps; of {uses:,} uses its "
            f"weight of {row['weight']:g} stands for {uses * offers[row['name']] / sum(offers.values()):,.0f}: raise "
            f"stages.{stage}.schedule.steps or its weight, or take it out",
        )
        for row in rows
        if not row["uses"] and offers[row["name"]] > 0
    ]


def much_left_out(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, message) from plan.json or HELD_OUT; what curation has dropped was asked for and is no loss."""
    stage = header["facts"].get("stage", "STAGE")
    found = ((row, lost_of(row)) for row in header["sources"])
    return [
        (f"stages.{stage}.data.{row['name']}", message(row, lost, header))
        for row, lost in found
        if sum(lost.values()) > MUCH * row["num_samples"]
    ]


def lost_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Samples of a source (a row of plan.json) that cannot be used, by reason."""
    return {reason: row["drops"][reason] for reason in REASONS if row["drops"].get(reason)}


def message(row: Mapping[str, Any], lost: Mapping[str, int], header: Mapping[str, Any]) -> str:
    """How many of how many, why, and what would change it."""
    total, split = row["num_samples"], "held-out samples" if row["split"] == "held_out" else "samples"
    count = sum(lost.values())
    told = "; ".join(f"{n:,} {reason}: {_what_to_do(reason, row['name'], header)}" for reason, n in lost.items())
    return f"{count:,} of {total:,} {split} ({count / total:.0%}) are left out, in one variant or in all: {told}"


def _what_to_do(reason: str, source: str, header: Mapping[str, Any]) -> str:
    stage = header["facts"].get("stage", "STAGE")
    packing, pixels = f"stages.{stage}.packing", f"stages.{stage}.pixels"
    policy = header["facts"].get("packing", {}).get("over_long", "shrink")
    smaller = (
        f"lower {pixels}.image_min or {pixels}.min_frames"
        if policy == "shrink"
        else f"let them shrink ({packing}.over_long: shrink)"
    )
    budgets = f"{header['length']:,} tokens and {header['patch_budget']:,} patches of a pack"
    return {
        "over_long": f"they do not fit the {budgets}; raise {packing}.length or .patch_budget, or {smaller}",
        "no_target": "they hold no text that the loss is taken over; give them answers (chat) or text (document), or "
        f"look at prepare.sources.{source}.rendering",
        "aspect": "their pictures are too long for their width for this family; crop them",
        "rendering": "the family cannot show what they hold (videos, a place of pictures or of the system); look at "
        f"prepare.sources.{source}.rendering, or take them out",
    }[reason]

"""What a plan leaves out of its sources is told from a share on, with the reason and the field to change."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.drops import MUCH, cautions, much_left_out, unused


def header(drops: dict[str, int], *, total: int = 100, policy: str = "shrink", split: str = "train") -> dict[str, Any]:
    row = {"name": "mine", "split": split, "num_samples": total, "drops": drops}
    facts = {"stage": "sft", "packing": {"over_long": policy}}
    return {"facts": facts, "length": 512, "patch_budget": 1024, "sources": [row]}


@pytest.mark.parametrize(
    ("drops", "warns"),
    [({}, False), ({"over_long": 10}, False), ({"over_long": 11}, True), ({"over_long": 6, "aspect": 5}, True)],
)
def test_a_warning_begins_above_the_share(drops: dict[str, int], warns: bool) -> None:
    assert MUCH == 0.1
    assert bool(much_left_out(header(drops))) is warns


def test_what_curation_drops_was_asked_for() -> None:
    assert much_left_out(header({"too_blurred": 90})) == []
    [(_, told)] = much_left_out(header({"too_blurred": 80, "no_target": 11}))
    assert told.startswith("11 of 100 samples (11%)")


@pytest.mark.parametrize(
    ("reason", "policy", "want"),
    [
        ("over_long", "shrink", "512 tokens and 1,024 patches of a pack; raise stages.sft.packing.length"),
        ("over_long", "shrink", "lower stages.sft.pixels.image_min"),
        ("over_long", "drop", "stages.sft.packing.over_long: shrink"),
        ("no_target", "shrink", "prepare.sources.mine.rendering"),
        ("aspect", "shrink", "crop them"),
        ("rendering", "shrink", "prepare.sources.mine.rendering"),
    ],
)
def test_each_reason_says_what_to_change(reason: str, policy: str, want: str) -> None:
    [(field, told)] = much_left_out(header({reason: 40}, policy=policy))
    assert field == "stages.sft.data.mine"
    assert f"40 {reason}: " in told and want in told


def test_held_out_samples_are_called_so() -> None:
    [(_, told)] = much_left_out(header({"over_long": 40}, split="held_out"))
    assert "40 of 100 held-out samples (40%)" in told


def test_a_source_without_a_use_is_told_with_what_its_weight_stands_for() -> None:
    def row(name: str, uses: int, weight: float, num_dropped: int = 0) -> dict[str, Any]:
        counts = {"num_samples": 100, "num_dropped": num_dropped, "uses": uses, "drops": {}}
        return {"name": name, "split": "train", "weight": weight, **counts}

    rows = [row("used", 60, 3.0), row("missed", 0, 1.0), row("dropped", 0, 1.0, 100)]
    plan = {"facts": {"stage": "sft"}, "length": 512, "patch_budget": 1024, "num_steps": 2, "sources": rows}
    [(field, told)] = unused(plan)
    assert field == "stages.sft.data.missed" and cautions(plan) == [(field, told)]
    assert told.startswith("none of its 100 samples is in the 2 steps; of 60 uses its weight of 1 stands for 15: raise")

"""The plan: reproducible, well filled, the same for any number of groups, and nothing dropped in silence."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from trainer.data.mixture import Order, SourceCounts, drops_of
from trainer.data.order import id_hash
from trainer.data.packing import Bin, _Open, lower_bound, pack_windows
from trainer.data.plan import EMPTY, Plan, _read_segment, assign, make_plan, step_packs
from trainer.errors import PlanError

ORDER = Order(length=512, patch_budget=1024, lanes=4, packs_per_step=4, seed=1234, steps=12)


def some_counts(name: str, num: int, *, kind: str = "caption", pictures: bool = True, variants: int = 2, **more):
    rng = np.random.default_rng(num)
    patches = np.where(pictures, 4 * rng.integers(9, 40, (num, variants)), 0).astype(np.int32)
    tokens = (patches // 4 + rng.integers(8, 120, (num, variants))).astype(np.int32)
    values = {
        "shard": np.arange(num, dtype=np.int32) // 100,
        "row": np.arange(num, dtype=np.int32) % 100,
        "id_hash": np.array([id_hash(name, str(row)) for row in range(num)], np.uint64),
        "tokens": tokens,
        "patches": patches,
        "targets": tokens // 2,
        "fit": np.zeros((num, variants), np.int32),
        "drop": np.full((num, variants), -1, np.int8),
        "reasons": ("over_long", "no_target"),
    }
    facts = {"split": "train", "kind": kind, "uri": f"data/{name}", "digest": "d", "rules_digest": "r"}
    return SourceCounts(name=name, **facts, **{**values, **more})


MIXTURE = [some_counts("captions", 400), some_counts("text", 150, pictures=False), some_counts("pages", 90)]


def uses_of(plan: Plan) -> list[tuple[int, int, int, int]]:
    return [place[:4] for index in range(plan.num_packs) for place in plan.pack(index).places]


def test_the_same_inputs_give_the_same_digest_and_any_other_input_another():
    base = make_plan(MIXTURE, ORDER).digest
    assert make_plan(MIXTURE, ORDER).digest == base
    others = [
        make_plan(MIXTURE, replace(ORDER, seed=1)),
        make_plan(MIXTURE, replace(ORDER, steps=13)),
        make_plan(MIXTURE[:2], ORDER),
        make_plan([replace(MIXTURE[0], digest="e"), *MIXTURE[1:]], ORDER),
        make_plan(MIXTURE, replace(ORDER, facts={"tokenizer": "x"})),
    ]
    assert len({plan.digest for plan in others} | {base}) == 6


def test_a_plan_is_read_back_as_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.plan.SEGMENT_BYTES", 2000)  # several segments
    made = make_plan(MIXTURE, ORDER)
    made.write(str(tmp_path))
    read = Plan.read(str(tmp_path))
    assert read.digest == made.digest and len(read.header["segments"]) > 2
    assert [step_packs(read, step) for step in range(12)] == [step_packs(made, step) for step in range(12)]
    assert [read.pack(index) for index in range(48)] == [made.pack(index) for index in range(48)]
    assert len(read._tables) <= 2


def test_threads_that_share_a_plan_read_each_segment_once(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.plan.SEGMENT_BYTES", 2000)
    made = make_plan(MIXTURE, ORDER)
    made.write(str(tmp_path))
    reads: list[str] = []

    def slow(uri, facts):
        reads.append(facts["name"])
        time.sleep(0.05)  # both threads would be here at once
        return _read_segment(uri, facts)

    monkeypatch.setattr("trainer.data.plan._read_segment", slow)
    plan = Plan.read(str(tmp_path))
    both = threading.Barrier(4)

    def packs(_: int) -> list:
        both.wait()
        return [plan.pack(index) for index in (0, 1)]

    with ThreadPoolExecutor(4) as pool:
        assert all(found == [made.pack(0), made.pack(1)] for found in pool.map(packs, range(4)))
    assert len(reads) == len(set(reads)), reads


def media_counts(name: str, num: int, shard_bytes: int) -> SourceCounts:
    """Rows of 10 bytes in shards of a hundred."""
    num_shards = -(-num // 100)
    return some_counts(name, num, row_bytes=np.full(num, 10, np.int64), shard_bytes=[shard_bytes] * num_shards)


def test_the_plan_says_how_many_bytes_a_node_fetches_for_those_that_it_uses():
    one_pass = replace(ORDER, steps=None)
    facts = make_plan([media_counts("captions", 400, 1000)], one_pass).statistics
    assert (facts["used_bytes"], facts["fetched_bytes"]) == (4000, 4000) and facts["read_amplification"] == 1.0
    wasteful = make_plan([replace(media_counts("captions", 400, 5000), weight=0.5)], one_pass).statistics
    assert wasteful["fetched_bytes"] == 20_000 and 1800 < wasteful["used_bytes"] < 2200
    assert wasteful["read_amplification"] == pytest.approx(20_000 / wasteful["used_bytes"], abs=1e-3)
    # two epochs: a cache that holds everything serves the second; windows of a part fetch each shard twice
    steps = 2 * make_plan([media_counts("captions", 400, 1000)], one_pass).num_steps
    held = make_plan([media_counts("captions", 400, 1000)], replace(ORDER, steps=steps)).statistics
    assert held["fetched_bytes"] == 4000 and held["read_amplification"] < 0.6
    order = replace(ORDER, steps=steps - 2, lanes=1, window_shards=1)
    again = make_plan([media_counts("captions", 400, 1000)], order).statistics
    assert 8000 <= again["fetched_bytes"] <= 12_000  # what windows carry reaches into the next ones
    text = make_plan([some_counts("text", 400, pictures=False)], ORDER).statistics
    assert text["read_amplification"] == text["fetched_bytes"] == 0


def test_a_changed_or_damaged_plan_is_an_error(tmp_path):
    make_plan(MIXTURE, ORDER).write(str(tmp_path))
    path = tmp_path / "segment-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlanError, match="damaged"):
        Plan.read(str(tmp_path)).pack(0)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"seed": 1234', '"seed": 1235'))
    with pytest.raises(PlanError, match="changed"):
        Plan.read(str(tmp_path))
    with pytest.raises(PlanError, match="no plan"):
        Plan.read(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_any_number_of_groups_runs_the_same_packs_in_each_step(num_groups):
    plan = make_plan(MIXTURE, replace(ORDER, packs_per_step=8))
    for step in range(plan.num_steps):
        groups = assign(plan, step, num_groups)
        assert len({len(packs) for packs in groups}) == 1
        flat = [pack for packs in groups for pack in packs if pack != EMPTY]
        assert sorted(flat) == sorted(plan.packs_of(step).tolist())
    lanes = step_packs(plan, 0)
    assert assign(plan, 0, 4) == lanes and assign(plan, 0, 2) == [lanes[0] + lanes[1], lanes[2] + lanes[3]]
    with pytest.raises(PlanError, match="more rank groups"):
        assign(plan, 0, 5)


def test_budgets_hold_and_totals_are_those_of_the_places():
    plan = make_plan(MIXTURE, ORDER)
    for step in range(plan.num_steps):
        packs = [plan.pack(index) for index in plan.packs_of(step).tolist()]
        for pack in packs:
            assert sum(place.tokens for place in pack.places) == pack.tokens <= 512
            assert sum(place.patches for place in pack.places) == pack.patches <= 1024
        assert plan.target_tokens(step) == sum(place.targets for pack in packs for place in pack.places)
        assert plan.tokens(step) == sum(pack.tokens for pack in packs)


def test_packs_are_well_filled():
    fill = make_plan(MIXTURE, replace(ORDER, steps=None)).statistics
    assert fill["fill"] > 0.96 and fill["packs_over_lower_bound"] < 1.04  # 45 packs; measured 0.972 and 1.023
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(np.log(600), 0.9, 20_000).astype(int), 8, 8192)
    patches = np.where(rng.random(20_000) < 0.5, tokens * 2, 0)
    found = pack_windows([np.arange(20_000)], tokens, patches, length=8192, patch_budget=16384)
    packs = [pack for packs in found for pack in packs]
    assert len(packs) <= 1.002 * lower_bound(tokens, 8192)  # measured 1.0008
    first_come = 1 + int(np.sum(np.diff(np.cumsum(tokens) // 8192) > 0))  # negative control: even cut samples need that
    assert len(packs) >= first_come * 0.99


def test_the_fullest_pack_that_takes_both_is_found_like_by_looking_at_all():
    rng = random.Random(0)
    for _ in range(200):
        length = rng.randint(1, 40)
        space = _Open(length)
        for _ in range(rng.randint(0, 12)):
            space.add(Bin(rng.randint(0, length), rng.randint(0, 50)))
        live = set(range(len(space.bins)))
        for _ in range(15):
            tokens, patches = rng.randint(0, length), rng.randint(0, 50)
            fits = [n for n in live if space.bins[n].tokens_left >= tokens and space.bins[n].patches_left >= patches]
            found = space.take(tokens, patches)
            if not fits:
                assert found is None
                continue
            assert found in fits
            assert space.bins[found].tokens_left == min(space.bins[n].tokens_left for n in fits)
            live.discard(found)


def test_windows_lose_nothing_and_old_packs_are_closed():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 400, 600)
    windows = [np.arange(at, at + 50) for at in range(0, 600, 50)]
    found = list(pack_windows(windows, tokens, tokens * 0, length=1000, patch_budget=10, max_age=2))
    assert sorted(index for packs in found for pack in packs for index in pack) == list(range(600))
    oldest = max(number * 50 - min(pack) for number, packs in enumerate(found) for pack in packs)
    assert oldest <= 3 * 50


def test_one_pass_uses_every_sample_once_and_its_last_step_may_be_short():
    plan = make_plan(MIXTURE, replace(ORDER, steps=None))
    uses = Counter((source, shard, row) for source, shard, row, _ in uses_of(plan))
    assert len(uses) == 640 and set(uses.values()) == {1}
    assert plan.statistics["epochs"] == 1
    last = plan.packs_of(plan.num_steps - 1)
    assert (last != EMPTY).any()
    assert plan.num_packs == sum((plan.packs_of(step) != EMPTY).sum() for step in range(plan.num_steps))


def test_half_a_weight_takes_a_fixed_half_and_two_take_two_variants():
    half = make_plan([replace(MIXTURE[0], weight=0.5)], replace(ORDER, steps=None))
    rows = {use[1:3] for use in uses_of(half)}
    assert 160 < len(rows) < 240 and len(uses_of(half)) == len(rows)
    again = make_plan([replace(MIXTURE[0], weight=0.5), MIXTURE[1]], replace(ORDER, steps=None))
    assert {use[1:3] for use in uses_of(again) if use[0] == 0} == rows  # whatever is mixed in
    twice = make_plan([replace(MIXTURE[0], weight=2.0)], replace(ORDER, steps=None))
    variants: dict[tuple[int, int], list[int]] = {}
    for _, shard, row, variant in uses_of(twice):
        variants.setdefault((shard, row), []).append(variant)
    assert len(variants) == 400 and all(sorted(found) == [0, 1] for found in variants.values())


def test_steps_of_more_than_one_pass_go_through_everything_before_repeating():
    plan = make_plan(MIXTURE, replace(ORDER, steps=30))
    assert plan.num_steps == 30 and plan.statistics["epochs"] >= 2
    seen = Counter(use[:3] for use in uses_of(plan))
    assert max(seen.values()) - min(seen.values()) <= 2


def test_a_token_budget_ends_the_stage_at_the_step_that_reaches_it():
    plan = make_plan(MIXTURE, replace(ORDER, steps=None, tokens=20_000))
    totals = np.cumsum([plan.tokens(step) for step in range(plan.num_steps)])
    assert totals[-1] >= 20_000 > totals[-2]


def test_held_out_packs_are_few_and_hold_every_source():
    plan = make_plan(MIXTURE, replace(ORDER, steps=None, max_packs=8))
    assert plan.num_packs <= 8 and plan.num_steps == 2
    assert {use[0] for use in uses_of(plan)} == {0, 1, 2}


def test_packs_of_a_step_cost_about_the_same():
    plan = make_plan(MIXTURE, replace(ORDER, steps=None))
    packs = [plan.pack(index).patches for index in range(plan.num_packs)]

    def balance(steps: list[list[int]]) -> float:
        return sum(map(sum, steps)) / sum(len(step) * max(step) for step in steps if max(step))

    ours = [[plan.pack(i).patches for i in plan.packs_of(s).tolist() if i != EMPTY] for s in range(plan.num_steps)]
    shuffled = random.Random(0).sample(packs, len(packs))
    random_order = [shuffled[at : at + 4] for at in range(0, len(packs), 4)]
    assert balance(ours) > balance(random_order)


def test_text_alone_runs_beside_pictures_within_the_first_ten_steps():
    for order in (ORDER, replace(ORDER, lanes=2, packs_per_step=2, steps=60), replace(ORDER, seed=3)):
        plan = make_plan(MIXTURE, order)
        kinds = []
        for step in range(10):
            lanes = [{plan.pack(pack).patches > 0 for pack in packs} for packs in step_packs(plan, step)]
            kinds.append(len(set.union(*lanes)) == 2)
        assert any(kinds)
    only = make_plan(MIXTURE[:1], ORDER)  # negative control: no text, no such step
    assert all(only.pack(index).patches for index in range(only.num_packs))


def test_every_stretch_of_a_stage_sees_the_whole_mixture():
    mixture = [some_counts("captions", 4000), some_counts("text", 1500, pictures=False)]
    plan = make_plan(mixture, replace(ORDER, lanes=2, packs_per_step=2, steps=None, window_shards=100))
    shares = np.array([plan.patches(step) for step in range(plan.num_steps - 1)], float)

    def spread(order: np.ndarray) -> float:
        """Of the mean patches of each tenth of the steps, over that of all."""
        means = np.array([part.mean() for part in np.array_split(order, 10)]) / order.mean()
        return float(np.ptp(means))

    rng = np.random.default_rng(0)
    at_random = np.mean([spread(rng.permutation(shares)) for _ in range(20)])
    assert spread(shares) < 0.5 * at_random


def test_the_heaviest_step_comes_early():
    plan = make_plan(MIXTURE, replace(ORDER, steps=40))
    weights = [plan.patches(step) for step in range(40)]
    assert max(weights[:10]) >= 0.95 * max(weights)


def test_pairs_are_counted_and_stay_whole():
    plan = make_plan([some_counts("pairs", 60, kind="preference")], replace(ORDER, steps=None))
    assert sum(plan.pairs(step) for step in range(plan.num_steps)) == 60 == plan.statistics["pairs"]
    assert len(uses_of(plan)) == 60  # a pair is one place: it cannot lie in two packs


def test_dropped_samples_are_counted_by_reason():
    source = some_counts("captions", 100)
    source.fit[:7], source.drop[:7] = -1, 0
    source.fit[7:10], source.drop[7:10] = -1, 1
    assert drops_of(source) == {"no_target": 3, "over_long": 7}
    plan = make_plan([source], replace(ORDER, steps=None))
    assert plan.sources[0]["drops"] == {"no_target": 3, "over_long": 7}
    assert plan.sources[0]["num_dropped"] == 10 and plan.sources[0]["distinct"] == 90


def test_a_length_that_no_sample_fits_is_a_plan_error_with_its_exit_code():
    source = some_counts("captions", 20)
    source.fit[:], source.drop[:] = -1, 0
    with pytest.raises(PlanError, match="no sample of the source fits") as told:
        make_plan([MIXTURE[1], source], ORDER)
    assert told.value.code == 67
    for part in ("source captions", "512 tokens", "20 over_long", "raise packing.length"):
        assert part in str(told.value)
    with pytest.raises(PlanError, match="lanes"):
        make_plan(MIXTURE, replace(ORDER, packs_per_step=6))


def test_many_shards_are_packed_window_by_window():
    source = some_counts("captions", 2000)  # 20 shards
    plan = make_plan([source], replace(ORDER, steps=None, window_shards=1))
    assert len({use[:3] for use in uses_of(plan)}) == 2000
    shards = [use[1] for use in uses_of(plan)]
    for at in (0, 600):  # a window is 400 samples of 4 shards; the rest was carried or brought forward
        largest = Counter(shards[at : at + 200]).most_common(4)
        assert sum(count for _, count in largest) > 0.6 * 200
    assert plan.fill > 0.95
    whole = make_plan([source], replace(ORDER, steps=None, window_shards=20))  # negative control: one window
    assert sum(count for _, count in Counter([use[1] for use in uses_of(whole)][:200]).most_common(4)) < 0.4 * 200

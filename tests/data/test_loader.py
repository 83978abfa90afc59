"""The loader: exact resume, any number of groups, isolation in a pack, clear errors, skips."""

from __future__ import annotations

import pytest

from tests.data import builders
from tests.data.builders import a_source, a_tokenizer, counts_of, some_rules
from trainer.data.encode import encode
from trainer.data.layout import Fit, layout
from trainer.data.mixture import Order
from trainer.data.plan import EMPTY, make_plan
from trainer.data.shards import Source
from trainer.errors import CountMismatch, MediaError, PlanError, ShardError

torch = pytest.importorskip("torch")

from trainer.data.batch import PADDING, PackedBatch  # noqa: E402
from trainer.data.loader import Loader  # noqa: E402

RULES = {
    "captions": some_rules("document", length=256, patch_budget=512),
    "text": some_rules("document", length=256, patch_budget=512),
    "clips": some_rules("document", length=256, patch_budget=512),
    "pairs": some_rules("chat", length=256, patch_budget=512),
}


def prepared(out, name: str, samples) -> Source:
    return a_source(f"{out}/{name}", [(s.model_copy(update={"source": name}), files) for s, files in samples])


def plan_of(out, sources: dict[str, tuple[Source, str]], **order):
    counts = [counts_of(source, RULES[name], name, kind) for name, (source, kind) in sources.items()]
    values = {"length": 256, "patch_budget": 512, "lanes": 2, "packs_per_step": 2, "seed": 1, **order}
    return make_plan(counts, Order(**values))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    sources = {
        "captions": (prepared(out, "captions", [builders.a_caption(n) for n in range(24)]), "caption"),
        "text": (prepared(out, "text", [builders.a_text(n) for n in range(12)]), "text"),
        "clips": (prepared(out, "clips", [builders.a_clip(n) for n in range(4)]), "video"),
    }
    return out, plan_of(out, sources, steps=8)


def loaded(out, plan, **more) -> list:
    loader = Loader(plan, str(out), RULES, **{"group": 0, "num_groups": 1, **more})
    try:
        return list(loader)
    finally:
        loader.close()


def same(a: PackedBatch, b: PackedBatch) -> bool:
    names = ("ids", "position_ids", "segments", "label_rows", "label_ids", "label_segment", "patches", "grid_thw")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names) and a.sample_ids == b.sample_ids


def test_resuming_at_any_step_gives_the_batches_of_an_uninterrupted_run(mixed):
    whole = loaded(*mixed, threads=2)
    for start in (1, 5):
        rest = loaded(*mixed, start_step=start, prefetch_packs=1)
        assert [step.number for step in rest] == list(range(start, 8))
        for step, want in zip(rest, whole[start:], strict=True):
            assert all(same(a, b) for a, b in zip(step.batches, want.batches, strict=True))
    assert not same(whole[0].batches[0], whole[1].batches[0])  # negative control


def test_two_groups_run_the_packs_of_one(mixed):
    one = loaded(*mixed)
    two = [loaded(*mixed, group=group, num_groups=2) for group in range(2)]
    for number, step in enumerate(one):
        both = [batch for group in two for batch in group[number].batches]
        assert all(same(a, b) for a, b in zip(step.batches, both, strict=True))
        assert {step.target_tokens, two[0][number].target_tokens, two[1][number].target_tokens} == {
            sum(batch.num_targets for batch in step.batches)
        }


def test_a_pack_is_its_samples_one_after_the_other(mixed):
    out, plan = mixed
    batch = loaded(out, plan)[0].batches[0]
    at = patch = label = 0
    for number, place in enumerate(plan.pack(batch.pack).places):
        name = plan.sources[place.source]["name"]
        source = Source.open(f"{out}/{name}")
        sample = source.sample(place.shard, place.row)
        files = Loader(plan, str(out), RULES, group=0, num_groups=1).readers[place.source].media(place.shard, place.row)
        alone = encode(sample, layout(sample, place.variant, Fit(), RULES[name]), files, RULES[name])
        end = at + len(alone.ids)
        assert batch.ids[at:end].tolist() == alone.ids.tolist()
        assert batch.position_ids[:, at:end].tolist() == alone.position_ids.tolist()  # as if it were alone
        assert batch.segments[number].tolist() == [at, len(alone.ids), number, -1]
        mine = slice(label, label + len(alone.label_ids))
        assert (batch.label_rows[mine] - at).tolist() == alone.label_rows.tolist()
        assert batch.patches[patch : patch + len(alone.patches)].numpy().tobytes() == alone.patches.tobytes()
        at, patch, label = end, patch + len(alone.patches), mine.stop
    assert batch.num_tokens == at and batch.num_targets == label
    assert batch.segments[-1].tolist() == [at, 256 - at, PADDING, -1] if at < 256 else True


def test_no_label_crosses_from_one_sample_into_the_next(mixed):
    for step in loaded(*mixed):
        for batch in step.batches:
            for row, owner, label in zip(batch.label_rows, batch.label_segment, batch.label_ids, strict=True):
                start, length, sample, _ = batch.segments[owner].tolist()
                assert start <= row < start + length - 1 and sample != PADDING
                assert batch.ids[row + 1] == label
            starts = set(batch.segments[:, 0].tolist())
            assert not starts & set((batch.label_rows + 1).tolist())  # a first token is nobody's label


def test_pairs_keep_both_answers_in_one_pack(tmp_path):
    source = prepared(tmp_path, "pairs", [builders.a_pair(n) for n in range(10)])
    plan = plan_of(tmp_path, {"pairs": (source, "preference")})
    seen = 0
    for step in loaded(tmp_path, plan):
        assert step.pairs == sum(batch.num_pairs for batch in step.batches)
        for batch in step.batches:
            seen += batch.num_pairs
            for start, _, sample, parent in batch.segments.tolist():
                if parent >= 0:
                    prompt = batch.segments[parent].tolist()
                    assert prompt[2] == sample and prompt[3] == -1
                    first = batch.label_rows[batch.label_ids == batch.ids[start]]
                    assert prompt[0] + prompt[1] - 1 in first.tolist()
    assert seen == 10


def test_a_short_last_step_gives_empty_packs_without_targets(tmp_path):
    source = prepared(tmp_path, "captions", [builders.a_caption(n) for n in range(3)])
    plan = plan_of(tmp_path, {"captions": (source, "caption")})
    assert plan.packs_of(plan.num_steps - 1).tolist().count(EMPTY) == 1
    groups = [loaded(tmp_path, plan, group=group, num_groups=2)[-1] for group in range(2)]
    assert [len(step.batches) for step in groups] == [1, 1]
    empty = next(step.batches[0] for step in groups if step.batches[0].pack == EMPTY)
    assert (empty.num_targets, empty.num_patches, len(empty.ids)) == (0, 0, 256)
    assert empty.segments.tolist() == [[0, 256, PADDING, -1]]


def damaged(tmp_path, change):
    """A source whose caption 1 has other bytes than it should, with a digest that agrees: what a user's broken file
    looks like once it is ingested."""
    samples = [builders.a_caption(n) for n in range(4)]
    source = prepared(tmp_path, "captions", samples)
    good, files = samples[1]
    broken = change(files[0])
    media = good.media[0].model_copy(update={"digest": builders.digest_of(broken), "size_bytes": len(broken)})
    samples[1] = good.model_copy(update={"media": (media,)}), [broken]
    source = prepared(tmp_path, "captions", samples)
    return plan_of(tmp_path, {"captions": (source, "caption")})


BREAKS = {
    "truncated": (lambda data: data[: len(data) * 2 // 3], "cannot be decoded"),
    "another size": (lambda data: builders.an_image(33, 44), "another size"),
    "no image": (lambda data: b"nothing", "not an image"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_image_stops_with_the_sample_and_its_shard(tmp_path, name):
    change, message = BREAKS[name]
    plan = damaged(tmp_path, change)
    with pytest.raises(MediaError, match=message) as told:
        loaded(tmp_path, plan)
    assert told.value.sample_id == "captions/caption-1"
    assert "captions/caption-1, captions shard 0 row 1" in str(told.value)
    assert """--set 'stages.STAGE.skip_samples=["captions/caption-1"]' --accept-change""" in str(told.value)


def test_a_skipped_sample_keeps_its_place_as_tokens_without_target(tmp_path):
    plan = damaged(tmp_path, BREAKS["truncated"][0])
    skips = ["captions/caption-1"]
    step = loaded(tmp_path, plan, skips=skips)[0]
    batch = next(batch for batch in step.batches if skips[0] in batch.sample_ids)
    number = batch.sample_ids.index(skips[0])
    places = plan.pack(batch.pack).places
    start, length, _, _ = batch.segments[number].tolist()
    assert length == places[number].tokens
    assert set(batch.ids[start : start + length].tolist()) == {a_tokenizer().id("<|endoftext|>")}
    assert number not in batch.label_segment.tolist()
    assert batch.num_targets == sum(place.targets for place in places) - places[number].targets
    assert step.target_tokens == sum(batch.num_targets for batch in step.batches)
    assert step.target_tokens == plan.target_tokens(0) - places[number].targets
    assert step.left_out == {"samples": 1, "target_tokens": places[number].targets}


def test_a_flipped_bit_in_the_shard_is_never_a_skip(tmp_path):
    source = prepared(tmp_path, "captions", [builders.a_caption(n) for n in range(4)])
    plan = plan_of(tmp_path, {"captions": (source, "caption")})
    path = tmp_path / "captions" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[source.index(0)["offset"][2].as_py() + 700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="shard 0, row 2") as told:
        loaded(tmp_path, plan)
    assert told.value.sample_id == "captions/caption-2"


def test_other_sources_rules_or_counts_than_planned_are_refused(tmp_path):
    source = prepared(tmp_path, "captions", [builders.a_caption(n) for n in range(4)])
    plan = plan_of(tmp_path, {"captions": (source, "caption")})
    other = {"captions": some_rules("document", length=255, patch_budget=512)}
    with pytest.raises(PlanError, match="differ from the plan's"):
        Loader(plan, str(tmp_path), other, group=0, num_groups=1)
    with pytest.raises(PlanError, match="more rank groups"):
        Loader(plan, str(tmp_path), RULES, group=0, num_groups=3)
    counts = counts_of(source, RULES["captions"], "captions", "caption")
    counts.targets[:] += 1
    wrong = make_plan([counts], Order(length=256, patch_budget=512, lanes=2, packs_per_step=2, seed=1))
    with pytest.raises(CountMismatch, match="counts differ from the plan's"):
        loaded(tmp_path, wrong)
    prepared(tmp_path, "captions", [builders.a_caption(n) for n in range(5)])
    with pytest.raises(PlanError, match="not the one that was planned"):
        Loader(plan, str(tmp_path), RULES, group=0, num_groups=1)


def test_the_state_is_small_and_says_what_comes_next(mixed):
    out, plan = mixed
    loader = Loader(plan, str(out), RULES, group=0, num_groups=1, skips=["b", "a"])
    steps = iter(loader)
    for _ in range(2):
        next(steps)
    assert loader.state == {"plan_digest": plan.digest, "step": 2, "skips": ["a", "b"]}
    loader.close()

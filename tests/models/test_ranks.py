"""Rules 3 and 4 with real ranks: two and three with ZeRO-3 equal one process; what a stage does not train stays, and a
fault in the freeze configuration makes it fail. One start a world size for all families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.plain import largest_difference, plain_training, weights
from tests.distributed.ranks import launch
from tests.models import builders
from tests.models.builders import Built
from tests.models.ranks import PACKS, POOL, STEPS, Pool, a_stage, write_pool

pytestmark = pytest.mark.extended
MIXES = 30
LONG = {"qwen2_5_vl": 1000}
Note = Callable[..., None]
Found = dict[str, dict[str, dict[str, list[Any]]]]
"""World size -> family -> scenario -> what each rank found."""


def start(families: list[Built], folder: Path, *, worlds: tuple[int, ...], mixes: int, hang_s: float) -> Found:
    for built in families:
        write_pool(Path(built.out) / POOL, built.encoded, built.tokenizer.id(built.family.markers.eos))
    arguments = [str(folder), str(mixes), *(f"{built.name}={built.out}" for built in families)]
    for world in worlds:
        launch("tests.models.ranks", arguments, world_size=world, logs=folder, hang_s=hang_s)
    return {str(world): json.loads((folder / f"{world}.json").read_text()) for world in worlds}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, folder: Path, build: Callable[[str], Built]) -> Found:
    """For the families of this session's tests."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if "found" in item.fixturenames]  # type: ignore[attr-defined]
    asked = {call.params["built"] for call in calls if call is not None and "built" in call.params}
    families = [build(name) for name in builders.names() if name in asked]
    return start(families, folder, worlds=(2, 3), mixes=MIXES, hang_s=60 + 90 * len(families))


def scenario(found: Found, world: int, name: str, what: str) -> list[Any]:
    ranks = found[str(world)][name][what]
    for rank in ranks:
        assert "error" not in rank, rank["error"]
    return ranks


def test_two_and_three_ranks_equal_one_process(built: Built, found: Found, folder: Path, note: Note) -> None:
    pool = Pool(built.family, Path(built.out))
    want, packed = plain_training(built.family, built.model_uri, a_stage(), pool.step)
    plain = {built.family.hub_name(name): parameter.detach() for name, parameter in packed.model.named_parameters()}
    # What is added to every key alike, softmax ignores where keys are not rotated: rounding, which Adam makes large.
    keys = {name for name in plain if name.endswith(("k_proj.bias", "in_proj_bias", "qkv.bias", "c_attn.bias"))}
    errors = {"loss": 0.0, "norm": 0.0, "weights": 0.0}
    for world in (2, 3):
        got = scenario(found, world, built.name, "trained")[0]["figures"]
        for mine, theirs in zip(got, want, strict=True):
            errors["loss"] = max(errors["loss"], abs(mine[0] - theirs[0]) / theirs[0])
            errors["norm"] = max(errors["norm"], abs(mine[1] - theirs[1]) / theirs[1])
        stored = weights(folder / f"{built.name}-{world}")
        rest = {name: stored[name] for name in plain if name not in keys}
        errors["weights"] = max(errors["weights"], largest_difference(rest, {name: plain[name] for name in rest}))
    note(3, **{f"{name}_err": value for name, value in errors.items()})
    assert errors["loss"] < 1e-5 and errors["norm"] < 1e-4 and errors["weights"] < 1e-3, errors


def test_a_mean_of_ranks_means_would_be_something_else(built: Built) -> None:
    """Negative control: the packs' own means, averaged, are another loss."""
    write_pool(Path(built.out) / POOL, built.encoded, built.tokenizer.id(built.family.markers.eos))
    from trainer.step.packed import place

    batches = [batch for batch in Pool(built.family, Path(built.out)).step(0) if len(batch.label_ids)]
    sums = [float(built.mine(place(batch, built.mine, "cpu"))[0].detach()) for batch in batches]
    counts = [len(batch.label_ids) for batch in batches]
    mean = sum(sums) / sum(counts)
    assert abs(sum(a / n for a, n in zip(sums, counts, strict=True)) / len(sums) - mean) / mean > 1e-3


@pytest.mark.parametrize("world", [2, 3])
def test_vision_is_called_once_a_micro_batch_in_the_same_order_on_every_rank(
    built: Built, found: Found, world: int, note: Note
) -> None:
    ranks = scenario(found, world, built.name, "trained")
    for rank in ranks:
        assert rank["vision_calls"] == [1] * (STEPS * PACKS // world)
        assert rank["orders"] == 1 and rank["modules"] == ranks[0]["modules"]
        assert rank["parts"] == ["embed_tokens", "run_vision", "run_language"]
    note(3, vision_calls="1 a micro-batch")


def test_random_mixes_end_without_a_hang(built: Built, found: Found, note: Note) -> None:
    check_mixes(scenario(found, 3, built.name, "mixes"), MIXES)
    note(3, mixes=MIXES)


def check_mixes(ranks: list[Any], count: int) -> None:
    kinds: dict[str, int] = {}
    for rank in ranks:
        assert rank["count"] == count
        assert len(rank["orders"]) == 1 and rank["orders"] == ranks[0]["orders"]
        for kind, number in rank["kinds"].items():
            kinds[kind] = kinds.get(kind, 0) + number
    assert set(kinds) == {"pictures", "text", "empty"} and sum(kinds.values()) == count * len(ranks)


@pytest.mark.long
def test_many_random_mixes_in_one_warm_process_group(built: Built, tmp_path: Path, note: Note) -> None:
    count = LONG.get(built.name, 100)
    ranks = scenario(start([built], tmp_path, worlds=(3,), mixes=count, hang_s=600 + 2 * count), 3, built.name, "mixes")
    check_mixes(ranks, count)
    note(3, long_mixes=count, long_mixes_s=ranks[0]["s"])


# ---------------------------------------------------------------- rule 4


FAULTS = {
    "a frozen one asks for gradients": "the optimizer does not hold what the stage trains",
    "a trained one asks for none": "the optimizer does not hold what the stage trains",
    "forgotten by the optimizer": "the optimizer does not hold what the stage trains",
    "a frozen one is written to": "frozen parameters changed",
}


def test_what_is_frozen_stays_and_what_is_trained_moves(built: Built, found: Found, note: Note) -> None:
    rows = scenario(found, 2, built.name, "faults")[0]["states"]
    assert rows["vision"]["state"] == "frozen" and rows["vision"]["digest_before"] == rows["vision"]["digest_after"]
    for group in ("merger", "llm"):
        assert rows[group]["state"] == "trained" and rows[group]["digest_before"] != rows[group]["digest_after"]
    note(4, trained_and_frozen="proved")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_freeze_configuration_fails_the_stage(
    built: Built, found: Found, fault: str, note: Note
) -> None:
    for rank in scenario(found, 2, built.name, "faults"):
        assert rank["none"] == "", "negative control: without a fault the proof passes"
        message, name = rank[fault]
        assert FAULTS[fault] in message and name in message
    note(4, **{fault: "refused"})


def test_constants_are_named_do_not_change_and_have_no_optimizer_state(built: Built, found: Found, note: Note) -> None:
    names = [name for name, _ in built.mine.model.named_parameters()]
    want = sorted(built.family.hub_name(name) for name in names if built.family.constant(name))
    for rank in scenario(found, 2, built.name, "faults"):
        assert sorted(rank["constants"]) == want and rank["constants_with_state"] == []
    for row in scenario(found, 2, built.name, "trained")[0]["rows"]:
        if row["state"] == "constant":
            assert row["reason"] and row["digest_before"] == row["digest_after"]
    note(4, constants=len(want))

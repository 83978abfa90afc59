"""ZeRO-3 with real ranks: two ranks equal one, both equal plain PyTorch; what is frozen stays; what stops resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.plain import largest_difference, plain_training, weights
from tests.distributed.ranks import launch
from tests.distributed.scenarios import a_stage, denominator, step_batches
from tests.step.builders import a_batch, a_config, a_family, a_sequence
from trainer.models import hub
from trainer.models.qwen2_5_vl_model import PARTS as parts
from trainer.step.packed import PackedModel, place

WORLDS = ("1", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights in Hugging Face layout, in several files."""
    folder = tmp_path_factory.mktemp("zero3")
    torch.manual_seed(0)
    family = a_family()
    model = parts.build(a_config(), dtype=torch.float32)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach() * (4 if parameter.ndim > 1 else 1)
        tensors[family.hub_name(name)] = lambda value=value: value
    saved = hub.save_tensors(tensors, str(folder / "model"), family, dtype=torch.float32, file_bytes=40_000)
    files = {name: entry.model_dump() for name, entry in saved.files.items()}
    (folder / "files.json").write_text(json.dumps(files))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """{world size: {scenario: [what each rank found]}}"""
    for world in WORLDS:
        launch("tests.distributed.scenarios", [str(folder)], world_size=int(world), logs=folder)
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in WORLDS}


def in_one_process(folder: Path, trained: dict[str, bool]) -> tuple[list[list[float]], PackedModel]:
    return plain_training(a_family(), str(folder / "model"), a_stage(trained), step_batches)


def without(names: set[str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def flat(figures: list[list[float]]) -> list[float]:
    return [value for row in figures for value in row]


@pytest.mark.parametrize("world", WORLDS)
def test_zero3_equals_plain_torch(folder: Path, found: dict[str, Any], world: str) -> None:
    """Uneven targets, a text-only rank beside one with pictures, clipping, learning rates by group, tied head."""
    want, packed = in_one_process(folder, {"vision": True, "merger": True, "llm": True})
    got = found[world]["all_trained"][0]["figures"]
    assert flat(got) == pytest.approx(flat(want), rel=1e-5)
    assert max(norm for _, norm in want) > a_stage().optim.clip  # clipping took part
    family = a_family()
    plain = {family.hub_name(name): parameter.detach() for name, parameter in packed.model.named_parameters()}
    got = weights(folder / f"all-{world}")
    # What is added to every key alike, softmax ignores: the gradient of these biases is little more than rounding,
    # which Adam divides by its own size. Measured: 1.01e-4 for them, 5.7e-5 for the next.
    keys = {name for name in plain if name.endswith("k_proj.bias")}
    assert largest_difference({name: got[name] for name in keys}, {name: plain[name] for name in keys}) < 3e-4
    assert largest_difference(without(keys, got), without(keys, plain)) < 1e-4


def test_two_ranks_equal_one(folder: Path, found: dict[str, Any]) -> None:
    one, two = found["1"]["all_trained"][0], found["2"]["all_trained"][0]
    assert flat(two["figures"]) == pytest.approx(flat(one["figures"]), rel=1e-6)
    assert largest_difference(weights(folder / "all-2"), weights(folder / "all-1")) < 1e-5
    assert two["held"] == pytest.approx(one["held"], rel=1e-5)


def test_a_mean_of_ranks_means_would_be_something_else(folder: Path) -> None:
    """Negative control of the token mean: averaging the two packs' own means gives another loss."""
    family = a_family()
    model = parts.build(a_config(), dtype=torch.float32, attn_implementation="segments")
    hub.load(model, str(folder / "model"), family, dtype=torch.float32)
    packed = PackedModel(model, parts, mean=family.image_mean, std=family.image_std)
    sums = [float(packed(place(batch, packed, "cpu"))[0].detach()) for batch in step_batches(0)]
    counts = [len(batch.label_ids) for batch in step_batches(0)]
    mean = sum(sums) / sum(counts)
    assert abs(sum(a / n for a, n in zip(sums, counts, strict=True)) / 2 - mean) / mean > 1e-3


@pytest.mark.parametrize("world", WORLDS)
def test_activation_checkpointing_changes_nothing(found: dict[str, Any], world: str) -> None:
    want = found[world]["all_trained"][0]["figures"][:2]
    assert flat(found[world]["checkpointed_activations"][0]) == pytest.approx(flat(want), rel=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_stays_near_fp32(found: dict[str, Any], world: str) -> None:
    want = found[world]["all_trained"][0]["figures"][:2]
    result = found[world]["half_precision"][0]
    assert flat(result["figures"]) == pytest.approx(flat(want), rel=5e-2)
    assert result["same"] and set(result["buffers"].values()) == {"torch.float32"}  # rotary frequencies are not rounded


@pytest.mark.parametrize("world", WORLDS)
def test_frozen_vision_keeps_its_bytes(folder: Path, found: dict[str, Any], world: str) -> None:
    result = found[world]["frozen_vision"][0]
    states = {row["group"]: row for row in result["rows"]}
    assert states["vision"]["state"] == "frozen"
    assert states["vision"]["digest_before"] == states["vision"]["digest_after"]
    for group in ("merger", "llm"):
        assert states[group]["state"] == "trained"
        assert states[group]["digest_before"] != states[group]["digest_after"]
    assert result["copied"] and all(name.startswith("model-vision-") for name in result["copied"])
    for name in result["copied"]:
        assert (folder / "model" / name).read_bytes() == (folder / f"frozen-vision-{world}" / name).read_bytes()
    want, _ = in_one_process(folder, {"vision": False, "merger": True, "llm": True})
    assert flat(result["figures"]) == pytest.approx(flat(want), rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_changed_frozen_parameter_is_found_on_every_rank(found: dict[str, Any], world: str) -> None:
    for rank in found[world]["frozen_vision"]:
        assert "frozen parameters changed" in rank["refused"] and rank["mutated"] in rank["refused"]


@pytest.mark.parametrize("world", WORLDS)
def test_the_vision_tower_alone_can_be_trained(folder: Path, found: dict[str, Any], world: str) -> None:
    result = found[world]["vision_only"][0]
    assert {row["group"]: row["state"] for row in result["rows"]} == {
        "vision": "trained", "merger": "frozen", "llm": "frozen",
    }  # fmt: skip
    want, _ = in_one_process(folder, {"vision": True, "merger": False, "llm": False})
    assert flat(result["figures"]) == pytest.approx(flat(want), rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_without_pictures_anywhere_the_tower_gets_no_old_gradient(found: dict[str, Any], world: str) -> None:
    """With beta1 0 and no decay a parameter moves only if its gradient is not zero."""
    moved: dict[str, bool] = {}
    for rank in found[world]["text_only"]:
        for group, yes in rank["moved"].items():
            moved[group] = moved.get(group, False) or yes
    assert moved == {"vision": False, "merger": False, "llm": True}


@pytest.mark.parametrize("world", WORLDS)
def test_wrong_counts_and_infinite_losses_stop_before_weights_change(found: dict[str, Any], world: str) -> None:
    for rank in found[world]["wrong_numbers"]:
        assert f"expected: {denominator(0) + 1}" in rank["counted"] and f"got: {denominator(0)}" in rank["counted"]
        assert rank["same"] and rank["untouched"]
        assert "not finite" in rank["infinite"] and "step 7" in rank["infinite"]
    assert "sample-0" in found[world]["wrong_numbers"][0]["infinite"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_resumed_run_has_the_same_bits(found: dict[str, Any], world: str) -> None:
    for rank in found[world]["resumed"]:
        assert rank["equal"]
        assert rank["rest"] == rank["figures"][2:]


def test_the_handed_over_model_loads_in_transformers_with_the_same_logits(folder: Path, found: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(folder / "all-2", dtype=torch.float32)
    family = a_family()
    mine = parts.build(a_config(), dtype=torch.float32, attn_implementation="segments")
    hub.load(mine, str(folder / "all-2"), family, dtype=torch.float32)
    packed = PackedModel(mine, parts, mean=family.image_mean, std=family.image_std)
    sample = a_sequence(3, grid=(1, 6, 10))
    pack = place(a_batch([copy.deepcopy(sample)]), packed, "cpu")
    with torch.no_grad():
        got = parts.head_of(mine)(packed.hidden(pack))
        want = theirs(
            input_ids=torch.from_numpy(sample.ids)[None],
            position_ids=torch.from_numpy(sample.positions[1:])[:, None],
            pixel_values=packed._pixel_values(pack.pixels, torch.float32),
            image_grid_thw=torch.tensor([sample.grid]),
            use_cache=False,
        ).logits[0]
    assert float((got - want).abs().max()) < 1e-5

"""Rule 1: raw picture and messages through transformers' processor and model give the logits that the same Sample
gives through ingest, shards, plan, loader, encode and the packed forward, as a later sample of a pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.models.builders import Built, inputs_of
from trainer.data.layout import stage_rules
from trainer.data.loader import Loader
from trainer.data.plan import Plan

TOLERANCE = 1e-5
Note = Callable[..., None]


def theirs(built: Built, name: str, positions: Any = None) -> tuple[list[int], torch.Tensor, Any]:
    """(ids, logits [L, V], the position ids that the language model got) of transformers on the raw files."""
    sample, _ = built.samples[name]
    inputs = inputs_of(built, sample)
    given: dict[str, Any] = {}
    if positions is not None:
        given["position_ids"] = torch.as_tensor(positions)[1:, None]
    seen: list[Any] = []
    language = getattr(built.theirs.model, "language_model", built.theirs.model)
    hook = language.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        with torch.no_grad():
            logits = built.theirs(**inputs, **given, use_cache=False).logits[0]
    finally:
        hook.remove()
    return inputs["input_ids"][0].tolist(), logits, seen[0]


def packs(built: Built) -> list[Any]:
    """Every pack of the plan, as a rank's loader gives them."""
    stage = built.recipe.stages.named()["stage1"]
    rules = stage_rules(built.recipe, stage, built.family, built.tokenizer)
    loader = Loader(Plan.read(f"{built.out}/stage1/plan"), built.out, rules, group=0, num_groups=1)
    try:
        return [batch for step in loader for batch in step.batches]
    finally:
        loader.close()


def later_samples(batch: Any) -> dict[str, tuple[int, int]]:
    """Sample id -> (start, stop) of those that do not begin the pack."""
    rows = [row for row in batch.segments.tolist() if row[2] > 0]
    return {batch.sample_ids[row[2]].partition("/")[2]: (row[0], row[0] + row[1]) for row in rows}


def has_mrope(built: Built) -> bool:
    return any((found.position_ids[1] != found.position_ids[2]).any() for found in built.encoded.values())


@pytest.fixture
def hugging_face(built: Built) -> None:
    if not built.hugging_face:
        pytest.skip(f"transformers has no {built.name}: its component references are in test_{built.name}.py")


def whole_path_errors(built: Built) -> tuple[dict[str, float], float]:
    """(largest difference of logits by sample, standard deviation of the logits)."""
    mrope, errors = has_mrope(built), {}

    @cache
    def reference(name: str) -> tuple[list[int], torch.Tensor, Any]:
        return theirs(built, name, built.encoded[name].position_ids if mrope else None)

    for batch in packs(built):
        ours = built.logits(built.mine, batch)
        for name, (start, stop) in later_samples(batch).items():
            ids, want, _ = reference(name)
            assert batch.ids[start:stop].tolist() == ids, name
            errors[name] = max(errors.get(name, 0.0), float((ours[start:stop] - want).abs().max()))
    assert set(errors) == set(built.samples), "every sample came after another one in some pack"
    return errors, float(torch.cat([reference(name)[1] for name in errors]).std())


@pytest.mark.usefixtures("hugging_face")
def test_logits_of_every_sample_equal_hugging_faces(built: Built, note: Note) -> None:
    errors, deviation = whole_path_errors(built)
    assert 0.5 < deviation < 2
    note(1, hf_logits_err=max(errors.values()), logits_std=deviation, samples=len(errors))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.usefixtures("hugging_face")
def test_hugging_faces_own_positions_give_the_same_where_they_are_the_same(built: Built, note: Note) -> None:
    if not has_mrope(built):
        pytest.skip("one position a token: nothing was handed over")
    agreed = {}
    for name, found in built.encoded.items():
        _, want, positions = theirs(built, name)
        plain = torch.arange(len(found.ids)).expand(3, -1)  # what the model makes of none
        rows = plain if positions is None else torch.as_tensor(positions)[-3:, 0]
        if rows.tolist() == found.position_ids[1:].tolist():
            ours = built.logits(built.mine, built.batch(["short", name]))[-len(found.ids) :]
            agreed[name] = float((ours - want).abs().max())
    assert set(agreed) >= set(built.encoded) - {"clip"}, "only ids of a long video differ"
    note(1, own_positions_err=max(agreed.values()), own_positions=f"{len(agreed)} of {len(built.encoded)} samples")
    assert max(agreed.values()) < TOLERANCE, agreed


@pytest.mark.usefixtures("hugging_face")
def test_another_picture_or_no_isolation_would_be_seen(built: Built, note: Note) -> None:
    """Negative controls: the error of a real difference is far above the tolerance."""
    _, want, _ = theirs(built, "one", built.encoded["one"].position_ids if has_mrope(built) else None)
    found = built.encoded["one"]
    turned = replace(found, patches=found.patches[:, ::-1].copy())
    other = built.logits(built.mine, built.batch(["text", turned]))[-len(found.ids) :]
    batch = built.batch(["text", "one"])
    leaking = replace(batch, segments=torch.tensor([[0, len(batch.ids), 0, -1]], dtype=torch.int32))
    leaked = built.logits(built.mine, leaking)[-len(found.ids) :]
    errors = [float((logits - want).abs().max()) for logits in (other, leaked)]
    note(1, control_pixels=errors[0], control_isolation=errors[1])
    assert min(errors) > 1000 * TOLERANCE

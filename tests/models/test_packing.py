"""Rule 2: a pack gives the loss and the gradients, module group by module group, that its samples give alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from tests.models.builders import LENGTH, Built, far
from tests.step.builders import loss_and_gradients
from trainer.models import freeze
from trainer.step.packed import PackedModel

LOSS, GRADIENT = 1e-5, 1e-4
GROUPS = ("vision", "merger", "llm")
Note = Callable[..., None]


def packs_of(built: Built) -> dict[str, tuple[list[str], int]]:
    """Name -> (samples, length of the pack)."""
    found = {
        "text": (["text", "short"], LENGTH),
        "image": (["one", "short", "tall"], LENGTH),
        "several images": (["two", "text", "turns"], LENGTH),
        "filled": (["tall", "text", "one"], 0),
    }
    return found | ({"video": (["text", "clip", "one"], LENGTH)} if built.videos else {})


def trainable(built: Built) -> PackedModel:
    """The shared model with everything trained that the family ever trains."""
    train: Any = built.recipe.stages.named()["stage1"].train
    names = [name for name, _ in built.mine.model.named_parameters()]
    freeze.apply(built.mine.model, freeze.freeze_plan(names, built.family, train), built.family)
    return built.mine


def run(built: Built, batches: Iterable[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    total, gradients = loss_and_gradients(trainable(built), built.family, batches)
    assert set(gradients) == set(GROUPS)
    return total, gradients


def packing_errors(built: Built) -> dict[str, float]:
    """Relative differences of a pack from its samples alone: loss, and gradients of each module group; the largest."""
    errors = dict.fromkeys(("loss", *GROUPS), 0.0)
    for samples, length in packs_of(built).values():
        want, want_grads = run(built, (built.batch([name]) for name in samples))
        got, got_grads = run(built, [built.batch(samples, length=length)])
        errors["loss"] = max(errors["loss"], abs(got - want) / want)
        for group, gradient in want_grads.items():
            if float(gradient.norm()) == 0:
                assert float(got_grads[group].norm()) == 0, "no picture, no gradient"
                continue
            errors[group] = max(errors[group], far(got_grads[group], gradient))
    return errors


def test_packs_equal_their_samples_alone(built: Built, note: Note) -> None:
    errors = packing_errors(built)
    note(2, loss_err=errors["loss"], **{f"grad_err_{group}": errors[group] for group in GROUPS})
    assert errors["loss"] < LOSS and max(errors[group] for group in GROUPS) < GRADIENT, errors


def test_pictures_reach_every_group(built: Built) -> None:
    """Negative control of the comparison above: gradients of zero would be equal, too."""
    _, gradients = run(built, [built.batch(["one", "two"])])
    assert all(float(gradients[group].norm()) > 1e-3 for group in GROUPS)


def test_without_isolation_the_loss_moves_by_far_more(built: Built, note: Note) -> None:
    """The pack that moves most: a random model's losses go up for some tokens and down for others."""
    moves = []
    for samples, _ in packs_of(built).values():
        batch = built.batch(samples)
        want, _ = run(built, [batch])
        leaking = replace(batch, segments=torch.tensor([[0, len(batch.ids), 0, -1]], dtype=torch.int32))
        moves.append(abs(run(built, [leaking])[0] - want) / want)
    note(2, control=max(moves))
    assert max(moves) > 100 * LOSS


def test_a_pack_without_pictures_and_an_empty_one_reach_every_parameter(built: Built) -> None:
    """The dummy: every trainable parameter has a gradient, of zero where nothing was seen."""
    _, gradients = run(built, [built.batch(["text"])])
    assert float(gradients["vision"].abs().max()) == 0 and float(gradients["merger"].abs().max()) == 0
    assert float(gradients["llm"].abs().max()) > 0
    loss, gradients = run(built, [built.batch([], length=32)])
    assert loss == 0 and all(float(gradient.abs().max()) == 0 for gradient in gradients.values())

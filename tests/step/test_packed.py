"""A pack gives what its samples give alone, and what transformers' own model gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.step.builders import a_batch, a_config, a_family, a_sequence, gradients_of, loss_and_gradients
from trainer.models.qwen2_5_vl_model import PARTS as parts
from trainer.step.packed import PackedModel, place

SAMPLES = [
    a_sequence(1, grid=(1, 6, 10)),
    a_sequence(2, text=19),
    a_sequence(3, grid=(2, 4, 6), text=5),
    a_sequence(4, grid=(1, 12, 4), text=11),
]


def a_packed_model(seed: int = 0) -> PackedModel:
    torch.manual_seed(seed)
    model = parts.build(a_config(), dtype=torch.float32, attn_implementation="segments")
    with torch.no_grad():
        for parameter in model.parameters():  # at the usual 0.02 every token is as likely as any other
            if parameter.ndim > 1:
                parameter.mul_(6)
    family = a_family()
    return PackedModel(model, parts, mean=family.image_mean, std=family.image_std)


def run(model: PackedModel, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_gradients(model, a_family(), batches)


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_a_pack_equals_its_samples_alone() -> None:
    model = a_packed_model()
    want, want_grads = run(model, [a_batch([sample]) for sample in SAMPLES])
    got, got_grads = run(model, [a_batch(SAMPLES, length=160)])
    assert abs(got - want) / want < 1e-6  # measured 8e-8
    for group, want_grad in want_grads.items():
        assert far(got_grads[group], want_grad) < 1e-5, group  # measured 1e-6


def test_without_isolation_the_loss_moves() -> None:
    model = a_packed_model()
    want, _ = run(model, [a_batch([sample]) for sample in SAMPLES])
    got, _ = run(model, [a_batch(SAMPLES, isolated=False)])
    assert abs(got - want) / want > 1e-3


def test_it_is_what_transformers_own_model_gives() -> None:
    """Sample by sample, eager attention, transformers' window code, cross-entropy over full logits."""
    model = a_packed_model()
    reference = parts.build(a_config(), dtype=torch.float32, attn_implementation="eager")
    reference.load_state_dict(model.model.state_dict())
    want = 0.0
    for sample in SAMPLES:
        pixels = model._pixel_values(torch.from_numpy(sample.patches), torch.float32) if sample.grid else None
        logits = reference(
            input_ids=torch.from_numpy(sample.ids)[None],
            position_ids=torch.from_numpy(sample.positions[1:])[:, None],
            pixel_values=pixels,
            image_grid_thw=torch.tensor([sample.grid]) if sample.grid else None,
            use_cache=False,
        ).logits[0]
        rows = np.flatnonzero(sample.targets)
        loss = torch.nn.functional.cross_entropy(logits[rows - 1], torch.from_numpy(sample.ids[rows]), reduction="sum")
        loss.backward()
        want += float(loss.detach())
    got, got_grads = run(model, [a_batch(SAMPLES)])
    assert abs(got - want) / want < 1e-6
    model.model.load_state_dict(reference.state_dict())
    for (name, mine), (_, theirs) in zip(model.model.named_parameters(), reference.named_parameters(), strict=True):
        mine.grad = theirs.grad
        assert theirs.grad is not None or "visual" in name
    for group, grad in gradients_of(model, a_family()).items():
        assert far(got_grads[group], grad) < 1e-4, group  # measured 2e-6


@pytest.mark.parametrize("answers", [(3, 5), (6, 2)])
def test_both_answers_after_a_shared_prompt_equal_two_sequences(answers: tuple[int, int]) -> None:
    from trainer.step.packed import answer_logp

    pair = a_sequence(7, grid=(1, 4, 4), answers=answers)
    model = a_packed_model()
    pack = place(a_batch([SAMPLES[1], pair, SAMPLES[0]], length=128), model, "cpu")
    got = answer_logp(model.token_logp(pack), pack)[0]
    prompt = pair.lengths[0]
    for which, (start, stop) in enumerate(
        ((prompt, prompt + answers[0]), (prompt + answers[0], prompt + sum(answers)))
    ):
        keep = np.r_[0:prompt, start:stop]
        alone = a_sequence(7, grid=(1, 4, 4))
        alone.ids, alone.positions, alone.targets = pair.ids[keep], pair.positions[:, keep], pair.targets[keep]
        alone.lengths = (len(keep),)
        loss, _ = model(place(a_batch([alone]), model, "cpu"))
        assert torch.allclose(got[which], -loss, atol=1e-5)


def test_a_pack_without_pictures_reaches_every_parameter() -> None:
    model = a_packed_model()
    _, grads = run(model, [a_batch([SAMPLES[1]])])
    assert float(grads["vision"].abs().max()) == 0 and float(grads["merger"].abs().max()) == 0
    assert float(grads["llm"].abs().max()) > 0


def test_an_empty_pack_gives_zero_gradients_everywhere() -> None:
    model = a_packed_model()
    loss, grads = run(model, [a_batch([], length=32)])
    assert loss == 0
    assert all(float(grad.abs().max()) == 0 for grad in grads.values())

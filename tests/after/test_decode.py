"""Generation: exact against the model without a cache, and the same whatever the batch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.after.builders import a_family, a_question, a_tokenizer, some_rules
from trainer.after.decode import Ask, Sampling, complete, normalised, pick
from trainer.after.prompts import Prompt, as_prompt, without_media
from trainer.data.encode import encode
from trainer.data.layout import Drop, Fit, layout

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=6, stop=())


@functools.cache
def a_model() -> torch.nn.Module:
    """Random weights, large enough to make answers differ."""
    torch.manual_seed(3)
    model = a_family().build(dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def a_prompt(seed: int = 0, *, width: int = 84, text_only: bool = False) -> Prompt:
    sample, media = a_question(seed=seed, width=width)
    found = (
        as_prompt(without_media(sample), [], 0, some_rules())
        if text_only
        else as_prompt(sample, media, 0, some_rules())
    )
    assert not isinstance(found, Drop)
    return found


def without_cache(prompt: Prompt, count: int) -> list[int]:
    """Greedy, the whole sequence anew for each token, through transformers' own forward."""
    model, ids = a_model(), prompt.ids.tolist()
    positions = prompt.position_ids[1:]
    pixels = normalised(torch.from_numpy(prompt.patches), a_family())
    for step in range(count):
        more = np.full((3, 1), prompt.next_position + step)
        out = model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.from_numpy(positions)[:, None],
            pixel_values=pixels if len(pixels) else None,
            image_grid_thw=torch.from_numpy(prompt.grid_thw) if len(pixels) else None,
            use_cache=False,
        )
        ids.append(int(out.logits[0, -1].argmax()))
        positions = np.concatenate([positions, more], axis=1)
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize(
    "prompt", [a_prompt(), a_prompt(width=140), a_prompt(text_only=True)], ids=["picture", "wide", "text"]
)
@torch.inference_mode()
def test_greedy_answers_equal_those_without_a_cache(prompt: Prompt):
    found = complete(a_model(), [Ask(prompt, (1,))], GREEDY, a_family())
    assert list(found[0][0].ids) == without_cache(prompt, 6)


@torch.inference_mode()
def test_greedy_answers_equal_those_without_a_cache_in_a_batch_of_unequal_prompts():
    prompts = [a_prompt(), a_prompt(width=140), a_prompt(text_only=True)]
    found = complete(a_model(), [Ask(prompt, (1, 2)) for prompt in prompts], GREEDY, a_family())
    for prompt, answers in zip(prompts, found, strict=True):
        assert [list(answer.ids) for answer in answers] == [without_cache(prompt, 6)] * 2


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch():
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12, stop=(a_tokenizer().id("<|im_end|>"),))
    prompts = [a_prompt(), a_prompt(width=140), a_prompt(text_only=True)]
    together = complete(a_model(), [Ask(p, (5, 6, 7)) for p in prompts], sampling, a_family())
    alone = [
        [complete(a_model(), [Ask(p, (seed,))], sampling, a_family())[0][0] for seed in (5, 6, 7)] for p in prompts
    ]
    assert together == alone
    assert len({answer.ids for answers in together for answer in answers}) > 3


def test_prompts_are_tokenised_as_in_training_up_to_the_answer():
    sample, media = a_question()
    rules = some_rules()
    whole = encode(sample, layout(sample, 0, Fit(), rules), media, rules)
    prompt = a_prompt()
    assert prompt.ids.tolist() == whole.ids[: len(prompt.ids)].tolist()
    assert (prompt.position_ids == whole.position_ids[:, : len(prompt.ids)]).all()
    assert whole.label_rows[0] == len(prompt.ids) - 1
    assert (prompt.patches == whole.patches).all()


@pytest.mark.parametrize(
    ("draw", "top_p", "want"),
    [
        (0.0, 1.0, 2),
        (0.49, 1.0, 2),
        (0.51, 1.0, 0),
        (0.999999, 1.0, 1),
        (0.999999, 0.6, 0),
        (0.99, 0.01, 2),
        (1.0, 1.0, 1),
    ],
)
def test_a_token_is_picked_from_the_cut_distribution(draw: float, top_p: float, want: int):
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log()
    sampling = Sampling(temperature=1.0, top_p=top_p, max_new_tokens=1, stop=())
    assert pick(logits, torch.tensor([draw], dtype=torch.float64), sampling).tolist() == [want]


def test_sampled_frequencies_follow_the_probabilities():
    wanted = torch.tensor([0.6, 0.3, 0.1])
    draws = torch.from_numpy(np.random.default_rng(0).random(20000))
    sampling = Sampling(temperature=2.0, top_p=1.0, max_new_tokens=1, stop=())
    found = torch.bincount(pick(wanted.log().expand(20000, 3) * 2, draws, sampling)) / 20000
    assert torch.allclose(found.float(), wanted, atol=0.01)

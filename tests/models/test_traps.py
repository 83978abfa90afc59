"""Rule 7: what makes packed samples see each other without a word, in transformers' attention and in ours.

Two samples of text in one row. `exact`: the second has the logits that it has alone; `leak`: how far they are off;
`not applicable`: the family has no such thing. Ours has an assertion for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.builders import Built
from tests.models.test_whole_path import has_mrope
from trainer.step.attention import register, segment_attention, segments_of
from trainer.step.packed import place

TOLERANCE = 1e-5
FIRST, SECOND = "text", "short"
Note = Callable[..., None]


def in_a_row(built: Built) -> dict[str, Any]:
    """What transformers' model needs to keep two samples apart."""
    pair = [built.encoded[name] for name in (FIRST, SECOND)]
    ids = torch.cat([torch.from_numpy(found.ids) for found in pair])
    rows = torch.cat([torch.from_numpy(found.position_ids) for found in pair], dim=1)
    positions = rows[:, None] if has_mrope(built) else rows[:1]
    return {"input_ids": ids[None], "position_ids": positions, "attention_mask": None, "use_cache": False}


TRAPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "use_cache unset": lambda given: {key: value for key, value in given.items() if key != "use_cache"},
    "mask of ones": lambda given: given | {"attention_mask": torch.ones_like(given["input_ids"])},
    "positions missing": lambda given: {key: value for key, value in given.items() if key != "position_ids"},
    "3 rows": lambda given: given | {"position_ids": given["position_ids"][1:]},
}


def off(built: Built, given: dict[str, Any]) -> float:
    """Largest difference of the second sample's logits from those alone."""
    length = len(built.encoded[SECOND].ids)
    with torch.no_grad():
        got = built.theirs(**given).logits[0, -length:]
    want = built.logits(built.mine, built.batch([SECOND]))
    return float((got - want).abs().max())


def test_each_trap_in_transformers_attention(built: Built, note: Note) -> None:
    given = in_a_row(built)
    outcomes = {"as it should be": off(built, given)}
    for name, change in TRAPS.items():
        if name == "3 rows" and not has_mrope(built):
            note(7, **{name: "not applicable"})
            continue
        outcomes[name] = off(built, change(given))
    for name, found in outcomes.items():
        note(7, **{name: f"exact ({found:.0e})" if found < TOLERANCE else f"leak {found:.2g}"})
    if built.hugging_face:
        assert outcomes["as it should be"] < TOLERANCE
    assert max(outcomes.values()) > 1000 * TOLERANCE, "no trap leaks: this test would not see one"


# ---------------------------------------------------------------- ours: each is an error


def pair(built: Built) -> Any:
    return built.batch([FIRST, SECOND])


def test_ours_is_exact(built: Built, note: Note) -> None:
    length = len(built.encoded[SECOND].ids)
    got = built.logits(built.mine, pair(built))[-length:]
    error = float((got - built.logits(built.mine, built.batch([SECOND]))).abs().max())
    note(7, ours=f"exact ({error:.0e})")
    assert error < TOLERANCE


def test_positions_that_do_not_restart_are_refused(built: Built) -> None:
    batch = pair(built)
    through = torch.arange(len(batch.ids)).expand(4, -1).contiguous()
    with pytest.raises(ValueError, match="counts its tokens from"):
        place(replace(batch, position_ids=through), built.mine, "cpu")


def test_three_rows_are_refused(built: Built) -> None:
    batch = pair(built)
    with pytest.raises(ValueError, match="needs \\[4, "):
        place(replace(batch, position_ids=batch.position_ids[1:]), built.mine, "cpu")


def test_a_mask_of_ones_is_refused(built: Built) -> None:
    """By the mask interface, when the family's own model is called with one."""
    from transformers.masking_utils import create_causal_mask

    register()
    config = built.mine.model.config.get_text_config()
    config = config if config._attn_implementation == "segments" else None
    assert config is not None, "the language model attends by segments"
    embeddings = torch.zeros(1, 6, 4)
    given = {"config": config, "inputs_embeds": embeddings, "past_key_values": None}
    ones = torch.ones(1, 6, dtype=torch.int64)
    assert create_causal_mask(attention_mask=None, **given) is None
    with pytest.raises(ValueError, match="no attention mask"):
        create_causal_mask(attention_mask=ones, **given)


def test_a_cache_a_missing_table_and_a_mask_are_refused_by_attention() -> None:
    heads = [torch.zeros(1, 2, 5, 4) for _ in range(3)]
    module, segments = torch.nn.Module(), segments_of(torch.tensor([[0, 5, 0, -1]]).numpy())
    segment_attention(module, *heads, None, segments=segments)  # negative control: nothing is wrong with the rest
    with pytest.raises(ValueError, match="needs the segment table"):
        segment_attention(module, *heads, None)
    with pytest.raises(ValueError, match="without a mask"):
        segment_attention(module, *heads, torch.zeros(1, 1, 5, 5), segments=segments)
    longer = [heads[0], *(torch.zeros(1, 2, 9, 4) for _ in range(2))]
    with pytest.raises(ValueError, match="use_cache=False"):
        segment_attention(module, *longer, None, segments=segments)

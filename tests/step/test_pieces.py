"""Attention, loss, DPO, schedule, freeze plan, FLOPs: each against plain arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.step.builders import a_batch, a_family, a_sequence
from tests.step.test_packed import a_packed_model
from trainer.errors import FreezeError, UsageError
from trainer.flops import Cost
from trainer.models import freeze
from trainer.recipe import Dpo, Optim, Schedule, Train
from trainer.step.attention import segment_attention, segments_of, window_attention, windows_of
from trainer.step.dpo import pair_loss, pairs_of, preference, reference_of
from trainer.step.loss import Head
from trainer.step.mesh import make_mesh
from trainer.step.optim import lr_factor, parameter_groups
from trainer.step.packed import place


@pytest.mark.parametrize(
    ("table", "want"),
    [
        ([(0, 3, 0, -1), (4, 2, 1, -1)], "starts at 4"),
        ([(0, 3, 0, -1), (3, 0, 1, -1)], "0 tokens"),
        ([(0, 3, 0, 1), (3, 2, 0, -1)], "does not come before"),
    ],
)
def test_a_wrong_segment_table_is_refused(table: list[tuple[int, ...]], want: str) -> None:
    with pytest.raises(ValueError, match=want):
        segments_of(np.asarray(table, np.int32))


def test_attention_without_a_table_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="segment table"):
        segment_attention(torch.nn.Identity(), q, q, q, None)


def test_a_child_sees_its_ancestors_and_nobody_else() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    table = np.asarray([(0, 4, 0, -1), (4, 3, 0, 0), (7, 2, 0, 0), (9, 3, 1, -1)], np.int32)
    allowed = torch.zeros(12, 12, dtype=torch.bool)
    for start, length, _, parent in table.tolist():
        for row in range(start, start + length):
            allowed[row, start : row + 1] = True
            if parent >= 0:
                allowed[row, : table[parent][1]] = True
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) / math.sqrt(8)
    want = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    got, _ = segment_attention(torch.nn.Identity(), q, k, v, None, segments=segments_of(table))
    assert torch.allclose(got[0].transpose(0, 1), want[0], atol=1e-6)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [16, 8, 8, 4, 16, 4], [5]])
def test_window_attention_equals_one_call_a_window(lengths: list[int]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 8, requires_grad=True)
    got = window_attention(qkv, windows_of(lengths), 8**-0.5)
    weight = torch.randn_like(got)
    (grad,) = torch.autograd.grad((got * weight).sum(), qkv)
    parts = []
    for part in qkv.split(lengths):
        q, k, v = (t.transpose(0, 1) for t in part.unbind(1))
        parts.append(((q @ k.transpose(1, 2)) * 8**-0.5).softmax(-1).matmul(v).transpose(0, 1))
    want = torch.cat(parts)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), qkv)
    assert torch.allclose(got, want, atol=1e-6) and torch.allclose(grad, want_grad, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_head_gives_the_log_probabilities_of_full_logits(chunk: int) -> None:
    torch.manual_seed(0)
    head = Head(16, 50, bias=False)
    head.chunk_elements = chunk * 50
    hidden, ids, weight = torch.randn(23, 16, requires_grad=True), torch.randint(0, 50, (23,)), torch.randn(23)
    got = head(hidden, ids)
    grads = torch.autograd.grad((got * weight).sum(), [hidden, head.weight])
    want = -cross_entropy(head(hidden), ids, reduction="none")
    wanted = torch.autograd.grad((want * weight).sum(), [hidden, head.weight])
    assert torch.allclose(got, want, atol=1e-5)
    for mine, plain in zip(grads, wanted, strict=True):
        assert torch.allclose(mine, plain, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    head = Head(16, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 16, requires_grad=True)
    head(hidden, torch.tensor([1, 2, 3])).sum().backward()
    assert head.weight.grad is None and hidden.grad is not None


# ---------------------------------------------------------------- dpo


def test_pairs_are_the_two_children_of_a_prompt() -> None:
    table = np.asarray([(0, 4, 0, -1), (4, 3, 0, 0), (7, 2, 0, 0), (9, 3, 1, -1), (12, 1, 1, 3), (13, 1, 1, 3)])
    assert pairs_of(table) == ([(1, 2), (4, 5)], [0, 1])
    with pytest.raises(ValueError, match="1 answers"):
        pairs_of(table[:5])


@pytest.mark.parametrize(
    "settings", [Dpo(beta=0.1), Dpo(beta=0.5, label_smoothing=0.1), Dpo(beta=0.2, sft_weight=0.3)], ids=str
)
def test_the_dpo_loss_equals_a_plain_computation(settings: Dpo) -> None:
    """Prompt + answer as two sequences, cross-entropy of transformers' logits, the paper's formula."""
    pair = a_sequence(7, grid=(1, 4, 4), answers=(3, 5))
    model, reference = a_packed_model(0), a_packed_model(1)
    batch = a_batch([a_sequence(9, answers=(2, 4)), pair], length=96)
    reference.objective = reference_of
    pack = place(batch, reference, "cpu")
    with torch.no_grad():
        answers = reference(pack)[1]["answers"].tolist()
    known = {(0, sample): (row[0], row[1]) for sample, row in zip(pack.pair_samples, answers, strict=True)}
    model.objective = preference(settings)
    loss, figures = model(place(batch, model, "cpu", reference=known))
    loss.backward()
    want = torch.zeros(())
    for sequence in (a_sequence(9, answers=(2, 4)), pair):
        logps, lengths = [], []
        for which in (0, 1):
            prompt = sequence.lengths[0]
            start = prompt + (sequence.lengths[1] if which else 0)
            keep = np.r_[0:prompt, start : start + sequence.lengths[1 + which]]
            alone = a_sequence(0)
            alone.ids, alone.positions = sequence.ids[keep], sequence.positions[:, keep]
            alone.targets, alone.lengths = sequence.targets[keep], (len(keep),)
            alone.grid, alone.patches = sequence.grid, sequence.patches
            logps.append([m.token_logp(place(a_batch([alone]), m, "cpu")).sum().detach() for m in (model, reference)])
            lengths.append(sequence.lengths[1 + which])
        margin = settings.beta * ((logps[0][0] - logps[0][1]) - (logps[1][0] - logps[1][1]))
        smooth = settings.label_smoothing
        want += -(1 - smooth) * torch.log(torch.sigmoid(margin)) - smooth * torch.log(torch.sigmoid(-margin))
        want += -settings.sft_weight * logps[0][0] / lengths[0]
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-5)
    assert float(figures["loss_sum"]) == pytest.approx(float(want), rel=1e-5)


def test_without_a_change_the_dpo_loss_is_log_2() -> None:
    assert float(pair_loss(torch.zeros(1), 0.1, 0.0)) == pytest.approx(math.log(2))


def test_a_pack_of_pairs_without_a_reference_is_refused() -> None:
    model = a_packed_model()
    model.objective = preference(Dpo())
    with pytest.raises(ValueError, match="reference"):
        model(place(a_batch([a_sequence(9, answers=(2, 4))]), model, "cpu"))


# ---------------------------------------------------------------- schedule, groups


def test_the_learning_rate_rises_and_falls_as_stated() -> None:
    schedule = Schedule(packs_per_step=1, warmup=0.2, min_lr_ratio=0.1)
    factors = [lr_factor(step, 10, schedule) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[1:]))
    constant = Schedule(packs_per_step=1, warmup=0.0, kind="constant")
    assert {lr_factor(step, 10, constant) for step in range(10)} == {1.0}
    assert lr_factor(0, 1, Schedule(packs_per_step=1)) == 1.0


def test_norms_and_biases_are_not_decayed_and_groups_have_their_rates() -> None:
    model = a_packed_model().model
    groups = parameter_groups(model.named_parameters(), a_family().group_of, Optim(lr=1e-3, lr_of={"vision": 5e-4}))
    assert {(g["group"], g["weight_decay"] > 0) for g in groups} == {
        (name, decayed) for name in ("vision", "merger", "llm") for decayed in (True, False)
    }
    assert {g["lr"] for g in groups if g["group"] == "vision"} == {5e-4}
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_sequence_parallelism_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"compute\.sequence_parallel"):
        make_mesh(0, 4, 2)


# ---------------------------------------------------------------- freeze proof


def a_proof(**changes: Any) -> Any:
    names = [name for name, _ in a_packed_model().model.named_parameters()]
    plan = freeze.freeze_plan(names, a_family(), Train(vision=False, merger=True, llm=True))
    digests = {name: f"digest of {name}" for name in plan}
    facts = {
        "sizes": dict.fromkeys(plan, 3),
        "read": digests,
        "handed_over": digests,
        "changed_in_memory": (),
        "moved": {name: entry.group != "vision" for name, entry in plan.items()},
    }
    return freeze.prove(plan, **(facts | changes))


def test_the_freeze_table_has_a_row_per_group() -> None:
    rows = {row.group: row for row in a_proof()}
    assert {group: row.state for group, row in rows.items()} == {
        "vision": "frozen",
        "merger": "trained",
        "llm": "trained",
    }
    assert rows["vision"].digest_before == rows["vision"].digest_after


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"changed_in_memory": ["visual.patch_embed.proj.weight"]}, "visual.patch_embed.proj.weight"),
        ({"handed_over": {}}, "frozen parameters changed"),
        ({"moved": {}}, "a trained group did not move\n  where: llm, merger"),
    ],
)
def test_the_proof_fails(changes: dict[str, Any], want: str) -> None:
    with pytest.raises(FreezeError, match=want):
        a_proof(**changes)


# ---------------------------------------------------------------- operations


def counted_forward(batch: Any) -> int:
    """Multiply-adds x 2 of every matrix product, as torch counts them while the model runs."""
    from torch.utils.flop_counter import FlopCounterMode

    model = a_packed_model()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(place(batch, model, "cpu"))
    return counter.get_total_flops()


def test_operations_are_those_that_torch_counts() -> None:
    """Every linear layer to the last operation; torch's counter does not know attention on CPU."""
    batch = a_batch([a_sequence(1, grid=(1, 8, 8)), a_sequence(2, text=19)])
    cost = Cost(a_family().shape(), Train(vision=True, merger=True, llm=True))
    segments, grids = batch.segments.tolist(), batch.grid_thw.tolist()
    forward = cost.forward(segments, grids, len(batch.label_ids))
    attention = cost._text_attention(segments) + cost._vision_attention(grids)
    assert forward.total - attention == counted_forward(batch)


def test_attention_is_counted_by_pairs_of_tokens_that_see_each_other() -> None:
    cost = Cost(a_family().shape(), Train(vision=True, merger=True, llm=True))
    layers, width = 2, 48
    pairs = (4 * 5 // 2) + (3 * 4 // 2 + 3 * 4) + (2 * 3 // 2 + 2 * 4)  # a prompt of 4, answers of 3 and 2
    assert cost._text_attention([(0, 4, 0, -1), (4, 3, 0, 0), (7, 2, 0, 0)]) == 4 * width * layers * pairs
    windowed, full = 4 * 16**2 + 2 * 8**2, 80**2  # 8 x 10 patches, windows of 4 x 4: four whole, two of 4 x 2
    assert cost._vision_attention([(1, 8, 10)]) == 4 * 32 * (windowed + full)


def test_windows_and_packing_do_not_inflate_the_count() -> None:
    cost = Cost(a_family().shape(), Train(vision=True, merger=True, llm=True))
    two = cost.forward([(0, 50, 0, -1), (50, 50, 1, -1)], [], 0).llm
    one = cost.forward([(0, 100, 0, -1)], [], 0).llm
    assert two < one and cost.forward([(0, 100, -1, -1)], [], 0).total == 0


@pytest.mark.parametrize(
    ("train", "vision", "llm"),
    [
        ({"vision": True, "merger": True, "llm": True}, 3, 3),
        ({"vision": True, "merger": True, "llm": False}, 3, 2),
        ({"vision": False, "merger": False, "llm": True}, 1, 3),
    ],
)
def test_frozen_parts_cost_less(train: dict[str, bool], vision: int, llm: int) -> None:
    cost = Cost(a_family().shape(), Train(**train))
    grids, table = [(1, 8, 8)], [(0, 40, 0, -1)]
    whole, forward = cost.pack(table, grids, 10), cost.forward(table, grids, 10)
    assert whole.vision / forward.vision == pytest.approx(vision, rel=0.01)
    assert whole.llm / forward.llm == pytest.approx(llm, rel=0.05)  # attention's backward costs 2 also when frozen

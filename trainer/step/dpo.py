"""Direct preference optimisation (arXiv 2305.18290): both answers of a pair lie in one pack after their shared prompt.

    loss of a pair = -(1 - s) log sigmoid(beta margin) - s log sigmoid(-beta margin) + sft_weight * chosen's mean loss
    margin = (log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected))

s is label smoothing (conservative DPO), p0 the model that the stage started from.

Shapes: R pairs, S segments, T target rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from trainer.recipe import Dpo
    from trainer.step.packed import Objective, Pack


def pairs_of(table: np.ndarray) -> tuple[list[tuple[int, int]], list[int]]:
    """((chosen segment, rejected segment), their sample) of int32[S, 4]; the two children of a prompt, in this order.

    Raises:
        ValueError: a prompt has another number of answers than two.
    """
    children: dict[int, list[int]] = {}
    for index, (_, _, _, parent) in enumerate(table.tolist()):
        if parent >= 0:
            children.setdefault(parent, []).append(index)
    for parent, answers in children.items():
        if len(answers) != 2:
            raise ValueError(f"segment {parent} has {len(answers)} answers, expected chosen and rejected")
    return [(a, b) for a, b in children.values()], [int(table[parent][2]) for parent in children]


def preference(settings: Dpo) -> Objective:
    """The objective of a dpo stage: summed over the pack's pairs; the caller divides by the step's number of pairs."""
    from trainer.step.packed import answer_logp

    def objective(logp: Tensor, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        if pack.reference is None:
            raise ValueError("a preference pack needs the reference log-probabilities of its pairs")
        margin = pair_margin(answer_logp(logp, pack), pack.reference)
        loss = pair_loss(margin, settings.beta, settings.label_smoothing).sum() + 0.0 * logp.sum()
        if settings.sft_weight:
            loss = loss + settings.sft_weight * _chosen_mean_loss(logp, pack)
        figures = {
            "loss_sum": loss.detach(),
            "margin_sum": settings.beta * margin.detach().sum(),
            "correct": (margin.detach() > 0).float().sum(),
        }
        return loss, figures

    return objective


def pair_margin(answers: Tensor, reference: Tensor) -> Tensor:
    """fp32[R, 2] and fp32[R, 2] (chosen, rejected) -> fp32[R]."""
    gained = answers - reference
    return gained[:, 0] - gained[:, 1]


def pair_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """fp32[R] -> fp32[R]."""
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def _chosen_mean_loss(logp: Tensor, pack: Pack) -> Tensor:
    """Each chosen answer's cross-entropy per token, summed over the pairs."""
    from trainer.step.loss import segment_sums

    num = len(pack.segments)
    counts = segment_sums(torch.ones_like(logp), pack.label_segment, num).clamp_min(1)
    return -(segment_sums(logp, pack.label_segment, num) / counts)[pack.pairs[:, 0]].sum()


def reference_of(logp: Tensor, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of the pass before training: each pair's log-probabilities, nothing to minimise."""
    from trainer.step.packed import answer_logp

    return logp.sum() * 0.0, {"answers": answer_logp(logp, pack).detach()}

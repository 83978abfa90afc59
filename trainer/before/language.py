"""Before stage1: a language model learns the corpus' language, briefly, on text alone.

The papers start from a trained language model. Here it is trained from scratch for some hundreds of steps and stands in
a folder in the layout of the family's released language model (Qwen2, Qwen3, Llama, Mistral, Qwen), so that what
follows reads it as it would read a real one.
Documents follow each other with end-of-text between them, cut into rows of equal length; sources take turns so that
each gives the same number of tokens.

Shapes: B rows of a step, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from trainer.errors import DataError, NumericsError

ROW_TOKENS = 128
"""Captions and paragraphs are shorter; the attention of longer rows would be wasted on neighbours."""
WEIGHT_DECAY = 0.05
WARMUP = 0.05
CLIP = 1.0
Report = Callable[[int, float], None]
"""(steps done, loss)"""


def train_llm(
    model: nn.Module,
    documents: Sequence[Sequence[Sequence[int]]],
    *,
    steps: int,
    lr: float,
    batch_tokens: int,
    seed: int,
    report: Report = lambda *_: None,
) -> dict[str, float]:
    """Train in place.

    Args:
        documents: per source, per document: token ids, end-of-text included.
        batch_tokens: tokens of one step; at least one row.

    Returns:
        loss_first, loss_last (means over the first and last tenth of the steps), tokens.

    Raises:
        DataError: a source has no text.
        NumericsError: the loss is not finite.
    """
    for number, source in enumerate(documents):
        if not any(source):
            raise DataError("nothing to train the language model on", where=f"text source {number}", got="no document")
    rows = max(1, batch_tokens // ROW_TOKENS)
    stream = rows_of(documents, seed=seed, length=ROW_TOKENS + 1)
    optimizer, schedule = optimizer_of(model, lr=lr, steps=steps)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        ids = torch.from_numpy(np.stack([next(stream) for _ in range(rows)]))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        losses.append(update(model, loss, optimizer, schedule, step, "language model"))
        report(step + 1, losses[-1])
    model.eval()
    return {**ends(losses), "tokens": steps * rows * ROW_TOKENS}


def rows_of(documents: Sequence[Sequence[Sequence[int]]], *, seed: int, length: int) -> Iterator[np.ndarray]:
    """Endless rows int64[length]; the source that has given the fewest tokens so far gives the next document."""
    rng = np.random.default_rng([seed, 1])
    given = [0] * len(documents)
    queues: list[list[int]] = [[] for _ in documents]
    buffer: list[int] = []
    while True:
        while len(buffer) < length:
            source = given.index(min(given))
            if not queues[source]:
                queues[source] = rng.permutation(len(documents[source])).tolist()
            document = documents[source][queues[source].pop()]
            given[source] += max(len(document), 1)
            buffer.extend(document)
        yield np.asarray(buffer[:length], np.int64)
        del buffer[: length - 1]  # the last token is the next row's first input


# ---------------------------------------------------------------- one step, for both models of this folder


def optimizer_of(
    model: nn.Module, *, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, no decay on vectors; warm-up, then cosine to a twentieth."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warm = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
        return min(1.0, (step + 1) / warm) * (0.05 + 0.95 * cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(
    model: nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    step: int,
    what: str,
) -> float:
    """Backward, clip, step; the loss as a number. NumericsError when it is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericsError(
            f"the {what}'s loss is not finite", where=f"init, step {step}", got=value, do="lower its learning rate"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    schedule.step()
    return value


def ends(losses: Sequence[float]) -> dict[str, float]:
    """Means over the first and last tenth; nothing for no steps."""
    if not losses:
        return {}
    tenth = max(1, len(losses) // 10)
    return {"loss_first": math.fsum(losses[:tenth]) / tenth, "loss_last": math.fsum(losses[-tenth:]) / tenth}

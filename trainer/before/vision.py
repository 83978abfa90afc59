"""Before stage1: a vision tower learns what words have to do with pictures, briefly, on image-text pairs.

The papers start from a tower that was trained against text (CLIP, DFN). Here the tower is trained from scratch for some
hundreds of steps to say which tokens a picture's caption has: classification over the vocabulary, each token weighted
by its inverse document frequency (SuperClass, arXiv 2411.03313 section 3: as good as CLIP at scale, without a text
encoder and without large batches). README, "Decisions", has the comparison with the sigmoid loss. The classifier is
thrown away; the merger is not part of it: it starts as the recipe says.

Shapes: B pairs of a step, P patches of all of them, D vision hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer.after.decode import normalised
from trainer.before.language import Report, ends, optimizer_of, update
from trainer.errors import DataError
from trainer.models.family import Family, parts_of

MAX_PIXELS = 84 * 112
"""Of a picture here: small ones teach as much per picture in a fraction of the time; rotary positions carry over to
larger ones (Qwen-VL likewise starts at 224 px and goes on at 448 px)."""


@dataclass(frozen=True)
class Pair:
    patches: np.ndarray
    """uint8[P, 3 * temporal * patch * patch], as Family.patchify gives them."""
    grid: tuple[int, ...]
    """As Family.grid_row gives it."""
    tokens: tuple[int, ...]
    """Of the caption."""


class Classifier(nn.Module):
    """The tower with the head that is thrown away."""

    def __init__(self, model: nn.Module, family: Family, weights: Tensor):
        """
        Args:
            model: the family's torch model, built with attn_implementation="segments".
            weights: float[V], inverse document frequencies; 0 for a token that no caption has.
        """
        super().__init__()
        self.model, self.parts = model, parts_of(family)
        width = family.shape().vision_width
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(weights)))
        self.weights = nn.Buffer(weights, persistent=False)

    def pooled(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """float[B, D]: the mean of each picture's patch features before the merger."""
        plan = self.parts.plan_vision(self.model, grid, pixels.device)
        hidden = self.parts.tower(self.model, pixels, plan)
        sizes = grid[:, :3].prod(dim=1)
        owner = torch.repeat_interleave(torch.arange(len(grid)), sizes).to(hidden.device)
        total = hidden.new_zeros(len(grid), hidden.shape[1]).index_add(0, owner, hidden)
        return total / sizes[:, None].to(hidden)

    def forward(self, pixels: Tensor, grid: Tensor, bags: Tensor) -> Tensor:
        """Mean cross-entropy with the weighted, normalised bags float[B, V] of tokens."""
        wanted = bags * self.weights
        wanted = wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1e-6)
        return -(wanted * self.head(self.pooled(pixels, grid)).log_softmax(dim=1)).sum(dim=1).mean()


def train_vision(
    model: nn.Module,
    family: Family,
    pairs: Sequence[Pair],
    *,
    vocab_size: int,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    report: Report = lambda *_: None,
) -> dict[str, float]:
    """Train the vision tower of `model` (built with attn_implementation="segments") in place; nothing else moves.

    Returns:
        loss_first, loss_last, pairs (seen).

    Raises:
        DataError: fewer pairs than a step takes.
        NumericsError: the loss is not finite.
    """
    if len(pairs) < batch:
        raise DataError(
            "too few image-text pairs to train the vision tower", expected=f"{batch} a step", got=len(pairs)
        )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.group_of(name) == "vision")
    classifier = Classifier(model, family, token_weights([pair.tokens for pair in pairs], vocab_size))
    optimizer, schedule = optimizer_of(classifier, lr=lr, steps=steps)
    rng = np.random.default_rng([seed, 2])
    queue: list[int] = []
    losses: list[float] = []
    for step in range(steps):
        if len(queue) < batch:
            queue += rng.permutation(len(pairs)).tolist()
        chosen = [pairs[index] for index in queue[:batch]]
        del queue[:batch]
        loss = classifier(*inputs_of(chosen, family, vocab_size))
        losses.append(update(classifier, loss, optimizer, schedule, step, "vision tower"))
        report(step + 1, losses[-1])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return {**ends(losses), "pairs": steps * batch}


def token_weights(captions: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """float[V]: log of how rare a token is among the captions; 0 for one that none has, which says nothing."""
    found = np.zeros(vocab_size)
    for caption in captions:
        found[list(set(caption))] += 1
    weights = np.where(found > 0, np.log((1 + len(captions)) / np.maximum(found, 1)), 0.0)
    return torch.from_numpy(weights).float()


def inputs_of(pairs: Sequence[Pair], family: Family, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels float[P, ...], grid int64[B, G], bags float[B, V]) of some pairs."""
    patches = torch.from_numpy(np.concatenate([pair.patches for pair in pairs]))
    grid = torch.tensor([pair.grid for pair in pairs])
    bags = torch.zeros(len(pairs), vocab_size)
    for row, pair in enumerate(pairs):
        bags[row, list(set(pair.tokens))] = 1.0
    return normalised(patches, family), grid, bags


def tower_state(model: nn.Module, family: Family) -> dict[str, Tensor]:
    """The trained tower's tensors by their names in released files, without the merger."""
    return {
        family.hub_name(name): parameter.detach().clone().contiguous()
        for name, parameter in model.named_parameters()
        if family.group_of(name) == "vision"
    }

"""The model as the trainer runs it: one pack in, one loss out.

The order of the parts in forward is that in which ZeRO-3 gathers them, the same on every rank in every micro-batch:
embeddings, vision (exactly once, a dummy where a pack has no picture), language model, head. A rank that left one out
would wait for the others for ever.

Shapes: L tokens, P patches, N visual tokens, S segments, T target rows, C hidden width, R pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainer.models.family import Parts
from trainer.step.attention import Segment, segments_of
from trainer.step.dpo import pairs_of
from trainer.step.loss import segment_sums


class Batch(Protocol):
    """What of data/batch.py's PackedBatch is read here; everything lies on the host."""

    ids: Any  # int64[L]
    position_ids: Any  # int64[4, L]: place in the segment, then t, h, w
    segments: Any  # int32[S, 4]: start, length, sample, parent
    label_rows: Any  # int64[T]: row whose hidden state predicts
    label_ids: Any  # int64[T]
    label_segment: Any  # int32[T]
    patches: Any  # uint8[P, patch width]
    grid_thw: Any  # int64[M, G]: t, h, w first
    visual_index: Any  # int64[N]: rows of ids that pictures fill
    sample_ids: Any  # tuple[str, ...]
    pack: Any  # int: index in the plan


@dataclass(frozen=True)
class Pack:
    """A PackedBatch on the device, with what host and device would otherwise wait for each other to derive."""

    ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    label_rows: Tensor
    label_ids: Tensor
    label_segment: Tensor
    pixels: Tensor
    vision: Any
    visual_index: Tensor
    pairs: Tensor
    """int64[R, 2]: segments of the chosen and the rejected answer."""
    reference: Tensor | None
    """fp32[R, 2]: log-probabilities of both answers before training."""
    sample_ids: tuple[str, ...]
    pair_samples: tuple[int, ...]
    """Which sample of the pack each pair is."""
    index: int
    """Of the pack in the plan."""
    has_pictures: bool

    @property
    def num_targets(self) -> int:
        return self.label_ids.shape[0]


Objective = Callable[[Tensor, Pack], tuple[Tensor, dict[str, Tensor]]]
"""(token log-probabilities fp32[T], pack) -> (loss summed over what it is a mean of, figures without gradient)."""


class PackedModel(nn.Module):
    """A family's model with the loss inside, as DeepSpeed's engine wraps it.

    Args:
        model: the family's torch model, built with attn_implementation="segments".
        parts: the family's torch side.
        mean, std: of pixels / 255, per channel.
        objective: what is minimised.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        objective: Objective | None = None,
    ):
        super().__init__()
        self.model = model
        self.parts = parts
        self.objective = objective or token_sum
        # Not a buffer: DeepSpeed rounds buffers to bf16.
        self._normalise = torch.tensor([mean, std], dtype=torch.float32)

    def forward(self, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.token_logp(pack), pack)

    def exact_buffers(self) -> None:
        """Undo the rounding of rotary frequencies: zero.Init and engine cast every buffer to the weights' dtype, and a
        frequency that is off by 0.4 % turns by radians over a long pack."""
        self.parts.exact_buffers(self.model)

    def token_logp(self, pack: Pack) -> Tensor:
        """fp32[T] for the pack's label rows."""
        hidden = self.hidden(pack)
        return self.parts.head_of(self.model)(hidden[pack.label_rows], pack.label_ids)

    def hidden(self, pack: Pack) -> Tensor:
        """Final hidden states [L, C]."""
        embeddings = self.parts.embed_tokens(self.model, pack.ids)
        vision = self.parts.run_vision(self.model, self._pixel_values(pack.pixels, embeddings.dtype), pack.vision)
        if pack.has_pictures:
            embeddings = embeddings.index_copy(0, pack.visual_index, vision[0].to(embeddings.dtype))
            deeper = vision[1:]
        else:
            for output in vision:  # every output of the vision path gets a gradient, also when nothing reads it
                embeddings = embeddings + 0.0 * output.sum().to(embeddings.dtype)
            deeper = ()
        return self.parts.run_language(
            self.model, embeddings, pack.position_ids, pack.segments, deeper, pack.visual_index
        )

    def _pixel_values(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8[P, 3 * pixels of a channel] -> normalised [P, same]."""
        if self._normalise.device != pixels.device:
            self._normalise = self._normalise.to(pixels.device)
        mean, std = self._normalise
        by_channel = pixels.view(len(pixels), len(mean), -1).float()
        return ((by_channel - 255 * mean[:, None]) / (255 * std[:, None])).view(len(pixels), -1).to(dtype)


def token_sum(logp: Tensor, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over target tokens; the caller divides by the step's global number of them."""
    loss = -logp.sum()
    return loss, {"loss_sum": loss.detach()}


def answer_logp(logp: Tensor, pack: Pack) -> Tensor:
    """Log-probability of each pair's answers: fp32[R, 2]."""
    return segment_sums(logp, pack.label_segment, len(pack.segments))[pack.pairs]


def place(
    batch: Batch,
    model: PackedModel,
    device: torch.device | str,
    *,
    reference: Mapping[tuple[int, int], tuple[float, float]] | None = None,
) -> Pack:
    """Put a batch on the device; packs without pictures get the dummy that keeps ranks in step.

    `reference` has log-probabilities (chosen, rejected) by (pack of the plan, sample in the pack): one sample may come
    twice in a plan, in two renderings.
    """
    table = np.asarray(batch.segments)
    segments = segments_of(table)
    positions = np.asarray(batch.position_ids)
    check_positions(positions, segments)
    grids = _tensor(batch.grid_thw).long()
    patches = _tensor(batch.patches)
    has_pictures = len(grids) > 0
    if not has_pictures:
        grids = torch.tensor([model.parts.dummy_grid(model.model)])
        patches = torch.zeros(_num_patches(grids), patches.shape[-1], dtype=torch.uint8)
    else:
        # Patch arrays come in a few fixed sizes: what is beyond the grids is padding.
        patches = patches[: _num_patches(grids)]
    pairs, samples = pairs_of(table)
    known = None
    if reference is not None:
        found = [reference[batch.pack, sample] for sample in samples]
        known = torch.tensor(found, dtype=torch.float32).reshape(-1, 2)
    on = {"device": device, "non_blocking": True}
    return Pack(
        ids=_tensor(batch.ids).to(**on),
        position_ids=_tensor(positions).to(**on),
        segments=segments,
        label_rows=_tensor(batch.label_rows).long().to(**on),
        label_ids=_tensor(batch.label_ids).long().to(**on),
        label_segment=_tensor(batch.label_segment).long().to(**on),
        pixels=patches.to(**on),
        vision=model.parts.plan_vision(model.model, grids, device),
        visual_index=_tensor(batch.visual_index).long().to(**on),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(**on),
        reference=known.to(**on) if known is not None else None,
        sample_ids=tuple(batch.sample_ids),
        pair_samples=tuple(samples),
        index=batch.pack,
        has_pictures=has_pictures,
    )


def check_positions(positions: np.ndarray, segments: Sequence[Segment]) -> None:
    """Positions of a whole pack, counted through, shift every sample but the first without a word; so do three rows
    instead of four, where a model takes the first for the one that counts tokens.

    Raises:
        ValueError: not int[4, L], or a segment whose count does not begin at 0 (after ancestors: at their length).
    """
    num_tokens = segments[-1].start + segments[-1].length if segments else 0
    if positions.shape != (4, num_tokens):
        raise ValueError(
            f"positions are {list(positions.shape)}, a pack of {num_tokens} tokens needs [4, {num_tokens}]"
        )
    for segment in segments:
        want = sum(stop - start for start, stop in segment.seen)
        if (found := int(positions[0, segment.start])) != want:
            raise ValueError(f"the segment at {segment.start} counts its tokens from {found}, expected {want}")


def _num_patches(grids: Tensor) -> int:
    return int(grids[:, :3].prod(dim=1).sum())


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))

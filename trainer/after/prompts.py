"""What a model is asked: a sample's prompt as arrays, tokenised exactly as in training. Torch-free.

A prompt is laid out as the first segment of a preference pair is: up to and including the open assistant turn, on its
own, so that no token reaches over the border between question and answer.

Shapes: L tokens of the prompt, P patches, M media, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.after.answers import prompt_of
from trainer.after.scores import Frame
from trainer.data.encode import encode
from trainer.data.layout import Drop, Fit, Layout, Rules, fit_sample, layout
from trainer.data.sample import Message, Sample, Text


@dataclass(frozen=True)
class Prompt:
    """As trainer/data/encode.Encoded, without labels."""

    ids: np.ndarray
    position_ids: np.ndarray
    patches: np.ndarray
    grid_thw: np.ndarray
    visual_index: np.ndarray
    layout: Layout

    @property
    def next_position(self) -> int:
        """M-RoPE id of the first answer token (the published rule: one more than the largest id so far)."""
        return int(self.position_ids[1:].max(initial=-1)) + 1


def as_prompt(sample: Sample, media: Sequence[bytes], variant: int, rules: Rules) -> Prompt | Drop:
    """The prompt of a task, shrunk by the same policy as in training where it does not fit.

    Raises:
        DataError: the sample has no question before an answer.
        MediaError: a medium cannot be read.
    """
    pair = paired(sample)
    fitted = fit_sample(pair, variant, rules)
    if isinstance(fitted, Drop):
        return fitted
    found = encode(pair, fitted.layout, media, rules)
    length = fitted.layout.segments[0][1]
    return Prompt(
        ids=found.ids[:length],
        position_ids=found.position_ids[:, :length],
        patches=found.patches,
        grid_thw=found.grid_thw,
        visual_index=found.visual_index,
        layout=fitted.layout,
    )


def paired(sample: Sample) -> Sample:
    """The prompt with two empty answers: the layout of its first segment is the prompt's."""
    nothing = (Message(role="assistant", parts=(Text(text=""),)),)
    return sample.model_copy(
        update={"kind": "preference", "messages": prompt_of(sample), "chosen": nothing, "rejected": nothing}
    )


def without_media(sample: Sample) -> Sample:
    """The same question asked in text alone: what an answer is worth that never saw the picture."""
    messages = tuple(
        message.model_copy(
            update={"parts": tuple(part for part in message.parts if part.part not in ("image", "video"))}
        )
        for message in sample.messages
    )
    return sample.model_copy(update={"messages": messages})


def frame_of(sample: Sample, layout: Layout, rules: Rules, media: int = 0) -> Frame | None:
    """How coordinates that the model writes about a medium become pixels of its file; None without media."""
    span = next((span for span in layout.spans if span.grid is not None and span.media == media), None)
    if span is None or span.grid is None:
        return None
    file, resized = sample.media[media], (span.grid.width, span.grid.height)
    original = (file.width, file.height)
    convention = rules.family.coordinates
    return Frame(file.width, file.height, lambda x, y: convention.to_original(x, y, original, resized))


def as_document_prompt(sample: Sample, media: Sequence[bytes], variant: int, fit: Fit, rules: Rules) -> Prompt | None:
    """The beginning of a document, up to what is read off its pictures: before the first written-out layout, else after
    the last picture. None where nothing stands before it, or the sample was cut to fit."""
    cut = _beginning(sample)
    if cut is None or fit.turns:
        return None
    found = layout(cut, variant, fit, rules)
    encoded = encode(cut, found, media, rules)
    return Prompt(
        ids=encoded.ids[:-1],  # without the end-of-text that closes a document
        position_ids=encoded.position_ids[:, :-1],
        patches=encoded.patches,
        grid_thw=encoded.grid_thw,
        visual_index=encoded.visual_index,
        layout=found,
    )


def _beginning(sample: Sample) -> Sample | None:
    parts = [part for message in sample.messages for part in message.parts]
    if not parts or len(sample.messages) != 1:
        return None
    places = [number for number, part in enumerate(parts) if part.part == "objects"]
    pictures = [number for number, part in enumerate(parts) if part.part in ("image", "video")]
    end = places[0] if places else (pictures[-1] + 1 if pictures else 0)
    if not 0 < end < len(parts):
        return None
    message = sample.messages[0].model_copy(update={"parts": tuple(parts[:end])})
    return sample.model_copy(update={"messages": (message,)})

"""A sample as arrays: ids, positions, labels and uint8 patches. The only place where media are decoded.

Shapes: L tokens, T targets, P patches, M media in reading order, S segments.
A label is (row, id, segment): the hidden state of `row` predicts `id`, a token of `segment`. A segment's first token is
predicted from its parent's last row; without a parent it has no label. Loss code sees T rows and needs no shifting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data import media as images
from trainer.data import video
from trainer.data.layout import Layout, Rules, Span
from trainer.data.sample import Sample
from trainer.errors import CountMismatch, MediaError


@dataclass(frozen=True)
class Encoded:
    ids: np.ndarray
    """int64[L]"""
    position_ids: np.ndarray
    """int64[4, L]: row 0 counts tokens, rows 1-3 are t, h, w"""
    label_rows: np.ndarray
    """int64[T]"""
    label_ids: np.ndarray
    """int64[T]"""
    label_segment: np.ndarray
    """int32[T]"""
    segments: np.ndarray
    """int32[S, 4]: start, length, sample 0, parent"""
    patches: np.ndarray
    """uint8[P, 3 * temporal * patch * patch]"""
    grid_thw: np.ndarray
    """int64[M, 3]"""
    visual_index: np.ndarray
    """int64[V]: rows of ids that take the M media's embeddings, in order"""


def encode(sample: Sample, layout: Layout, media_bytes: Sequence[bytes], rules: Rules, *, where: str = "") -> Encoded:
    """`layout` is layout(sample, variant, fit, rules), `media_bytes` the files of sample.media in that order.

    Raises MediaError, naming the sample, for a file that is missing, damaged or not what its header said.
    """
    where = where or f"{sample.source}/{sample.id}"
    ids, visual = _ids(layout, rules)
    rows, labels, owners = _labels(layout, ids)
    pictures = [_patches(span, sample, media_bytes, rules, where) for span in layout.spans if span.grid is not None]
    width = 3 * rules.family.temporal_patch_size * rules.family.patch_size**2
    patches = np.concatenate(pictures) if pictures else np.zeros((0, width), np.uint8)
    grids = [(span.grid.t, span.grid.h, span.grid.w) for span in layout.spans if span.grid is not None]
    found = (len(ids), len(patches), len(rows))
    if found != (layout.num_tokens, layout.num_patches, layout.num_targets):
        raise CountMismatch(
            "encoded counts differ from the layout's",
            where=where,
            expected=f"{layout.num_tokens} tokens, {layout.num_patches} patches, {layout.num_targets} targets",
            got="{} tokens, {} patches, {} targets".format(*found),
        )
    return Encoded(
        ids=ids,
        position_ids=positions(layout, rules),
        label_rows=rows,
        label_ids=labels,
        label_segment=owners,
        segments=np.array(layout.segments, np.int32).reshape(-1, 4),
        patches=patches,
        grid_thw=np.array(grids, np.int64).reshape(-1, 3),
        visual_index=visual,
    )


def positions(layout: Layout, rules: Rules) -> np.ndarray:
    """int64[4, L]: each segment starts at 0, a child after its parent's last id."""
    family = rules.family
    parts: list[np.ndarray] = []
    for number, (_, _, _, parent) in enumerate(layout.segments):
        start = first = 0
        if parent >= 0:
            start = int(parts[parent][1:].max(initial=-1)) + 1
            first = parts[parent].shape[1]
        parts.append(family.position_ids(layout.spans_of(number), start=start, first=first))
    return np.concatenate(parts, axis=1)


def _ids(layout: Layout, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    marks = rules.family.markers
    pads = {"image": rules.tokenizer.id(marks.image_pad), "video": rules.tokenizer.id(marks.video_pad)}
    ids = np.empty(layout.num_tokens, np.int64)
    visual: list[np.ndarray] = []
    at = 0
    for span in layout.spans:
        end = at + span.num_tokens
        if span.grid is None:
            ids[at:end] = span.ids
        else:
            ids[at:end] = pads[span.kind]
            visual.append(np.arange(at, end))
        at = end
    return ids, np.concatenate(visual) if visual else np.zeros(0, np.int64)


def _labels(layout: Layout, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = {number: start for number, (start, *_) in enumerate(layout.segments)}
    rows: list[np.ndarray] = []
    at: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    begin = 0
    for span in layout.spans:
        end = begin + span.num_tokens
        if span.target:
            tokens = np.arange(begin, end)
            before = tokens - 1
            if begin == starts[span.segment]:
                parent = layout.segments[span.segment][3]
                if parent < 0:
                    tokens, before = tokens[1:], before[1:]
                else:
                    start, length, _, _ = layout.segments[parent]
                    before[0] = start + length - 1
            rows.append(before)
            at.append(tokens)
            owners.append(np.full(len(tokens), span.segment, np.int32))
        begin = end
    if not rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32)
    return np.concatenate(rows), ids[np.concatenate(at)], np.concatenate(owners)


def _patches(span: Span, sample: Sample, media_bytes: Sequence[bytes], rules: Rules, where: str) -> np.ndarray:
    assert span.grid is not None
    file = sample.media[span.media]
    place = f"{where}, media {span.media} ({file.origin or file.digest[:12]})"
    if span.media >= len(media_bytes):
        raise MediaError(
            "the sample's medium is missing",
            where=place,
            expected=f"{len(sample.media)} files",
            got=len(media_bytes),
            do="prepare the source again",
        )
    data, grid, size = media_bytes[span.media], span.grid, (file.width, file.height)
    if file.kind == "image":
        frames = images.decode_image(data, grid.width, grid.height, original=size, where=place)[None]
    else:
        frames = video.decode_video(data, span.frames, file.fps, grid.width, grid.height, original=size, where=place)
    return rules.family.patchify(frames)

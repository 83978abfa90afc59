"""A sample as arrays: ids, positions, labels and uint8 patches. The only place where media are decoded.

Shapes: L tokens, T targets, P patches, M media in reading order, S segments.
A label is (row, id, segment): the hidden state of `row` predicts `id`, a token of `segment`. A segment's first token is
predicted from its parent's last row; without a parent it has no label. Loss code sees T rows and needs no shifting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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
    """uint8[P, patch width]"""
    grid_thw: np.ndarray
    """int64[M, G]: t, h, w in patches, then what else the family says of a grid (Family.grid_row)"""
    visual_index: np.ndarray
    """int64[V]: rows of ids that take the M media's embeddings, in order"""


def encode(sample: Sample, layout: Layout, media_bytes: Sequence[bytes], rules: Rules, *, where: str = "") -> Encoded:
    """`layout` is layout(sample, variant, fit, rules), `media_bytes` the files of sample.media in that order.

    Raises MediaError, naming the sample, for a file that is missing, damaged or not what its header said.
    """
    where = where or f"{sample.source}/{sample.id}"
    ids, visual = _ids(layout, rules)
    rows, labels, owners = _labels(layout, ids)
    seen = [span for span in layout.spans if span.grid is not None]
    pictures = [
        patches
        for index, spans in groupby(seen, key=lambda span: span.media)
        for patches in _patches(index, list(spans), sample, media_bytes, rules, where)
    ]
    patches = np.concatenate(pictures) if pictures else np.zeros((0, rules.family.patch_width), np.uint8)
    grids = [rules.family.grid_row(span.grid) for span in seen if span.grid is not None]
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
        grid_thw=np.array(grids, np.int64).reshape(len(grids), rules.family.grid_columns),
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
    pads = {"image": marks.image_pad, "video": marks.video_pad}
    ids = np.empty(layout.num_tokens, np.int64)
    visual: list[np.ndarray] = []
    at = 0
    for span in layout.spans:
        end = at + span.num_tokens
        if span.grid is None:
            ids[at:end] = span.ids
        else:
            ids[at:end] = rules.tokenizer.id(pads[span.kind])
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


def _patches(
    index: int, spans: list[Span], sample: Sample, media_bytes: Sequence[bytes], rules: Rules, where: str
) -> list[np.ndarray]:
    """Of spans of one medium that follow each other: a video whose grid rows stand apart is decoded once."""
    file = sample.media[index]
    place = f"{where}, media {index} ({file.origin or file.digest[:12]})"
    if index >= len(media_bytes):
        raise MediaError(
            "the sample's medium is missing",
            where=place,
            expected=f"{len(sample.media)} files",
            got=len(media_bytes),
            do="prepare the source again",
        )
    data, size = media_bytes[index], (file.width, file.height)
    grids = [span.grid for span in spans if span.grid is not None]
    if file.kind == "image":
        picture = images.upright(data, where=place)
        images.check_size(picture.size, size, place)
        return [rules.family.image_patches(picture, grid) for grid in grids]
    numbers = [number for span in spans for number in span.frames]
    if numbers != sorted(numbers):  # the same video, twice in a row
        return [part for span in spans for part in _patches(index, [span], sample, media_bytes, rules, where)]
    width, height = grids[0].width, grids[0].height
    frames = video.decode_video(data, tuple(numbers), file.fps, width, height, original=size, where=place)
    found, at = [], 0
    for span, grid in zip(spans, grids, strict=True):
        found.append(rules.family.video_patches(frames[at : at + len(span.frames)], grid))
        at += len(span.frames)
    return found

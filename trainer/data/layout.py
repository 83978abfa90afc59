"""How a sample lies in a pack: segments, token spans, grids and counts. One pure function for planner and loader.

    rules = rules_of(recipe, stage, rendering, family, tokenizer)
    found = fit_sample(sample, variant, rules)          # Fitted(fit, layout) or Drop(reason); planning only
    layout(sample, variant, found.fit, rules)           # the same layout again, in the loader

Nothing is decoded: grids follow from the sizes in the headers. Shapes: L tokens of a sample, T of them with a target.

Which tokens are targets: document text and its end-of-text; in a chat what the assistant says and its end token; in a
preference the same in the two answers only. Never a vision marker or placeholder. The first token of a segment without
parent has nothing before it that could predict it, so it is no target (`num_targets` counts labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from trainer import resolve
from trainer.data import render, video
from trainer.data.order import id_hash, mix
from trainer.data.pieces import Piece
from trainer.data.sample import Media, Message, Sample, parts_of
from trainer.data.tokenizer import Behind, Tokenizer
from trainer.fields import identity
from trainer.models.family import AspectError, Family, Grid
from trainer.recipe import Pixels, Recipe, Rendering, Stage

VERSION = 2
"""Raised when the same rules give another layout than before; part of the rules' digest."""

Reason = Literal["over_long", "no_target", "aspect", "rendering"]
REASONS: tuple[Reason, ...] = ("over_long", "no_target", "aspect", "rendering")


@dataclass(frozen=True)
class Fit:
    """How a sample was made to fit. All zero: as it is. `image_max` is a pixel limit below the rules', `max_frames` a
    frame limit below the rules', `turns` how many messages (parts, of a document) were left out."""

    image_max: int = 0
    max_frames: int = 0
    turns: int = 0

    def row(self) -> list[int]:
        return [self.image_max, self.max_frames, self.turns]


@dataclass(frozen=True)
class Drop:
    """A sample that is not used, and why: counted, never silent."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Span:
    """Tokens of one kind. `ids` of text and markers; `frames` are source frame numbers of a video."""

    kind: Literal["text", "image", "video"]
    segment: int
    num_tokens: int
    ids: tuple[int, ...] = ()
    target: bool = False
    media: int = -1
    grid: Grid | None = None
    frames: tuple[int, ...] = ()
    seconds_per_grid: float = 0.0


@dataclass(frozen=True)
class Layout:
    """`segments` are (start, length, sample, parent) with sample 0 and parent as in PackedBatch."""

    spans: tuple[Span, ...]
    segments: tuple[tuple[int, int, int, int], ...]
    num_tokens: int
    num_patches: int
    num_targets: int
    num_visual_tokens: int

    def spans_of(self, segment: int) -> list[Span]:
        return [span for span in self.spans if span.segment == segment]


@dataclass(frozen=True)
class Fitted:
    fit: Fit
    layout: Layout


@dataclass(frozen=True)
class Rules:
    """Everything that a layout depends on besides the sample and its variant."""

    family: Family
    tokenizer: Tokenizer
    rendering: Rendering
    pixels: Pixels
    length: int
    patch_budget: int
    over_long: Literal["shrink", "drop"] = "shrink"

    def facts(self) -> dict[str, Any]:
        return {
            "layout": VERSION,
            "render": render.VERSION,
            "family": self.family.layout_facts(),
            "tokenizer": self.tokenizer.digest,
            "rendering": self.rendering,
            "pixels": identity(self.pixels),
            "length": self.length,
            "patch_budget": self.patch_budget,
            "over_long": self.over_long,
        }

    @cached_property
    def digest(self) -> str:
        """What counts are keyed by."""
        return resolve.digest(self.facts())


def rules_of(stage: Stage, rendering: Rendering, family: Family, tokenizer: Tokenizer) -> Rules:
    """The rules of one source in one stage."""
    packing = stage.packing
    return Rules(family, tokenizer, rendering, stage.pixels, packing.length, packing.patch_budget, packing.over_long)


def stage_rules(recipe: Recipe, stage: Stage, family: Family, tokenizer: Tokenizer) -> dict[str, Rules]:
    """Rules per source of a stage's mixture; answers sampled by the run itself are rendered as chat."""
    renderings: dict[str, Rendering] = {name: source.rendering for name, source in recipe.prepare.sources.items()}
    return {name: rules_of(stage, renderings.get(name, "chat"), family, tokenizer) for name in stage.data}


def variant_of(seed: int, epoch: int, source: str, sample_id: str, num_variants: int) -> int:
    """Which rendering a sample gets in an epoch; planning may add to it for repeats within the epoch."""
    return int(mix(seed, epoch, id_hash(source, sample_id)) % num_variants)


def varies(sample: Sample) -> bool:
    """Whether variants can differ: in the frames of a video, or in how objects are written."""
    return any(part.part in ("video", "objects") for part in parts_of(sample))


# ---------------------------------------------------------------- layout


def layout(sample: Sample, variant: int, fit: Fit, rules: Rules) -> Layout:
    """Pure. AspectError: an aspect ratio beyond the family's; ValueError: a message that the rendering has no place
    for."""
    sample = without_turns(sample, fit.turns, rules.rendering)
    seen = _Seen(sample, variant, fit, rules)
    segments = render.render(sample, variant, rules.family, rules.rendering, seen.resized, seen.times)
    spans: list[Span] = []
    table: list[tuple[int, int, int, int]] = []
    start = num_targets = 0
    for number, segment in enumerate(segments):
        behind: Behind = "nothing"
        if segment.parent >= 0:
            behind = "text" if segments[segment.parent].pieces[-1].kind == "text" else "token"
        found = _spans(segment.pieces, number, rules, seen, behind)
        length = sum(span.num_tokens for span in found)
        num_targets += sum(span.num_tokens for span in found if span.target)
        if segment.parent < 0 and found and found[0].target:
            num_targets -= 1
        table.append((start, length, 0, segment.parent))
        start += length
        spans += found
    grids = [span.grid for span in spans if span.grid is not None]
    return Layout(
        spans=tuple(spans),
        segments=tuple(table),
        num_tokens=start,
        num_patches=sum(map(rules.family.patches, grids)),
        num_targets=num_targets,
        num_visual_tokens=sum(map(rules.family.visual_tokens, grids)),
    )


class _Seen:
    """Each medium's grid and frames, computed once a layout."""

    def __init__(self, sample: Sample, variant: int, fit: Fit, rules: Rules):
        self.media, self.variant, self.fit, self.rules = sample.media, variant, fit, rules
        self._known: dict[int, tuple[Grid, video.Frames | None]] = {}

    def __getitem__(self, index: int) -> tuple[Grid, video.Frames | None]:
        if index not in self._known:
            media = self.media[index]
            self._known[index] = _video(media, self) if media.kind == "video" else (_image(media, self), None)
        return self._known[index]

    def resized(self, index: int) -> tuple[int, int]:
        grid = self[index][0]
        return grid.width, grid.height

    def times(self, index: int) -> tuple[float, ...]:
        """Seconds of each row of a video's grid: the middle of the first and the last frame that it shows.

        Each is divided by the rate first, as transformers' Qwen3VLProcessor does: the mean of the frame numbers divided
        once rounds to another tenth of a second in 1 of 80 rows.
        """
        _, frames = self[index]
        if frames is None:
            return ()
        size, fps = self.rules.family.temporal_patch_size, self.media[index].fps
        rows = [frames.numbers[at : at + size] for at in range(0, len(frames.numbers), size)]
        return tuple((row[0] / fps + row[-1] / fps) / 2 for row in rows)


def _image(media: Media, seen: _Seen) -> Grid:
    pixels = seen.rules.pixels
    limit = seen.fit.image_max or pixels.image_max
    return seen.rules.family.image_grid(media.width, media.height, min_pixels=pixels.image_min, max_pixels=limit)


def _video(media: Media, seen: _Seen) -> tuple[Grid, video.Frames]:
    pixels, family = seen.rules.pixels, seen.rules.family
    multiple = family.temporal_patch_size
    count = video.num_selected(
        media.num_frames,
        media.fps,
        sample_fps=pixels.fps[seen.variant % len(pixels.fps)],
        min_frames=pixels.min_frames,
        max_frames=seen.fit.max_frames or pixels.max_frames,
        multiple=multiple,
    )
    grid = family.video_grid(
        count,
        media.width,
        media.height,
        min_pixels=pixels.video_min,
        max_pixels=pixels.video_max,
        total_pixels=pixels.video_total,
    )
    frames = video.select_frames(
        media.num_frames, media.fps, count, multiple=multiple, both_ends=family.frames_to_both_ends
    )
    return grid, frames


def _spans(pieces: Sequence[Piece], segment: int, rules: Rules, seen: _Seen, behind: Behind) -> list[Span]:
    """Text between two special tokens is tokenised as one string, as Hugging Face does; then cut where the target
    changes. A token that begins before the change belongs to what was before. `behind`: what the pieces follow."""
    spans: list[Span] = []
    run: list[Piece] = []
    bos = rules.family.markers.bos
    before = 1 if pieces and pieces[0].kind == "special" and pieces[0].text == bos else 0

    def flush() -> None:
        if run:
            first = len(spans) == before  # the tokenizer adds bos itself: for Hugging Face it is no text
            spans.extend(_text_spans(run, segment, rules.tokenizer, behind if first else "token"))
            run.clear()

    for piece in pieces:
        if piece.kind == "text":
            run.append(piece)
            continue
        flush()
        if piece.kind == "special":
            spans.append(Span("text", segment, 1, (rules.tokenizer.id(piece.text),), piece.target))
        else:
            grid, frames = seen[piece.media]
            numbers, seconds = (frames.numbers, frames.seconds_per_grid) if frames else ((), 0.0)
            if piece.row >= 0:
                size = rules.family.temporal_patch_size
                grid, numbers = replace(grid, t=1), numbers[piece.row * size : (piece.row + 1) * size]
            count = rules.family.visual_tokens(grid)
            spans.append(Span(piece.kind, segment, count, (), False, piece.media, grid, numbers, seconds))
    flush()
    return spans


def _text_spans(run: Sequence[Piece], segment: int, tokenizer: Tokenizer, behind: Behind) -> list[Span]:
    ids, starts = tokenizer.encode_with_starts("".join(piece.text for piece in run), behind=behind)
    spans = []
    token = end = 0
    for number, piece in enumerate(run):
        end += len(piece.text)
        last = number == len(run) - 1
        if not last and run[number + 1].target == piece.target:
            continue
        begin = token
        while token < len(ids) and (last or starts[token] < end):
            token += 1
        if token > begin:
            spans.append(Span("text", segment, token - begin, ids[begin:token], piece.target))
    return spans


# ---------------------------------------------------------------- fitting


def fit_sample(sample: Sample, variant: int, rules: Rules) -> Fitted | Drop:
    """The policy, in order: images with fewer pixels, videos with fewer frames, fewer turns; else dropped by reason.

    Pixels and frames are taken back as far as they fit again when turns had to go.
    """
    try:
        found = _fit(sample, variant, rules)
    except ValueError as error:
        return Drop(reason_of(error), str(error))
    if isinstance(found, Fitted) and found.layout.num_targets == 0:
        return Drop("no_target", "no text in a place that the loss is taken over")
    return found


def reason_of(error: ValueError) -> Reason:
    """What `layout` raised, as a reason to drop the sample."""
    return "aspect" if isinstance(error, AspectError) else "rendering"


def _fit(sample: Sample, variant: int, rules: Rules) -> Fitted | Drop:
    whole = layout(sample, variant, Fit(), rules)
    if _fits(whole, rules):
        return Fitted(Fit(), whole)
    detail = f"{whole.num_tokens} tokens, {whole.num_patches} patches"
    if rules.over_long == "drop":
        return Drop("over_long", detail)
    ladder = _ladder(sample, rules)
    for turns in range(_removable_turns(sample, rules.rendering) + 1):
        least = layout(sample, variant, replace(ladder[-1], turns=turns), rules)
        if not _fits(least, rules):
            continue
        for rung in ladder:
            fit = replace(rung, turns=turns)
            found = layout(sample, variant, fit, rules)
            if _fits(found, rules):
                return Fitted(fit, found)
    return Drop("over_long", detail)


def _fits(found: Layout, rules: Rules) -> bool:
    return found.num_tokens <= rules.length and found.num_patches <= rules.patch_budget


def _ladder(sample: Sample, rules: Rules) -> list[Fit]:
    """Fits from the mildest: image pixels in steps of 0.8 down to image_min, then frames in steps of about 0.8."""
    kinds = {part.part for part in parts_of(sample)}
    pixels = rules.pixels
    rungs = [Fit()]
    if "image" in kinds:
        limit = pixels.image_max
        while limit > pixels.image_min:
            limit = max(int(limit * 0.8), pixels.image_min)
            rungs.append(Fit(image_max=limit))
    if "video" in kinds:
        step = rules.family.temporal_patch_size
        frames = min(pixels.max_frames, max(media.num_frames for media in sample.media))
        least = -(-pixels.min_frames // step) * step
        while frames > least:
            frames = max(int(frames * 0.8) // step * step, least)
            rungs.append(replace(rungs[-1], max_frames=frames))
    return rungs


def _removable_turns(sample: Sample, rendering: Rendering) -> int:
    """How often `without_turns` can take one more away."""
    if rendering == "document":  # something to learn stays: the first part that is not a picture or a video
        parts = [part for message in sample.messages for part in message.parts]
        first = next((at for at, part in enumerate(parts) if part.part not in ("image", "video")), 0)
        return max(len(parts) - 1 - first, 0)
    if sample.chosen:
        return 0  # a pair is compared as a whole
    return max(len(_turn_starts(sample.messages)) - 1, 0)


def without_turns(sample: Sample, turns: int, rendering: Rendering) -> Sample:
    """Without `turns` trailing turns (a turn begins with what the user says); an agent's earliest ones after the first
    message go instead, since the last action is what it learns; a document loses trailing parts."""
    if turns == 0:
        return sample
    if rendering == "document":
        return sample.model_copy(update={"messages": _without_parts(sample.messages, turns)})
    starts = [*_turn_starts(sample.messages), len(sample.messages)]
    if sample.kind == "agent":
        messages = sample.messages[: starts[0]] + sample.messages[starts[turns] :]
    else:
        messages = sample.messages[: starts[-1 - turns]]
    return sample.model_copy(update={"messages": messages})


def _turn_starts(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message.role == "user"]


def _without_parts(messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    kept = list(messages)
    while count and kept:
        last = kept.pop()
        if len(last.parts) > count:
            kept.append(last.model_copy(update={"parts": last.parts[: len(last.parts) - count]}))
            break
        count -= len(last.parts)
    return tuple(kept)

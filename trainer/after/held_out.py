"""The held-out part of each source, as evaluation reads it: which samples, laid out and encoded once for all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from trainer import storage
from trainer.data import media as images
from trainer.data import video
from trainer.data.encode import Encoded, encode
from trainer.data.layout import Drop, Fit, Layout, Rules, fit_sample, rules_of
from trainer.data.order import id_hash, mix
from trainer.data.sample import Sample
from trainer.data.shards import ShardReader, Source
from trainer.data.tokenizer import Tokenizer
from trainer.models import config as configs
from trainer.recipe import Recipe, Stage

VARIANT = 0
"""Every model is asked in the same words."""


@dataclass(frozen=True)
class Item:
    sample: Sample
    media: list[bytes]
    rules: Rules
    fit: Fit
    layout: Layout
    encoded: Encoded

    @property
    def name(self) -> str:
        return f"{self.sample.source}/{self.sample.id}"


def widest_stage(recipe: Recipe) -> Stage:
    """The stage with the longest packs: what fits there is evaluated, with its pixel and frame budgets."""
    return max(recipe.stages.named().values(), key=lambda stage: (stage.packing.length, stage.packing.patch_budget))


def sources_of(recipe: Recipe) -> list[str]:
    """Sources that evaluation reads: those named, else all with held-out data."""
    named = recipe.evaluate.sources or list(recipe.prepare.sources)
    return [name for name in named if recipe.prepare.sources[name].held_out]


def load_items(recipe: Recipe, out: str) -> tuple[list[Item], dict[str, dict[str, int]]]:
    """(items, {source: {reason: how many were not used}}): at most `evaluate.samples` a source, drawn by hash."""
    tokenizer = Tokenizer.load(configs.tokenizer_uri(recipe, out))
    family = configs.family_of(recipe, out)
    stage = widest_stage(recipe)
    items: list[Item] = []
    dropped: dict[str, dict[str, int]] = {}
    for name in sources_of(recipe):
        rules = rules_of(stage, recipe.prepare.sources[name].rendering, family, tokenizer)
        source = Source.open(storage.join(out, "data", "sources", name, "held_out"))
        reader = ShardReader(source)
        for shard, row in drawn(source, name, recipe.seed, recipe.evaluate.samples):
            sample = source.sample(shard, row)
            fitted = fit_sample(sample, VARIANT, rules)
            if isinstance(fitted, Drop):
                reasons = dropped.setdefault(name, {})
                reasons[fitted.reason] = reasons.get(fitted.reason, 0) + 1
                continue
            media = reader.media(shard, row)
            encoded = encode(sample, fitted.layout, media, rules)
            items.append(Item(sample, media, rules, fitted.fit, fitted.layout, encoded))
        reader.close()
    return items, dropped


def drawn(source: Source, name: str, seed: int, count: int) -> list[tuple[int, int]]:
    """(shard, row) of `count` samples, the same for the same seed whatever else the source holds."""
    places = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    order = sorted(places, key=lambda place: int(mix(seed, 0, id_hash(name, source.sample_id(*place)))))
    return sorted(order[:count])


# ---------------------------------------------------------------- other media


def donors(items: Sequence[Item], seed: int) -> dict[int, int]:
    """{item with media: another of its kind whose media it can be shown instead}.

    Media are exchanged among samples of one kind with as many images and videos in the same order, so that nothing
    but what is seen differs. A sample whose pictures nobody else's could replace is left out.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for index, item in enumerate(items):
        if item.encoded.grid_thw.size:
            shape = tuple(file.kind for file in item.sample.media)
            groups.setdefault((item.sample.kind, shape), []).append(index)
    found: dict[int, int] = {}
    for (kind, shape), members in sorted(groups.items()):
        rng = np.random.default_rng([seed, len(kind), len(shape), len(members)])
        order = [members[place] for place in rng.permutation(len(members))]
        for place, index in enumerate(order):
            others = (order[(place + step) % len(order)] for step in range(1, len(order)))
            donor = next((other for other in others if not _share_media(items[index], items[other])), None)
            if donor is not None:
                found[index] = donor
    return found


def _share_media(one: Item, other: Item) -> bool:
    return bool({file.digest for file in one.sample.media} & {file.digest for file in other.sample.media})


def with_media_of(item: Item, donor: Item) -> Encoded:
    """The item's tokens with the donor's pixels, in the item's own grids: the layout stays. A video is decoded
    once, however many grid rows stand apart."""
    parts = []
    seen = [span for span in item.layout.spans if span.grid is not None]
    for index, group in groupby(seen, key=lambda span: span.media):
        spans = [(span, span.grid) for span in group if span.grid is not None]
        file, data, family = donor.sample.media[index], donor.media[index], item.rules.family
        if file.kind == "image":
            picture = images.upright(data, where=donor.name)
            parts += [family.image_patches(picture, grid) for _, grid in spans]
            continue
        last = max(item.sample.media[index].num_frames - 1, 1)
        numbers = [round(number * (file.num_frames - 1) / last) for span, _ in spans for number in span.frames]
        wanted = sorted(set(numbers))
        width, height = spans[0][1].width, spans[0][1].height
        frames = video.decode_video(data, tuple(wanted), file.fps, width, height, where=donor.name)
        at = iter(np.searchsorted(wanted, numbers).tolist())
        parts += [family.video_patches(frames[[next(at) for _ in span.frames]], grid) for span, grid in spans]
    patches = np.concatenate(parts)
    assert patches.shape == item.encoded.patches.shape
    return replace(item.encoded, patches=patches)

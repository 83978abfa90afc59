"""Each family: how exact packing, transformers and the export are, and how much faster packs train than padded batches.

    FAMILY.loss_err, .grad_err_vision, .grad_err_merger, .grad_err_llm    packed against each sample alone
    FAMILY.hf_logits_err, .export_logits_err                              raw files through transformers; our export
    FAMILY.packed_speedup, .packed_speedup_sorted                         against padded batches in random order, and
                                                                          sorted by length
    FAMILY.packed_speedup_wall, .packed_speedup_sorted_wall               the same by the clock on the wall
    FAMILY.padding_bound, .padding_bound_sorted                           what packs without a gap would save

Speed: forward and backward of every sample of the reference mix once, pictures included, the same weights and the same
head in all three. Padded batches go through transformers' own attention with its mask; the model is the family's tiny
recipe's, its language model so deep that the tower has the share of the work that it has when released. The mix is
packing.py's with lengths divided by SHRINK; a sample beyond a pack is cut in all three alike. Samples are rendered as
documents: a chat template's own words are not divided by SHRINK, and LLaVA's 54 a sample would make lengths alike.

Ratios are of processor time: one process with one thread, so on a machine at rest the wall's are the same, and beside
other work they are not. The bound counts matrix products alone, (padded tokens + tower) / (tokens + tower), from
lengths: a fixed number of tokens a picture makes lengths alike and leaves little to save. Attention comes on top:
padded batches attend under a mask, packs sample by sample.
"""

from __future__ import annotations

import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pil
from torch import Tensor, nn

from tests.bench.packing import MIXTURE
from tests.models import builders
from tests.models.builders import Built
from tests.models.test_export import export_errors
from tests.models.test_packing import packing_errors
from tests.models.test_whole_path import whole_path_errors
from trainer.after.decode import normalised
from trainer.data.batch import pack_batch
from trainer.data.encode import Encoded, encode
from trainer.data.layout import Fitted, Rules, fit_sample
from trainer.data.media import digest_of
from trainer.data.packing import pack_windows
from trainer.data.sample import Image, Media, Message, Sample, Text
from trainer.models.family import Family, load_family, parts_of
from trainer.resolve import load_recipe, shipped
from trainer.step.loss import as_head
from trainer.step.packed import PackedModel, place

SHRINK, LENGTH, BATCH, WHOLE = 8, 1024, 8, 0.95
RELEASED = {
    "qwen_vl": 0.291,
    "qwen2_vl": 0.488,
    "qwen2_5_vl": 0.231,
    "qwen3_vl": 0.091,
    "llava": 0.048,
    "llava_next": 0.048,
}
"""Weights that a patch passes in tower and merger over those that a token passes in the language model's layers, in the
smallest model that has a recipe: Qwen-VL 7B, Qwen2-VL 2B, Qwen2.5-VL 3B, Qwen3-VL 4B, LLaVA 7B with CLIP-L/14-336.
The tower's work is the same in packs and in padded batches: it dilutes what packing saves."""
PIXELS_PER_TOKEN = 28 * 28
"""Of a family that sees a picture at its own resolution; what others make of it is theirs."""
TOWER_LAYERS = {"llava": 2, "llava_next": 2}
"""Of the timed model, one of which is used: a language model beside the tiny recipe's four would need 49 layers."""
SQUARE = {"qwen_vl": 112**2}
"""Pixels of a family that brings every picture to its budget: 64 patches for 16 tokens, as 1,024 for 256 released."""


def figures(quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builders.prepare_sources(folder / "sources")
        for family in ["qwen2_5_vl"] if quick else builders.names():
            built = builders.build(family, folder / family, folder / "sources")
            found |= {f"{family}.{key}": value for key, value in _family(built, quick).items()}
    return found


def _family(built: Built, quick: bool) -> dict[str, float]:
    packing = packing_errors(built)
    found = {"loss_err": packing["loss"]}
    found |= {f"grad_err_{group}": packing[group] for group in ("vision", "merger", "llm")}
    if built.hugging_face:
        found["hf_logits_err"] = max(whole_path_errors(built)[0].values())
    found["export_logits_err"] = max(export_errors(built).values())
    return found | speedups(built, 16 if quick else 128, 1 if quick else 2)


# ---------------------------------------------------------------- speed


def speedups(built: Built, num_samples: int, rounds: int, *, batch_size: int = BATCH) -> dict[str, float]:
    """Medians of ratios, taken in turn: packed, random, sorted, packed, ..."""
    family = timed_family(built)
    rules = replace(built.rules, family=family, length=LENGTH, patch_budget=8 * LENGTH)
    samples, members = whole_packs(list(reference_mix(rules, num_samples)))
    torch.manual_seed(1)
    packed = PackedModel(
        family.build(dtype=torch.float32, attn_implementation="segments"), parts_of(family), mean=family.image_mean,
        std=family.image_std,
    )  # fmt: skip
    padded = family.build(dtype=torch.float32)
    padded.load_state_dict(packed.model.state_dict())
    as_head(parts_of(family).head_of(padded))
    packs = [batch_of(family, rules, [samples[i] for i in pack]) for pack in members]
    order = np.random.default_rng(7).permutation(len(samples)).tolist()
    by_length = sorted(order, key=lambda index: len(samples[index].ids))
    padded_id = rules.tokenizer.id(family.markers.eos)

    def in_batches(indices: Sequence[int]) -> Callable[[], float]:
        rows = [[samples[i] for i in indices[at : at + batch_size]] for at in range(0, len(indices), batch_size)]
        return lambda: sum(padded_loss(family, padded, row, padded_id) for row in rows)

    ways: dict[str, Callable[[], float]] = {
        "packed": lambda: sum(packed_loss(packed, batch) for batch in packs),
        "random": in_batches(order),
        "sorted": in_batches(by_length),
    }
    for warm in (in_batches(by_length[:BATCH]), lambda: packed_loss(packed, packs[-1])):
        warm()
    ratios = [ratios_of(ways) for _ in range(rounds)]
    tokens, patches = (sum(len(getattr(sample, field)) for sample in samples) for field in ("ids", "patches"))
    padded_to = {
        "": padded_tokens(samples, order, batch_size),
        "_sorted": padded_tokens(samples, by_length, batch_size),
    }
    tower = RELEASED[built.name] * patches
    return {
        **{name: statistics.median(found[name] for found in ratios) for name in ratios[0]},
        **{f"padding_bound{name}": (padded + tower) / (tokens + tower) for name, padded in padded_to.items()},
        "fill": tokens / (len(packs) * LENGTH),
        **{f"padded_fill{name}": tokens / padded for name, padded in padded_to.items()},
    }


def ratios_of(ways: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Each way once: how many times as long the padded ones take. All give the same loss."""
    cpu: dict[str, float] = {}
    wall: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name, way in ways.items():
        began = time.process_time(), time.perf_counter()
        losses[name] = way()
        cpu[name], wall[name] = time.process_time() - began[0], time.perf_counter() - began[1]
    assert max(losses.values()) - min(losses.values()) < 1e-4 * losses["packed"], losses
    return {
        f"packed_speedup{suffix}{clock}": times[name] / times["packed"]
        for clock, times in (("", cpu), ("_wall", wall))
        for name, suffix in (("random", ""), ("sorted", "_sorted"))
    }


def timed_family(built: Built) -> Family:
    """The tiny recipe's model with this tokenizer and as many language layers as give the tower its RELEASED share."""
    recipes = {load_recipe(name).family: name for name in reversed(shipped()) if name.startswith("tiny")}
    if built.name not in recipes:
        return built.family
    stated = load_recipe(recipes[built.name]).model.config
    config = copy.deepcopy(stated) if isinstance(stated, dict) else {}
    if built.name in TOWER_LAYERS:
        config["vision_config"]["num_hidden_layers"] = TOWER_LAYERS[built.name]
    family = load_family(built.name, config)
    shape = family.shape()
    share = (shape.patch_weights + shape.merger_weights) / shape.text_weights
    config = family.with_tokens(built.tokenizer.id)
    text = family.text_config(config)
    text.setdefault("vocab_size", built.tokenizer.vocab_size)
    text["num_hidden_layers"] = round(shape.text_layers * share / RELEASED[built.name])
    return load_family(built.name, config)


def reference_mix(rules: Rules, count: int) -> Iterator[Encoded]:
    """Samples with the mix's lengths: a picture of noise for the visual share, words for the rest."""
    rules = replace(rules, rendering="document")
    rng = np.random.default_rng(1234)
    kinds = rng.choice(len(MIXTURE), count, p=[share for share, *_ in MIXTURE])
    for number, kind in enumerate(kinds):
        _, median, sigma, visual = MIXTURE[kind]
        tokens = min(rng.lognormal(np.log(median / SHRINK), sigma), LENGTH)
        files = [a_picture(rng, tokens * visual)] if visual else []
        words = " ".join(["picture"] * max(4, int(tokens * (1 - visual))))
        media = tuple(media_of(data, side) for data, side in files)
        message = Message(role="document", parts=(*(Image(media=0) for _ in files), Text(text=words)))
        sample = Sample(id=str(number), source="mix", kind="caption", messages=(message,), media=media)
        limit = SQUARE.get(rules.family.name) or max(rules.pixels.image_min, *(side * side for _, side in files), 0)
        own = replace(rules, pixels=rules.pixels.model_copy(update={"image_max": limit}))
        fitted = fit_sample(sample, 0, own)
        if isinstance(fitted, Fitted):
            yield encode(sample, fitted.layout, [data for data, _ in files], own)


def a_picture(rng: np.random.Generator, tokens: float) -> tuple[bytes, int]:
    side = max(56, round((tokens * PIXELS_PER_TOKEN) ** 0.5))
    sink = io.BytesIO()
    small = Pil.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize((side, side)).save(sink, "PNG")
    return sink.getvalue(), side


def media_of(data: bytes, side: int) -> Media:
    return Media(digest=digest_of(data), kind="image", suffix="png", size_bytes=len(data), width=side, height=side)


def whole_packs(samples: Sequence[Encoded]) -> tuple[list[Encoded], list[list[int]]]:
    """(samples, packs of them): without the last packs, which in a stream of samples the next ones would fill. What is
    left out is left out of padded batches, too."""

    def fill(pack: list[int]) -> float:
        return sum(len(samples[i].ids) for i in pack) / LENGTH

    packs = in_packs(samples)
    packs = [pack for pack in packs if fill(pack) >= WHOLE] or [max(packs, key=fill)]
    kept = sorted(i for pack in packs for i in pack)
    place = {i: number for number, i in enumerate(kept)}
    return [samples[i] for i in kept], [[place[i] for i in pack] for pack in packs]


def in_packs(samples: Sequence[Encoded]) -> list[list[int]]:
    tokens = np.array([len(sample.ids) for sample in samples])
    patches = np.array([len(sample.patches) for sample in samples])
    windows = pack_windows(iter([np.arange(len(samples))]), tokens, patches, length=LENGTH, patch_budget=10**9)
    return [list(map(int, pack)) for packs in windows for pack in packs]


def padded_tokens(samples: Sequence[Encoded], order: Sequence[int], batch_size: int) -> int:
    rows = [[len(samples[i].ids) for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    return sum(len(row) * max(row) for row in rows)


def batch_of(family: Family, rules: Rules, samples: Sequence[Encoded]) -> Any:
    return pack_batch(
        samples, [""] * len(samples), length=LENGTH, pad_id=rules.tokenizer.id(family.markers.eos), pack=0,
        patch_width=family.patch_width, grid_columns=family.grid_columns,
    )  # fmt: skip


def packed_loss(packed: PackedModel, batch: Any) -> float:
    packed.zero_grad()
    loss, _ = packed(place(batch, packed, "cpu"))
    loss.backward()
    return float(loss.detach())


def padded_loss(family: Family, model: nn.Module, row: Sequence[Encoded], pad_id: int) -> float:
    """One padded batch, padding on the right, through transformers' own attention."""
    from transformers import DynamicCache

    parts, width = parts_of(family), max(len(sample.ids) for sample in row)
    model.zero_grad()
    ids = torch.full((len(row), width), pad_id)
    positions = torch.zeros(4, len(row), width, dtype=torch.int64)
    mask = torch.zeros(len(row), width, dtype=torch.int64)
    for number, sample in enumerate(row):
        length = len(sample.ids)
        ids[number, :length] = torch.from_numpy(sample.ids)
        positions[:, number, :length] = torch.from_numpy(sample.position_ids)
        mask[number, :length] = 1
    embeddings = parts.embed_tokens(model, ids.flatten())
    index, deeper = joined(row, "visual_index", width), ()
    if len(index):
        pixels = normalised(torch.from_numpy(np.concatenate([sample.patches for sample in row])), family)
        grids = torch.from_numpy(np.concatenate([sample.grid_thw for sample in row]))
        pictures, *rest = parts.see(model, pixels, grids)
        embeddings, deeper = embeddings.index_copy(0, index, pictures), tuple(rest)
    hidden = parts.read(
        model, embeddings.view(len(row), width, -1), positions, mask=mask, cache=DynamicCache(), deeper=deeper,
        visual_index=index if deeper else None,
    )  # fmt: skip
    rows, targets = joined(row, "label_rows", width), np.concatenate([sample.label_ids for sample in row])
    loss = -parts.head_of(model)(hidden.flatten(0, 1)[rows], torch.from_numpy(targets)).sum()
    loss.backward()
    return float(loss.detach())


def joined(row: Sequence[Encoded], field: str, width: int) -> Tensor:
    """Rows of the flattened batch."""
    parts = [getattr(sample, field) + number * width for number, sample in enumerate(row)]
    return torch.from_numpy(np.concatenate(parts))

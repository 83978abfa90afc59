"""Batched generation with a key-value cache, one device, no ZeRO.

Every prompt is read once, alone and without padding; its cache is then repeated for its answers and laid beside the
others', padded on the left. Each answer draws from its own seeded numbers, so what is drawn depends on (seed, step)
alone: not on which answers share a batch, nor on where an interrupted run began again.

Shapes: B answers of a batch, L tokens of the longest prompt, V vocabulary, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.after.prompts import Prompt
from trainer.models.family import Family, Parts, parts_of

MAX_CACHE_TOKENS = 128 * 1024
"""Tokens of key-value cache in one batch: prompts longer than expected make smaller batches, not a lack of memory."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    prompt: Prompt
    seeds: tuple[int, ...]
    """One an answer."""


@dataclass(frozen=True)
class Completion:
    ids: tuple[int, ...]
    """Without the stop token."""
    finish: Literal["stop", "length"]


@torch.inference_mode()
def complete(model: nn.Module, asks: Sequence[Ask], sampling: Sampling, family: Family) -> list[list[Completion]]:
    """Completions per ask, in order of its seeds. `model` is transformers' own, in eval mode."""
    found: list[list[Completion]] = [[] for _ in asks]
    for batch in _batches(asks, sampling.max_new_tokens):
        for index, completions in zip(batch, _batch(model, [asks[i] for i in batch], sampling, family), strict=True):
            found[index] = completions
    return found


def _batches(asks: Sequence[Ask], new_tokens: int) -> Iterator[list[int]]:
    """Indices of asks of similar length whose caches fit together."""
    order = sorted(range(len(asks)), key=lambda i: (len(asks[i].prompt.ids), i))
    batch: list[int] = []
    for index in order:
        longest = len(asks[index].prompt.ids) + new_tokens
        rows = sum(len(asks[i].seeds) for i in [*batch, index])
        if batch and rows * longest > MAX_CACHE_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _batch(model: nn.Module, asks: Sequence[Ask], sampling: Sampling, family: Family) -> list[list[Completion]]:
    read = [_read(model, ask.prompt, family) for ask in asks]
    repeats = [len(ask.seeds) for ask in asks]
    cache, seen = _side_by_side([caches for caches, _ in read], repeats)
    logits = torch.cat([logits.expand(n, -1) for (_, logits), n in zip(read, repeats, strict=True)])
    places = [(len(ask.prompt.ids), ask.prompt.next_position) for ask in asks for _ in ask.seeds]
    positions = torch.tensor(places, device=logits.device)
    cache.prompt_lengths = positions[:, 0]  # type: ignore[attr-defined]  # Qwen-VL's rotary base goes by them
    draws = np.stack(
        [np.random.default_rng(seed).random(sampling.max_new_tokens) for ask in asks for seed in ask.seeds]
    )
    tokens = _decode(model, family, cache, seen, logits, positions, torch.from_numpy(draws).to(logits.device), sampling)
    rows = iter(tokens.tolist())
    return [[_completion(next(rows), sampling.stop) for _ in ask.seeds] for ask in asks]


def _read(model: nn.Module, prompt: Prompt, family: Family) -> tuple[DynamicCache, Tensor]:
    """The cache of one prompt, and the logits [1, V] after its last token."""
    device = next(model.parameters()).device
    parts = parts_of(family)
    embeddings = parts.embed_tokens(model, torch.from_numpy(prompt.ids).to(device))
    deeper, index = (), None
    if len(prompt.grid_thw):
        pixels = normalised(torch.from_numpy(prompt.patches).to(device), family).to(embeddings.dtype)
        pictures, *deeper = parts.see(model, pixels, torch.from_numpy(prompt.grid_thw).to(device))
        index = torch.from_numpy(prompt.visual_index).to(device)
        embeddings = embeddings.index_copy(0, index, pictures.to(embeddings.dtype))
    positions = torch.from_numpy(prompt.position_ids[:, None]).to(device)
    cache = DynamicCache()
    hidden = parts.read(
        model, embeddings[None], positions, mask=None, cache=cache, deeper=tuple(deeper), visual_index=index
    )
    return cache, _logits(model, parts, hidden)


def _logits(model: nn.Module, parts: Parts, hidden: Tensor) -> Tensor:
    """float32[B, V] after the last token."""
    head: Any = parts.head_of(model)
    return head(hidden[:, -1]).float()


def _side_by_side(caches: Sequence[DynamicCache], repeats: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """One cache [B, K, L, D] a layer, shorter prompts padded on the left, and the mask int64[B, L] of what is real."""
    lengths = [cache.get_seq_length() for cache in caches]
    longest = max(lengths)
    joined = DynamicCache()
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        parts = []
        for which in ("keys", "values"):
            padded = [
                nn.functional.pad(getattr(layer, which), (0, 0, longest - n, 0))
                for layer, n in zip(layers, lengths, strict=True)
            ]
            parts.append(torch.cat([part.expand(n, -1, -1, -1) for part, n in zip(padded, repeats, strict=True)]))
        joined.update(parts[0], parts[1], number)
    mask = [[0] * (longest - n) + [1] * n for n, times in zip(lengths, repeats, strict=True) for _ in range(times)]
    return joined, torch.tensor(mask)


def _decode(
    model: nn.Module,
    family: Family,
    cache: DynamicCache,
    seen: Tensor,
    logits: Tensor,
    positions: Tensor,
    draws: Tensor,
    sampling: Sampling,
) -> Tensor:
    """int64[B, up to max_new_tokens]; what follows a stop token is to be ignored. positions int64[B, 2]: place of the
    first new token, and its rotary id."""
    parts = parts_of(family)
    rows = positions[:, [0, 1, 1, 1]].T[:, :, None]
    seen = seen.to(logits.device)
    stop = torch.tensor(sampling.stop, device=logits.device)
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    tokens = []
    for step in range(sampling.max_new_tokens):
        token = pick(logits, draws[:, step], sampling)
        tokens.append(token)
        done |= torch.isin(token, stop)
        if step + 1 == sampling.max_new_tokens or bool(done.all()):
            break
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        embeddings = parts.embed_tokens(model, token[:, None])
        hidden = parts.read(model, embeddings, rows + step, mask=seen, cache=cache)
        logits = _logits(model, parts, hidden)
    return torch.stack(tokens, dim=1)


def pick(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """int64[B] from logits float[B, V] and uniform numbers float64[B]: the inverse of the cumulated, cut distribution.

    Of the most likely tokens those are kept that begin below top_p of the mass; the most likely one always is.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    probabilities, order = torch.softmax(logits.double() / sampling.temperature, dim=1).sort(
        dim=1, descending=True, stable=True
    )
    before = probabilities.cumsum(dim=1) - probabilities
    kept = torch.where(before < sampling.top_p, probabilities, 0.0)
    cumulated = kept.cumsum(dim=1)
    place = torch.searchsorted(cumulated, (draws * cumulated[:, -1])[:, None], right=True)
    last = (kept > 0).sum(dim=1, keepdim=True) - 1
    return order.gather(1, torch.minimum(place, last))[:, 0]


def _completion(ids: list[int], stop: tuple[int, ...]) -> Completion:
    for at, token in enumerate(ids):
        if token in stop:
            return Completion(tuple(ids[:at]), "stop")
    return Completion(tuple(ids), "length")


def normalised(patches: Tensor, family: Family) -> Tensor:
    """uint8[P, 3 * pixels of a channel] -> float, per channel as the family's processor does."""
    mean = torch.tensor(family.image_mean, device=patches.device)[:, None]
    std = torch.tensor(family.image_std, device=patches.device)[:, None]
    by_channel = patches.view(len(patches), 3, patches.shape[1] // 3).float()
    return ((by_channel - 255 * mean) / (255 * std)).flatten(1)

"""Small models and hand-made packs for the tests of the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer.models.family import Family, load_family
from trainer.step import packed
from trainer.step.packed import PackedModel

VOCAB = 320
IMAGE, VIDEO, START, END, EOS = 301, 302, 303, 304, 300


def a_config(**text: Any) -> dict[str, Any]:
    """A Qwen2.5-VL of two layers a part: windows of 56 px, full attention in one of them."""
    text_config = {
        "model_type": "qwen2_5_vl_text", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "initializer_range": 0.07, "vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "tie_word_embeddings": True,
    } | text  # fmt: skip
    vision_config = {
        "model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 48, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1], "tokens_per_second": 2, "hidden_act": "silu",
    }  # fmt: skip
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def a_family(**text: Any) -> Family:
    return load_family("qwen2_5_vl", a_config(**text))


@dataclass
class Sequence:
    """One sample as the loader would have made it: its segments, each (parent, ids, grid or None)."""

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    grid: tuple[int, int, int] | None
    patches: np.ndarray
    name: str = ""


def a_sequence(
    seed: int, *, grid: tuple[int, int, int] | None = None, text: int = 7, answers: tuple[int, ...] = ()
) -> Sequence:
    """Random tokens, optionally after an image (patches t, h, w), optionally with answers sharing the prompt."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    columns: list[tuple[int, ...]] = []
    patches = np.zeros((0, 3 * 2 * 14 * 14), np.uint8)
    if grid is not None:
        t, h, w = grid
        ids += [START]
        columns += [(0, 0, 0)]
        ids += [IMAGE] * (t * h * w // 4)
        columns += [(1 + a, 1 + b, 1 + c) for a in range(t) for b in range(h // 2) for c in range(w // 2)]
        ids += [END]
        last = 1 + max(t, h // 2, w // 2)
        columns += [(last, last, last)]
        patches = rng.integers(0, 256, (t * h * w, 3 * 2 * 14 * 14), dtype=np.uint8)
    first = columns[-1][0] + 1 if columns else 0
    ids += rng.integers(0, 300, text).tolist()
    columns += [(first + i,) * 3 for i in range(text)]
    lengths, parents = [len(ids)], [-1]
    places = list(range(len(ids)))
    end, prompt = first + text, len(ids)
    for answer in answers:
        ids += rng.integers(0, 300, answer).tolist()
        columns += [(end + i,) * 3 for i in range(answer)]
        places += list(range(prompt, prompt + answer))
        lengths, parents = [*lengths, answer], [*parents, 0]
    array = np.asarray(ids, np.int64)
    targets = (array < 300) & (np.arange(len(ids)) > 0)
    if answers:
        targets &= np.arange(len(ids)) >= prompt
    positions = np.concatenate([[places], np.asarray(columns, np.int64).T])
    return Sequence(array, positions, targets, tuple(lengths), tuple(parents), grid, patches, f"sample-{seed}")


@dataclass
class HandBatch:
    """The fields of a PackedBatch."""

    ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray
    label_rows: np.ndarray
    label_ids: np.ndarray
    label_segment: np.ndarray
    patches: np.ndarray
    grid_thw: np.ndarray
    visual_index: np.ndarray
    sample_ids: tuple[str, ...] = field(default=())
    pack: int = 0


def a_batch(sequences: list[Sequence], *, length: int = 0, isolated: bool = True) -> HandBatch:
    """Pack sequences one after the other, padded to `length`. isolated=False is the classic mistake: one segment."""
    table, rows, labels, owner = [], [], [], []
    at = 0
    for sample, item in enumerate(sequences):
        base = len(table)
        start = 0
        starts = []
        for size, parent in zip(item.lengths, item.parents, strict=True):
            table.append((at + start, size, sample, base + parent if parent >= 0 else -1))
            starts.append(start)
            for place in range(start, start + size):
                if item.targets[place]:
                    before = place - 1 if place > start else starts[parent] + item.lengths[parent] - 1
                    rows.append(at + before)
                    labels.append(item.ids[place])
                    owner.append(len(table) - 1)
            start += size
        at += start
    ids = np.concatenate([item.ids for item in sequences]) if sequences else np.zeros(0, np.int64)
    positions = (
        np.concatenate([item.positions for item in sequences], axis=1) if sequences else np.zeros((4, 0), np.int64)
    )
    if at < length:
        table.append((at, length - at, -1, -1))
        ids = np.concatenate([ids, np.full(length - at, EOS)])
        positions = np.concatenate([positions, np.tile(np.arange(length - at), (4, 1))], axis=1)
    segments = np.asarray(table, np.int32)
    if not isolated:
        segments = np.asarray([(0, len(ids), 0, -1)], np.int32)
    return HandBatch(
        ids=ids,
        position_ids=positions,
        segments=segments,
        label_rows=np.asarray(rows, np.int64),
        label_ids=np.asarray(labels, np.int64),
        label_segment=np.asarray(owner, np.int32),
        patches=np.concatenate([np.zeros((0, 1176), np.uint8), *(item.patches for item in sequences)]),
        grid_thw=np.asarray([item.grid for item in sequences if item.grid], np.int64).reshape(-1, 3),
        visual_index=np.flatnonzero(np.isin(ids, (IMAGE, VIDEO))),
        sample_ids=tuple(item.name for item in sequences),
    )


def gradients_of(model: PackedModel, family: Family) -> dict[str, torch.Tensor]:
    """Flattened gradients per module group; every parameter that is trained has one."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            groups.setdefault(family.group_of(name), []).append(parameter.grad.flatten())
    return {group: torch.cat(found) for group, found in groups.items()}


def loss_and_gradients(
    model: PackedModel, family: Family, batches: Iterable[Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Both summed over batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = model(packed.place(batch, model, "cpu"))
        loss.backward()
        total += float(loss.detach())
    return total, gradients_of(model, family)

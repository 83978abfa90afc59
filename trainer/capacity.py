"""Memory of one rank, worked out before anything is submitted: does the stage fit the GPU it asks for?

    needed = memory_of(recipe, "stage2", config, gpu_bytes=80 * 2**30)
    print(table(needed))

Weights, gradients and optimizer state are exact counts from the model's config. Activations are an estimate (the
formula is in `_activations`); fragmentation and libraries get a flat share. Torch-free. Only Qwen2.5-VL's shape is
known here: other families add one beside `sizes_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ModelError
from trainer.recipe import GROUPS, Recipe

GIB = 2**30
LIBRARIES_BYTES = 2 * GIB
"""CUDA context, NCCL buffers, cuBLAS workspaces: 1.5-2.5 GiB as commonly seen; ours, not measured here."""
FRAGMENTATION = 0.05
LOSS_CHUNK_ROWS = 1024
"""Target rows whose logits exist at a time (trainer/step/loss.py)."""


@dataclass(frozen=True)
class Sizes:
    """Parameters per module group, and what activations depend on."""

    parameters: dict[str, int]
    llm_layers: int
    llm_hidden: int
    llm_intermediate: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vocab: int
    largest_layer: int
    """Elements of the largest decoder layer: what ZeRO-3 gathers at a time, besides the embedding."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    parts: dict[str, int]
    gpu_bytes: int | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """None when no GPU was named."""
        return None if self.gpu_bytes is None else self.total <= self.gpu_bytes


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Counts from a Qwen2.5-VL config.json, with text_config nested (transformers 5) or flat (as released).

    Raises:
        ModelError: the config lacks a field, or is of another family.
    """
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelError(
            "memory is worked out for qwen2_5_vl only", where="config.model_type", got=config.get("model_type")
        )
    text = {**config, **config.get("text_config", {})}
    vision = config.get("vision_config", {})
    try:
        hidden, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
        heads = text["num_attention_heads"]
        kv = hidden // heads * text["num_key_value_heads"]
        vocab = text["vocab_size"]
        v_hidden, v_inner, v_layers = vision["hidden_size"], vision["intermediate_size"], vision["depth"]
        v_out = vision["out_hidden_size"]
    except KeyError as error:
        raise ModelError("the model's config lacks a field", where=f"config.{error.args[0]}") from None
    layer = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv + 3 * hidden * inner + 2 * hidden
    embed = vocab * hidden * (1 if text.get("tie_word_embeddings") else 2)
    patch = 3 * vision.get("temporal_patch_size", 2) * vision.get("patch_size", 14) ** 2
    v_layer = 4 * v_hidden * v_hidden + 4 * v_hidden + 3 * v_hidden * v_inner + 2 * v_inner + v_hidden + 2 * v_hidden
    merged = v_hidden * vision.get("spatial_merge_size", 2) ** 2
    merger = v_hidden + merged * merged + merged + merged * v_out + v_out
    parameters = {
        "vision": patch * v_hidden + v_layers * v_layer,
        "merger": merger,
        "llm": embed + layers * layer + hidden,
    }
    return Sizes(parameters, layers, hidden, inner, v_layers, v_hidden, v_inner, vocab, max(layer, vocab * hidden))


def memory_of(recipe: Recipe, stage: str, config: Mapping[str, Any], *, gpu_bytes: int | None = None) -> Memory:
    """Bytes of one rank of a stage under ZeRO-3, all state on the device.

    Every rank holds 1/W of: weights in the compute dtype, gradients in fp32 (grad_accum_dtype), fp32 masters and two
    moments (12 bytes) of the trained groups; plus the layers gathered at a time, activations and the head's loss.
    """
    sizes, settings = sizes_of(config), recipe.stages.named()[stage]
    compute = settings.compute
    world_size = compute.nodes * compute.gpus_per_node
    width = 2 if compute.precision == "bf16" else 4
    everything = sum(sizes.parameters.values())
    trained = sum(sizes.parameters[group] for group in GROUPS if getattr(settings.train, group))
    gathered = min(everything, 2 * sizes.largest_layer + settings.zero.prefetch_bucket_size)
    persistent = min(everything // 100, settings.zero.param_persistence_threshold)  # norms and biases stay gathered
    parts = {
        "weights": everything * width // world_size,
        "gradients": trained * 4 // world_size,
        "master and moments": trained * 12 // world_size,
        "gathered layers": (gathered + persistent) * width,
        "gradient buckets": min(settings.zero.reduce_bucket_size, trained) * width,
        "activations": _activations(recipe, stage, sizes, width),
        "loss": 2 * LOSS_CHUNK_ROWS * sizes.vocab * 4,
        "libraries": LIBRARIES_BYTES if gpu_bytes is not None else 0,
    }
    parts["fragmentation"] = int(FRAGMENTATION * sum(parts.values()))
    return Memory(parts, gpu_bytes)


def _activations(recipe: Recipe, stage: str, sizes: Sizes, width: int) -> int:
    """Per token and layer about 16 x hidden + 6 x intermediate values live between forward and backward (input,
    norms, q, k, v, attention output, the three of the gated MLP) without checkpointing; with it, each layer's input
    plus one layer whole. A frozen vision tower in front of nothing trained keeps nothing."""
    settings = recipe.stages.named()[stage]
    share = settings.compute.sequence_parallel
    tokens, patches = settings.packing.length // share, settings.packing.patch_budget // share
    llm = _tower(
        tokens, sizes.llm_layers, sizes.llm_hidden, sizes.llm_intermediate, settings.compute.activation_checkpointing
    )
    vision = _tower(
        patches,
        sizes.vision_layers,
        sizes.vision_hidden,
        sizes.vision_intermediate,
        settings.compute.activation_checkpointing,
    )
    if not settings.train.vision:
        vision = patches * (16 * sizes.vision_hidden + 6 * sizes.vision_intermediate)  # one layer at a time
    return (llm + vision) * width


def _tower(tokens: int, layers: int, hidden: int, inner: int, checkpointing: bool) -> int:
    whole = tokens * (16 * hidden + 6 * inner)
    return layers * tokens * hidden + whole if checkpointing else layers * whole


def table(memory: Memory) -> str:
    """One line a part, largest first, and the sum."""
    lines = [
        f"{size / GIB:10.2f} GiB  {name}" for name, size in sorted(memory.parts.items(), key=lambda item: -item[1])
    ]
    lines.append(f"{memory.total / GIB:10.2f} GiB  together")
    if memory.gpu_bytes is not None:
        verdict = "fits" if memory.fits else "does not fit"
        lines.append(f"{memory.gpu_bytes / GIB:10.2f} GiB  of the GPU: {verdict}")
    return "\n".join(lines)

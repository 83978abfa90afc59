"""What the programs on a finished model open: its folder, family, tokenizer, and held-out or asked samples."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer import handover, storage
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ModelError
from trainer.models.family import Family, load_family
from trainer.recipe import Recipe


def tokenizer_folder(recipe: Recipe, out: str) -> str:
    """Where tokenizer.json lies: trained on this run's corpus, named by the recipe, or with the base model."""
    if recipe.model.tokenizer == "corpus":
        return storage.join(out, "data", "tokenizer")
    folder = recipe.model.tokenizer or recipe.model.base
    assert folder is not None, "the recipe's validation demands a tokenizer with init"
    return folder


def tokenizer_of(recipe: Recipe, out: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(recipe, out))


def family_of(recipe: Recipe, model_uri: str) -> Family:
    """The family of a model folder, with the recipe's tokens_per_second."""
    uri = storage.join(model_uri, "config.json")
    try:
        config = storage.read_json(uri)
    except FileNotFoundError:
        raise ModelError(
            "the model folder has no config.json", where=uri, do="hand over the stage's model again"
        ) from None
    return load_family(recipe.family, config, tokens_per_second=recipe.model.tokens_per_second)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """The folder itself, or a temporary copy of one that lies in an object store."""
    if (path := storage.local_path(uri)) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        for name in storage.list_dir(uri):
            storage.download_file(storage.join(uri, name), os.path.join(folder, name))
        yield folder


def device_of_program() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pretrained(uri: str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """transformers' own model from a folder in Hugging Face layout, in eval mode; no code of the trainer in between.

    Several GPUs share one model layer by layer where accelerate is installed: generation of a model that does not fit one.
    """
    from transformers import AutoModelForImageTextToText

    device = device_of_program()
    more: dict[str, Any] = {}
    if device.type == "cuda" and torch.cuda.device_count() > 1 and _has_accelerate():
        more["device_map"] = "auto"
    with local_folder(uri) as folder:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, attn_implementation="sdpa", **more
        )
    if not more:
        model = model.to(device)
    return model.eval()


def _has_accelerate() -> bool:
    import importlib.util

    return importlib.util.find_spec("accelerate") is not None


def result_model(out: str, result: handover.StageResult) -> str:
    """Address of a StageResult's model folder."""
    return handover.model_uri(out, result.model.uri)

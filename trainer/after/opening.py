"""What the programs on a finished model open: its folder, family, tokenizer, and held-out or asked samples."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trainer import handover, storage
from trainer.edge import code_of, told
from trainer.errors import QwenVLError
from trainer.models.family import import_classes_of
from trainer.recipe import Recipe
from trainer.resolve import load_recipe


def asked(about: str | None, *required: str) -> tuple[Recipe, argparse.Namespace]:
    """The recipe that the command line names, and its arguments: --out and `required`; `about` is the docstring."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    for name in ("--recipe", "--out", *required):
        parser.add_argument(name, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    arguments = parser.parse_args()
    return load_recipe(arguments.recipe, arguments.overrides), arguments


def run_program(program: Callable[[], None]) -> None:
    """A process' edge: an error becomes its message on stderr and its exit code."""
    try:
        program()
    except Exception as error:
        if not isinstance(error, QwenVLError):
            traceback.print_exc()
        print(f"error: {told(error)}", file=sys.stderr, flush=True)  # pipelines/local.py knows it by this word
        sys.exit(code_of(error))


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
    """transformers' own model from a folder in Hugging Face layout, in eval mode; no code of the trainer in between but
    the model classes of a family that transformers lacks.

    Several GPUs share one model layer by layer where accelerate is installed: for a model that does not fit one.
    """
    from transformers import AutoModelForImageTextToText

    device = device_of_program()
    more: dict[str, Any] = {}
    if device.type == "cuda" and torch.cuda.device_count() > 1 and _has_accelerate():
        more["device_map"] = "auto"
    with local_folder(uri) as folder:
        import_classes_of(storage.read_json(storage.join(folder, "config.json")).get("model_type", ""))
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, attn_implementation="sdpa", **more
        )
    if not more:
        model = model.to(device)  # type: ignore[arg-type]
    return model.eval()


def _has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def result_model(out: str, result: handover.StageResult) -> str:
    """Address of a StageResult's model folder."""
    return handover.model_uri(out, result.model.uri)

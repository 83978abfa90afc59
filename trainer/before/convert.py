"""A published model folder as the trainer reads one: safetensors of the same keys, config.json, tokenizer.json.

    convert("models/Qwen-VL-Chat", "models/qwen_vl_chat")
    convert("models/vicuna-7b-v1.5", "models/vicuna_7b")      a part: a lone language model or vision tower

Reads *.safetensors, or *.bin (torch.load with weights_only: tensors and nothing else). Of a whole model every tensor's
name and shape is compared with the config before anything is written. A part keeps names, config and tokenizer as they
are: step init compares them with the model that it becomes part of. Files appear whole, and convert.json records each;
the same call again goes on after the last one, and another source, dtype or file size into the same folder is refused.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer import storage
from trainer.after.opening import local_folder
from trainer.before import tiktoken
from trainer.before.init import TOKENIZER_FILES, tokenizer_files
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, ModelError, UsageError
from trainer.models import hub
from trainer.models.family import FAMILIES, Family, Group, class_of, load_family
from trainer.models.files import FileInfo, TensorInfo, plan_files, read_headers
from trainer.progress import Progress
from trainer.resolve import digest

RECORD = "convert.json"
FORMAT = 1
FILE_BYTES = 2 * 1024**3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DERIVED = re.compile(r"(^|\.)(inv_freq|masked_bias|attn\.bias|logn_tensor|position_ids)$")
"""Buffers that old transformers stored beside the weights: computed from the config."""

PARTS: dict[str, Group] = {
    "llama": "llm",
    "mistral": "llm",
    "qwen": "llm",
    "qwen2": "llm",
    "qwen3": "llm",
    "clip": "vision",
    "clip_vision_model": "vision",
}
"""model_type of what is released alone and becomes a part (model.init) -> the part. A `qwen` with `visual` is whole."""
AS_STORED = ("auto_map", "torch_dtype", "dtype", "bf16", "fp16", "fp32")
"""Of a part's config.json: code that lies beside it, and how it was stored."""

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Stored:
    """A tensor of the source: where it lies, and how to read it."""

    file: str
    info: TensorInfo
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Target:
    """What is to be written."""

    kind: str
    """Family of a whole model; group of a part."""
    tensors: dict[str, Stored]
    """By the name that each gets, in order."""
    group_of: Callable[[str], str]
    config: dict[str, Any]
    tokenizer: dict[str, bytes]
    """Its files by name; a part may have none."""


def convert(
    source: str, to: str, *, family: str | None = None, dtype: Dtype | None = None, file_bytes: int = FILE_BYTES
) -> dict[str, Any]:
    """Write folder `to`; returns its record: {format, source, key, files: {name: {sha256, size_bytes}}}.

    Args:
        family: needed only where several families have the config's model_type; named, the folder must hold a whole
            model of it.
        dtype: of the written tensors; None: as stored.

    Raises:
        ModelError: no weights, damaged or quantised ones, or not those of the config.
        DataError: no tokenizer that can be read.
        UsageError: `to` holds another conversion.
    """
    with local_folder(source) as folder:
        config = _config(folder, source)
        part = _part_of(config) if family is None else None
        target = _part(folder, source, config, part) if part else _whole(folder, source, config, family)
        shapes = {name: one.info.shape for name, one in target.tensors.items()}
        written = _dtype(target.tensors, dtype, source)
        planned = plan_files(shapes, target.group_of, written, file_bytes)
        key = digest([FORMAT, target.kind, config, written, file_bytes, _facts(target.tensors)])
        record = _record(to, source, key)
        _write(target.tensors, planned, to, record, written)
        small = {**target.tokenizer, **_small(target.config, planned)}
        for name, data in small.items():
            record["files"][name] = _put(to, name, data)
        storage.write_json(storage.join(to, RECORD), record | {"done": True})
    return record


def _config(folder: str, source: str) -> dict[str, Any]:
    try:
        config = storage.read_json(os.path.join(folder, "config.json"))
    except FileNotFoundError:
        do = "name the folder of a published model; qwenvl fetch model brings one"
        raise ModelError("no model config", where=source, expected="config.json beside the weights", do=do) from None
    except ValueError as error:
        raise ModelError("config.json is damaged", where=source, got=str(error)) from None
    if "quantization_config" in config:
        do = "take the folder with the 16-bit weights"
        method = config["quantization_config"].get("quant_method", "quantised")
        raise ModelError("quantised weights cannot be trained", where=source, got=method, do=do)
    return config


def _whole(folder: str, source: str, config: dict[str, Any], family: str | None) -> Target:
    """A model of a family: its tensors under the hub's names, in the order of the model."""
    known = load_family(family or _family_of(config, source), config)
    tokenizer = _tokenizer(folder, source, known)
    settled = load_family(known.name, known.with_tokens(Tokenizer(tokenizer["tokenizer.json"], source).id))
    stored = {
        settled.hub_name(settled.model_name(name)): one
        for name, one in _stored(folder, source).items()
        if not settled.unused(name)
    }
    wanted = _wanted(settled)
    tied = bool(settled.config.get("tie_word_embeddings"))
    hub.check_names({name: one.info for name, one in stored.items()}, wanted, tied=tied, where=source)
    ordered = {name: stored[name] for name in wanted}
    return Target(known.name, ordered, settled.group_of, settled.export_config(), tokenizer)


def _part_of(config: dict[str, Any]) -> Group | None:
    """Which part the folder holds; None: a whole model."""
    return None if "visual" in config else PARTS.get(config.get("model_type", ""))


def _part(folder: str, source: str, config: dict[str, Any], part: Group) -> Target:
    """A lone language model or tower: everything as it is. The tokenizer of a run is named by its recipe."""
    kept = {key: value for key, value in config.items() if key not in AS_STORED}
    return Target(part, _stored(folder, source), lambda _: part, kept, tokenizer_files(folder))


def _family_of(config: dict[str, Any], source: str) -> str:
    found = [name for name in FAMILIES if class_of(name).model_type == config.get("model_type")]
    if len(found) != 1:
        raise ModelError(
            "cannot tell the family" if found else "a model of no family that is known",
            where=f"{source}/config.json, model_type",
            expected=" or ".join(found)
            or ", ".join(sorted({*PARTS, *(class_of(name).model_type for name in FAMILIES)})),
            got=config.get("model_type"),
            do="name it with --family" if found else None,
        )
    return found[0]


# ---------------------------------------------------------------- what the source has


def _stored(folder: str, source: str) -> dict[str, Stored]:
    """By name. ModelError: files that the index names are not there, or a tensor stands in two files."""
    _check_index(folder, source)
    names = sorted(os.listdir(folder))
    if any(name.endswith(".safetensors") for name in names):
        found = [
            Stored(info.name, entry, _safetensor(os.path.join(folder, info.name), entry.name))
            for info in read_headers(folder)
            for entry in info.tensors
        ]
    else:
        bins = [name for name in names if name.endswith(".bin") and name != "training_args.bin"]
        if not bins:
            raise ModelError("no weights", where=source, expected="*.safetensors or *.bin")
        found = [one for name in bins for one in _pickled(os.path.join(folder, name), f"{source}/{name}")]
    by_name: dict[str, Stored] = {}
    for one in found:
        if DERIVED.search(one.info.name):
            continue
        if (other := by_name.get(one.info.name)) is not None:
            raise ModelError("a tensor stands in two files", where=one.info.name, got=f"{other.file}, {one.file}")
        by_name[one.info.name] = one
    if left := len(found) - len(by_name):
        print(f"convert: {left} buffers that follow from the config are left out", flush=True)
    return by_name


def _check_index(folder: str, source: str) -> None:
    for name in os.listdir(folder):
        if name.endswith(".index.json"):
            files = set(storage.read_json(os.path.join(folder, name)).get("weight_map", {}).values())
            if absent := sorted(file for file in files if not os.path.exists(os.path.join(folder, file))):
                do = "download them; the index says what belongs to the model"
                raise ModelError("files of the model are missing", where=source, got=", ".join(absent), do=do)


def _safetensor(path: str, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def _pickled(path: str, where: str) -> list[Stored]:
    """Mapped, not read: a tensor's bytes come from the file when it is written."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = "a weights file with more than tensors in it, which is not read"
        raise ModelError(what, where=where, got=str(error).splitlines()[0]) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ModelError("a damaged weights file", where=where, got=str(error).splitlines()[0]) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError("not a state_dict", where=where, expected="names and tensors")
    return [
        Stored(
            os.path.basename(path), TensorInfo(name, _name(value.dtype), tuple(value.shape)), lambda value=value: value
        )
        for name, value in content.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return hub.NAMES.get(dtype, str(dtype))


def _wanted(family: Family) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = family.build(dtype=torch.bfloat16)
    return {family.hub_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _dtype(stored: dict[str, Stored], asked: Dtype | None, source: str) -> str:
    if asked is not None:
        return hub.NAMES[DTYPES[asked]]
    found = sorted({one.info.dtype for one in stored.values()})
    if len(found) > 1 or found[0] not in hub.NAMES.values():
        raise ModelError("no single dtype to write", where=source, got=", ".join(found), do="name one with --dtype")
    return found[0]


def _facts(stored: dict[str, Stored]) -> list[Any]:
    return [[name, one.file, one.info.dtype, list(one.info.shape)] for name, one in sorted(stored.items())]


# ---------------------------------------------------------------- writing


def _record(to: str, source: str, key: str) -> dict[str, Any]:
    """What an earlier attempt recorded, or a new one."""
    uri = storage.join(to, RECORD)
    if not storage.exists(uri):
        return {"format": FORMAT, "source": source, "key": key, "files": {}}
    record = storage.read_json(uri)
    if record.get("key") != key:
        got = f"one of {record.get('source')}"
        raise UsageError("the folder holds another conversion", where=to, got=got, do="name another folder")
    return {name: record[name] for name in ("format", "source", "key", "files")}


def _write(stored: dict[str, Stored], planned: list[FileInfo], to: str, record: dict[str, Any], dtype: str) -> None:
    """Every file that is not there with its recorded bytes."""
    torch_dtype = next(value for value, name in hub.NAMES.items() if name == dtype)
    progress = Progress("convert", len(planned), "files")
    for number, info in enumerate(planned, start=1):
        uri = storage.join(to, info.name)
        known = record["files"].get(info.name)
        if known and storage.exists(uri) and storage.sha256_of(uri) == known["sha256"]:
            progress.skipped(number)
            continue
        tensors = {entry.name: stored[entry.name].read().to(torch_dtype).clone() for entry in info.tensors}
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise ModelError("weights that are not finite", where=f"{stored[bad[0]].file}: {bad[0]}")
        record["files"][info.name] = _put(to, info.name, to_bytes(tensors, metadata={"format": "pt"}))
        storage.write_json(storage.join(to, RECORD), record)
        progress.at(number, f"{info.name}, {math.ceil(record['files'][info.name]['size_bytes'] / 1e6)} MB")


def _put(to: str, name: str, data: bytes) -> dict[str, Any]:
    storage.write_bytes(storage.join(to, name), data)
    return {"sha256": storage.sha256_bytes(data), "size_bytes": len(data)}


def _small(config: dict[str, Any], planned: list[FileInfo]) -> dict[str, bytes]:
    where = {entry.name: info.name for info in planned for entry in info.tensors}
    size_bytes = sum(entry.num_bytes for info in planned for entry in info.tensors)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(where.items()))}
    return {"config.json": storage.json_bytes(config), hub.INDEX: storage.json_bytes(index)}


def _tokenizer(folder: str, source: str, family: Family) -> dict[str, bytes]:
    """Its files by name; one made from *.tiktoken where there is no tokenizer.json."""
    names = sorted(os.listdir(folder))
    if "tokenizer.json" in names:
        return tokenizer_files(folder)
    ranks = [name for name in names if name.endswith(".tiktoken")]
    tokens: tuple[str, ...] = getattr(family, "tiktoken_tokens", ())
    if len(ranks) != 1 or not tokens:
        expected = "tokenizer.json" + (", or one *.tiktoken" if tokens else "")
        raise DataError("no tokenizer", where=source, expected=expected, got=", ".join(TOKENIZER_FILES & set(names)))
    with open(os.path.join(folder, ranks[0]), "rb") as file:
        made = tiktoken.tokenizer_of(tiktoken.ranks_of(file.read(), f"{source}/{ranks[0]}"), tokens)
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": storage.json_bytes(family.tokenizer_settings()),
    }

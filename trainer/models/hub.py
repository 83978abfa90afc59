"""Hugging Face layout in and out: safetensors files dealt out over ranks, every byte verified or digested once.

Reading: each file is read and verified by one rank and scattered into the ZeRO-3 partitions of all. Writing: each file
is gathered to one rank, which digests and writes it. Files split at module-group borders, so that a frozen group's
files are copied as they are. Without a process group the same functions work in one process.

    load(model, uri, family, files=..., dtype=...)      -> Digests of the tensors read
    save(model, uri, family, dtype=..., ...)            -> Saved(files, digests)
    save_tensors(tensors, uri, family, dtype=..., ...)  -> the same, from tensors in this process (trainer/before)
    load_tensors(uri)                                   -> {hub name: function that reads the tensor}

A tensor's digest covers its bytes in the hand-over dtype, in chunks of fixed size; names are those of the hub.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from trainer import storage
from trainer.errors import ModelError, QwenVLError
from trainer.handover import ModelFile
from trainer.models.family import Family
from trainer.models.files import FileInfo, TensorInfo, plan_files, read_headers
from trainer.recipe import GROUPS

CHUNK_BYTES = 16 * 1024**2
INDEX = "model.safetensors.index.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Digests = dict[str, str]


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over the sha256 of each 16 MiB of the tensor's bytes: chunks can be digested apart."""
    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    outer = hashlib.sha256()
    for start in range(0, flat.numel(), CHUNK_BYTES):
        outer.update(hashlib.sha256(flat[start : start + CHUNK_BYTES].numpy().data).digest())
    return outer.hexdigest()


# ---------------------------------------------------------------- process group


def _rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _agree(call: Callable[[], Any]) -> list[Any]:
    """Run `call` on every rank, return everyone's result; where it fails anywhere, every rank raises that error."""
    result, failure = None, None
    try:
        result = call()
    except QwenVLError as error:
        failure = error
    rank, world_size = _rank()
    if world_size == 1:
        if failure is not None:
            raise failure
        return [result]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (result, None if failure is None else (type(failure), str(failure))))
    if failure is not None:
        raise failure
    for other, (_, told) in enumerate(everyone):
        if told is not None:
            raise told[0](f"{told[1]}\n  found by: rank {other}")
    return [result if other == rank else found for other, (found, _) in enumerate(everyone)]


# ---------------------------------------------------------------- read


def parameters_by_hub_name(model: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """A tied parameter appears once, under its first name."""
    return {family.hub_name(name): parameter for name, parameter in model.named_parameters()}


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_names(
    found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]], *, tied: bool, where: str
) -> None:
    """
    Raises:
        ModelError: tensors are missing, extra or of another shape; all are listed.
    """
    extra = {name for name in set(found) - set(wanted) if not (tied and name.endswith("lm_head.weight"))}
    problems = [f"missing {name} {list(wanted[name])}" for name in sorted(set(wanted) - set(found))]
    problems += [f"extra {name} {list(found[name].shape)}" for name in sorted(extra)]
    problems += [
        f"{name} is {list(found[name].shape)}, the config says {list(wanted[name])}"
        for name in sorted(set(found) & set(wanted))
        if found[name].shape != wanted[name]
    ]
    if problems:
        raise ModelError(
            "the weights are not those of the config",
            where=where,
            got=f"{len(problems)} problems\n    " + "\n    ".join(problems[:20]),
        )


def load(
    model: nn.Module, uri: str, family: Family, *, files: Mapping[str, ModelFile] | None = None, dtype: torch.dtype
) -> Digests:
    """Fill the model's parameters from a folder. Every rank calls it; each reads its share of the files.

    Args:
        files: digests to verify against (a StageResult's); without them sizes and headers alone are checked.
        dtype: the hand-over dtype, in which tensors are digested.

    Raises:
        ModelError: missing, extra or wrong-shaped tensors, damaged files; the same on every rank.
    """
    rank, world_size = _rank()
    infos: list[FileInfo] = _agree(lambda: read_headers(uri) if rank == 0 else None)[0]
    parameters = parameters_by_hub_name(model, family)
    stored = [entry for info in infos for entry in info.tensors if not family.unused(entry.name)]
    renamed = {family.hub_name(family.model_name(entry.name)): entry for entry in stored}
    tied = bool(family.config.get("tie_word_embeddings"))
    check_names(renamed, {name: shape_of(p) for name, p in parameters.items()}, tied=tied, where=uri)
    digests: Digests = {}
    for first in range(0, len(infos), world_size):
        turn = infos[first : first + world_size]
        tensors: dict[str, Tensor] = {}
        if rank < len(turn):
            tensors = _agree(functools.partial(read_file, uri, turn[rank], files))[rank]
        else:
            _agree(lambda: None)
        for reader, info in enumerate(turn):
            for entry in info.tensors:
                name = family.hub_name(family.model_name(entry.name))
                if name not in parameters:
                    continue  # the head of a tied model, stored twice; a saved buffer
                source = tensors[entry.name] if reader == rank else None
                if source is not None:
                    digests[name] = tensor_digest(source.to(dtype))
                _scatter(parameters[name], source, reader)
    merged: Digests = {}
    for part in _agree(lambda: digests):
        merged |= part
    return merged


def read_file(uri: str, info: FileInfo, files: Mapping[str, ModelFile] | None) -> dict[str, Tensor]:
    """Every tensor of one file, its bytes verified."""
    data = _verified(storage.join(uri, info.name), files.get(info.name) if files else None)
    return _Local(load_bytes(data))


class _Local(dict[str, Tensor]):
    """Tensors that are told to no other rank: pickled as an empty dictionary."""

    def __reduce__(self) -> Any:
        return (dict, ())


def _verified(uri: str, entry: ModelFile | None) -> bytes:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise ModelError("a file of the model is missing", where=uri) from None
    if entry is not None and (found := storage.sha256_bytes(data)) != entry.sha256:
        raise ModelError("a file of the model is damaged", where=uri, expected=entry.sha256, got=found)
    return data


@torch.no_grad()
def _scatter(parameter: nn.Parameter, source: Tensor | None, reader: int) -> None:
    """Give every rank its part of a parameter that `reader` has whole."""
    if not hasattr(parameter, "ds_tensor"):
        if _rank()[1] > 1:
            raise AssertionError("a parameter that ZeRO-3 does not shard: build the model under zero.Init")
        assert source is not None
        parameter.copy_(source)
        return
    part: Any = parameter
    target = part.ds_tensor.data
    parts = None
    if source is not None:
        world_size = _rank()[1]
        flat = torch.zeros(target.numel() * world_size, dtype=target.dtype, device=target.device)
        flat[: source.numel()] = source.to(target.dtype).flatten().to(target.device)
        parts = list(flat.chunk(world_size))
    dist.scatter(target, parts, src=reader)


def load_tensors(uri: str, files: Mapping[str, ModelFile] | None = None) -> dict[str, Callable[[], Tensor]]:
    """{stored name: read it} of a folder, in this process; a file is read when its first tensor is, and kept."""

    @functools.cache
    def content(name: str) -> dict[str, Tensor]:
        return load_bytes(_verified(storage.join(uri, name), files.get(name) if files else None))

    def reader(file: str, tensor: str) -> Callable[[], Tensor]:
        return lambda: content(file)[tensor]

    return {entry.name: reader(info.name, entry.name) for info in read_headers(uri) for entry in info.tensors}


# ---------------------------------------------------------------- write


@dataclass(frozen=True)
class Saved:
    files: dict[str, ModelFile]
    """Every file of the folder."""
    digests: Digests
    """Of every tensor, as handed over."""
    copied: tuple[str, ...]
    """Files that were copied from the parent."""


def save(
    model: nn.Module,
    uri: str,
    family: Family,
    *,
    dtype: torch.dtype,
    file_bytes: int,
    parent: tuple[str, Mapping[str, ModelFile]] | None = None,
    frozen_groups: frozenset[str] = frozenset(),
) -> Saved:
    """Write the model's weights and config.json; every rank calls it.

    Args:
        parent: the folder that training started from: its files that hold only frozen groups are copied, and what is
            neither weights nor config (tokenizer) is taken over. What is not trained and the model computes with in
            fewer bits than are handed over comes from there, too: frozen bytes stay, whatever a bf16 step rounds.
    """
    parameters = parameters_by_hub_name(model, family)
    as_stored = _as_stored(parameters, parent, family, dtype) if parent else {}
    shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
    copies = _copies(parent, shapes, frozen_groups, family, NAMES[dtype]) if parent else {}
    done = {entry.name for info in copies.values() for entry in info.tensors}
    planned = plan_files({n: s for n, s in shapes.items() if n not in done}, family.group_of, NAMES[dtype], file_bytes)
    rank, world_size = _rank()
    with ThreadPoolExecutor(max_workers=1) as writer:
        jobs: list[Future[tuple[str, ModelFile, Digests]]] = []
        for number, info in enumerate(planned):
            owner = number % world_size
            tensors = {}
            for entry in info.tensors:
                whole = _gather(parameters[entry.name], owner)
                if whole is not None:
                    tensors[entry.name] = whole.to(dtype)
            if rank == owner:
                jobs.append(writer.submit(_write_file, storage.join(uri, info.name), info.name, tensors, as_stored))
        for number, name in enumerate(sorted(copies)):
            if rank == number % world_size:
                assert parent is not None
                jobs.append(writer.submit(_copy_file, parent, storage.join(uri, name), name))
        results = _agree(lambda: [job.result() for job in jobs])
    written = [item for part in results for item in part]
    infos = [*planned, *copies.values()]
    small = _agree(lambda: _write_small(uri, family, infos, parent) if rank == 0 else {})[0]
    digests: Digests = {}
    for _, _, found in written:
        digests |= found
    return Saved({name: entry for name, entry, _ in written} | small, digests, tuple(sorted(copies)))


def save_tensors(
    tensors: Mapping[str, Callable[[], Tensor]],
    uri: str,
    family: Family,
    *,
    dtype: torch.dtype,
    file_bytes: int,
    extra: Mapping[str, bytes] | None = None,
) -> Saved:
    """Write a folder from this process. `tensors` are read one file at a time; `extra` files (tokenizer) go beside."""
    shapes = {name: tuple(read().shape) for name, read in tensors.items()}
    planned = plan_files(shapes, family.group_of, NAMES[dtype], file_bytes)
    written = [
        _write_file(
            storage.join(uri, info.name), info.name, {t.name: tensors[t.name]().to(dtype) for t in info.tensors}
        )
        for info in planned
    ]
    files = {name: entry for name, entry, _ in written} | _write_small(uri, family, planned, None)
    for name, data in (extra or {}).items():
        files[name] = _put(storage.join(uri, name), data)
    return Saved(files, {name: digest for _, _, found in written for name, digest in found.items()}, ())


@torch.no_grad()
def _gather(parameter: nn.Parameter, owner: int) -> Tensor | None:
    """The whole parameter on rank `owner`, in host memory."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().cpu()
    rank, world_size = _rank()
    sharded: Any = parameter
    own = sharded.ds_tensor.data
    parts = [torch.empty_like(own) for _ in range(world_size)] if rank == owner else None
    dist.gather(own, parts, dst=owner)
    if parts is None:
        return None
    shape = shape_of(parameter)
    return torch.cat(parts)[: torch.Size(shape).numel()].view(shape).cpu()


def _write_file(
    uri: str, name: str, tensors: dict[str, Tensor], as_stored: Mapping[str, Callable[[], Tensor]] | None = None
) -> tuple[str, ModelFile, Digests]:
    again = {key: read for key, read in (as_stored or {}).items() if key in tensors}
    tensors |= {key: read().to(tensors[key].dtype) for key, read in again.items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    data = save_bytes(tensors, metadata={"format": "pt"})
    return name, _put(uri, data), {key: tensor_digest(value) for key, value in tensors.items()}


def _copy_file(parent: tuple[str, Mapping[str, ModelFile]], uri: str, name: str) -> tuple[str, ModelFile, Digests]:
    folder, files = parent
    data = _verified(storage.join(folder, name), files.get(name))
    return name, _put(uri, data), {key: tensor_digest(value) for key, value in load_bytes(data).items()}


def _put(uri: str, data: bytes) -> ModelFile:
    storage.write_bytes(uri, data)
    return ModelFile(sha256=storage.sha256_bytes(data), size_bytes=len(data))


def _copies(
    parent: tuple[str, Mapping[str, ModelFile]],
    shapes: Mapping[str, tuple[int, ...]],
    frozen_groups: frozenset[str],
    family: Family,
    dtype: str,
) -> dict[str, FileInfo]:
    """The parent's files that hold tensors of frozen groups only, in the hand-over dtype and under today's names."""
    infos: list[FileInfo] = _agree(lambda: read_headers(parent[0]) if _rank()[0] == 0 else None)[0]
    return {
        info.name: info
        for info in infos
        if all(t.name in shapes and t.dtype == dtype and family.group_of(t.name) in frozen_groups for t in info.tensors)
    }


def _as_stored(
    parameters: Mapping[str, nn.Parameter],
    parent: tuple[str, Mapping[str, ModelFile]],
    family: Family,
    dtype: torch.dtype,
) -> dict[str, Callable[[], Tensor]]:
    """How to read, from the parent, what is not trained and lies rounded in the model. Every rank calls it."""
    bits = torch.finfo(dtype).bits
    rounded = {name for name, p in parameters.items() if not p.requires_grad and torch.finfo(p.dtype).bits < bits}
    stored: dict[str, Callable[[], Tensor]] = {}
    if rounded:
        _agree(lambda: stored.update(load_tensors(*parent)))
    return {name: read for found, read in stored.items() if (name := family.hub_name(found)) in rounded}


def _write_small(
    uri: str, family: Family, infos: list[FileInfo], parent: tuple[str, Mapping[str, ModelFile]] | None
) -> dict[str, ModelFile]:
    """config.json, the index of the weights, and what the parent has beside its weights."""
    size_bytes = sum(t.num_bytes for info in infos for t in info.tensors)
    where = {t.name: info.name for info in infos for t in info.tensors}
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(where.items()))}
    files = {}
    for name, value in (("config.json", family.export_config()), (INDEX, index)):
        files[name] = _put(storage.join(uri, name), (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
    for name, entry in sorted(parent[1].items()) if parent else ():
        if name not in files and not name.endswith((".safetensors", ".index.json")):
            assert parent is not None
            files[name] = _put(storage.join(uri, name), _verified(storage.join(parent[0], name), entry))
    return files


def groups_digest(digests: Mapping[str, str], family: Family) -> Iterator[tuple[str, str]]:
    """(group, sha256 over its tensors' names and digests)."""
    for group in GROUPS:
        names = sorted(name for name in digests if family.group_of(name) == group)
        outer = hashlib.sha256()
        for name in names:
            outer.update(f"{name} {digests[name]}\n".encode())
        yield group, outer.hexdigest()

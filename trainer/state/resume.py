"""Resume: the newest committed checkpoint into an engine of any world size.

    manifest = resume.newest(stage_uri)                # None: the stage begins
    resume.check(manifest, identity)                   # StageMismatch when it belongs to something else
    resume.load(engine, stage_uri, manifest)           # all ranks; masters, moments, counters, schedule, random state

Each rank reads the objects' headers, works out which objects overlap its own slices, and the ranks of a node share the
fetching: every object is fetched and verified once a node, then mapped. A damaged object is told by every rank
alike, so that no rank waits for another in a collective.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer import cache, heartbeat, storage
from trainer import manifest as manifests
from trainer.errors import UNKNOWN, CheckpointError, QwenVLError, StageMismatch, StorageError
from trainer.manifest import Manifest, Object
from trainer.state import slices, snapshot
from trainer.state.upload import Identity

newest = manifests.newest


def check(manifest: Manifest, identity: Identity, *, where: str = "") -> None:
    """The checkpoint belongs to this stage, plan and parent.

    The stage digest may differ when accepted changes explain it: fields are compared by trainer/handover.compare. No
    accepted change explains another plan: `step` is a place in the plan that the checkpoint names.

    Raises:
        StageMismatch
    """
    explained = bool(identity.accepted_changes)
    for name, stored, asked, strict in (
        ("stage", manifest.stage, identity.stage, True),
        ("base model", manifest.base_model_digest, identity.base_model_digest, True),
        ("plan", manifest.plan_digest, identity.plan_digest, True),
        ("stage digest", manifest.stage_digest, identity.stage_digest, not explained),
    ):
        if strict and stored != asked:
            raise StageMismatch(
                f"the checkpoint was made with another {name}",
                where=where or f"{manifest.stage}, step {manifest.step}",
                expected=f"{stored} (the checkpoint's)",
                got=f"{asked} (asked for)",
                do=(
                    "bring back the recipe and data of before; the plan decides which samples come next, so no "
                    "--accept-change covers another one; or use another output"
                    if name == "plan"
                    else "use another output, or remove this stage's folder to train it again"
                ),
            )


@dataclass(frozen=True)
class Header:
    """Where one object keeps which slice."""

    entry: Object
    slices: dict[str, tuple[int, int, int]]
    """Parameter -> start, stop, numel."""
    offsets: dict[str, int]
    """NAME|STATE -> first byte in the file."""
    rng: dict[str, str]


def load(engine: Any, stage_uri: str, manifest: Manifest, *, cache_dir: str | None = None) -> None:
    """Put a checkpoint into the engine. Every rank calls it.

    Raises:
        CheckpointError: an object is damaged or missing, or its slices do not cover the model's; the same on every
        rank.
    """
    headers = _agree(lambda: _read_headers(stage_uri, manifest))
    owned = slices.local(engine)
    needed = _agree(lambda: _needed(owned, headers, stage_uri, manifest))
    with _Files(stage_uri, manifest, cache_dir) as files:
        _agree(lambda: files.fetch(needed))
        dist.barrier()
        with slices.restored(engine) as targets:
            for target in targets:
                _fill(target, headers, files)
        dist.barrier()
    slices.restore_optimizer_facts(engine, manifest.optimizer)
    if engine.lr_scheduler is not None and manifest.scheduler is not None:
        engine.lr_scheduler.load_state_dict(manifest.scheduler)
    if manifest.world_size == dist.get_world_size():
        snapshot.restore_random_state(next(h.rng for h in headers if h.entry.rank == dist.get_rank()))
    heartbeat.pulse().beat(step=manifest.step)


def _agree(call: Any) -> Any:
    """Run `call` on every rank; when it fails anywhere, every rank raises the error of the lowest failing rank."""
    result, failure = None, None
    try:
        result = call()
    except Exception as error:  # whatever it is: the others wait in the gathering below
        failure = error
    told = None if failure is None else (code_of(failure), str(failure) or type(failure).__name__)
    everyone: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    if failure is not None:
        raise failure
    for rank, other in enumerate(everyone):
        if other is not None:
            kind: type[QwenVLError] = CheckpointError if other[0] == CheckpointError.code else StorageError
            raise kind(f"{other[1]}\n  found by: rank {rank}")
    return result


def code_of(error: Exception) -> int:
    return error.code if isinstance(error, QwenVLError) else UNKNOWN


# ---------------------------------------------------------------- headers


def _read_headers(stage_uri: str, manifest: Manifest) -> list[Header]:
    folder = manifests.step_folder(stage_uri, manifest.step)
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(lambda entry: read_header(storage.join(folder, entry.key), entry), manifest.objects))


def read_header(uri: str, entry: Object) -> Header:
    """One ranged read of an object's header.

    Raises:
        CheckpointError
    """
    try:
        data = storage.read_bytes(uri, 0, entry.header_bytes)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__")
        return Header(
            entry=entry,
            slices={name: (cut[0], cut[1], cut[2]) for name, cut in json.loads(metadata["slices"]).items()},
            offsets={key: 8 + length + value["data_offsets"][0] for key, value in header.items()},
            rng=json.loads(metadata["rng"]),
        )
    except FileNotFoundError:
        raise manifests.damaged(uri, expected=f"{entry.size_bytes} bytes", got="no such object") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise manifests.damaged(uri, expected="a safetensors header", got=f"{type(error).__name__}: {error}") from None


def _needed(owned: list[slices.Slice], headers: list[Header], stage_uri: str, manifest: Manifest) -> list[Object]:
    """Objects that overlap this rank's slices; CheckpointError when a part of a slice is in none or in two."""
    where = manifests.manifest_uri(stage_uri, manifest.step)
    needed: dict[str, Object] = {}
    for target in owned:
        found = 0
        for header in headers:
            cut = header.slices.get(target.name)
            if cut is None:
                continue
            if cut[2] != target.numel:
                raise CheckpointError(
                    f"{target.name} has another size in the checkpoint", where=where, expected=target.numel, got=cut[2]
                )
            overlap = min(cut[1], target.stop) - max(cut[0], target.start)
            if overlap > 0:
                found += overlap
                needed[header.entry.key] = header.entry
        if found != target.stop - target.start:
            raise CheckpointError(
                f"the checkpoint does not hold {target.name} once and whole",
                where=where,
                expected=f"{target.stop - target.start} elements from {target.start}",
                got=f"{found} elements",
                do="the freeze configuration may differ from the checkpoint's: use another output",
            )
    return [needed[key] for key in sorted(needed)]


def _fill(target: slices.Slice, headers: list[Header], files: _Files) -> None:
    with torch.no_grad():
        for header in headers:
            start, stop, _ = header.slices.get(target.name, (0, 0, 0))
            low, high = max(start, target.start), min(stop, target.stop)
            if low >= high:
                continue
            for key in slices.STATES:
                first = header.offsets[f"{target.name}|{key}"] + 4 * (low - start)
                source = files.map(header.entry)[first : first + 4 * (high - low)].view(np.float32)
                target.tensors[key][low - target.start : high - target.start].copy_(torch.from_numpy(source))


# ---------------------------------------------------------------- files


class _Files:
    """Verified objects on this node: in place when storage is a folder, else in the node cache (trainer/cache.py).

    Without a node cache they lie in a temporary folder, shared by the ranks of the node and removed at the end.
    """

    def __init__(self, stage_uri: str, manifest: Manifest, cache_dir: str | None):
        self.folder = manifests.step_folder(stage_uri, manifest.step)
        self.in_place = storage.local_path(self.folder)
        self.kept = cache_dir or cache.root()
        base = self.kept or os.environ.get(heartbeat.RUN_DIR) or tempfile.gettempdir()
        self.cache = os.path.join(base, "checkpoint" if self.kept else f"checkpoint-{manifest.nonce}")
        self._maps: dict[str, np.ndarray] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()
        if self.in_place is None and self.kept is None:
            shutil.rmtree(self.cache, ignore_errors=True)

    def path(self, entry: Object) -> str:
        if self.in_place is not None:
            return os.path.join(self.in_place, entry.key)
        return os.path.join(self.cache, f"{entry.sha256}.safetensors")

    def fetch(self, needed: list[Object]) -> None:
        """Fetch and verify this rank's share of what the node needs. Every rank calls it."""
        everyone: list[tuple[str, list[str]]] = [("", [])] * dist.get_world_size()
        node = os.environ.get("GROUP_RANK", "") + "@" + socket.gethostname()
        dist.all_gather_object(everyone, (node, [entry.model_dump_json() for entry in needed]))
        here = [rank for rank, (name, _) in enumerate(everyone) if name == node]
        wanted = sorted({text for name, texts in everyone if name == node for text in texts})
        mine = wanted[here.index(dist.get_rank()) :: len(here)]
        for text in mine:
            self._verified(Object.model_validate_json(text))
        if self.in_place is None and self.kept is not None:
            cache.bound(self.kept)

    def _verified(self, entry: Object) -> None:
        uri, path = storage.join(self.folder, entry.key), self.path(entry)
        if self.in_place is None:
            try:
                cache.fetch(uri, path, size_bytes=entry.size_bytes)
                if storage.sha256_file(path) != entry.sha256:  # the cache is a hint: fetch it again, once
                    storage.download_file(uri, path)
            except FileNotFoundError:
                raise manifests.damaged(uri, expected=f"{entry.size_bytes} bytes", got="no such object") from None
        size_bytes = Path(path).stat().st_size if os.path.exists(path) else 0
        if size_bytes != entry.size_bytes:
            raise manifests.damaged(uri, expected=f"{entry.size_bytes} bytes", got=f"{size_bytes} bytes")
        found = storage.sha256_file(path)
        if found != entry.sha256:
            if self.in_place is None:
                os.unlink(path)
            raise manifests.damaged(uri, expected=f"sha256 {entry.sha256}", got=found)

    def map(self, entry: Object) -> np.ndarray:
        """uint8[size] of the whole file."""
        if entry.key not in self._maps:
            if not os.path.exists(self.path(entry)):  # another job took its room in the node cache
                self._verified(entry)
            # Copy-on-write: torch wants a writable array, the file stays as it is.
            self._maps[entry.key] = np.memmap(self.path(entry), dtype=np.uint8, mode="c")
        return self._maps[entry.key]

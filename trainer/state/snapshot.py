"""Snapshot: the one host copy of this rank's slices, already in the bytes that go to storage.

The copy is the only time that training stands still for a checkpoint; hashing and writing happen from the buffer in the
background (trainer/state/upload.py). The bytes are a safetensors file, one 1-D float32 tensor per (parameter, state):

    header   "__metadata__": {"format": "1", "step", "rank", "world_size", "rng", "slices": {name: [start, stop,
    numel]}}
             "NAME|master", "NAME|exp_avg", "NAME|exp_avg_sq": dtype F32, shape [stop - start], offsets
    data     in the order of the header

    snapshot = Snapshots().take(engine, step=step)      # the buffer is used again by the next take
"""

from __future__ import annotations

import base64
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist

from trainer.state import slices

FORMAT = "1"
ALIGN = 8


@dataclass(frozen=True)
class Snapshot:
    """One rank's object. `buffer` belongs to the Snapshots that made it, whose next take waits for `written`."""

    step: int
    rank: int
    world_size: int
    buffer: memoryview
    """The safetensors file."""
    header_bytes: int
    num_elements: int
    """Of the masters."""
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    stall_s: float
    """How long training stood still: for the copy, and for the commit before when it was still being written."""
    written: threading.Event = field(default_factory=threading.Event)
    """Set while nobody reads the buffer; the uploader clears it until the object is stored."""

    def __post_init__(self) -> None:
        self.written.set()


class Snapshots:
    """Takes snapshots into one buffer that is kept: pinned when slices come from a GPU, so that the copy is one DMA."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._last: Snapshot | None = None

    def _room(self, size_bytes: int, *, pinned: bool) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size_bytes:
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._buffer[:size_bytes]

    def take(self, engine: Any, *, step: int) -> Snapshot:
        """Copy this rank's slices. No communication; waits while the snapshot before is still being written."""
        began = time.perf_counter()
        if self._last is not None:
            self._last.written.wait()
        owned = slices.local(engine)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        header = encode_header(owned, step=step, rank=rank, world_size=world_size)
        on_gpu = any(tensor.is_cuda for piece in owned for tensor in piece.tensors.values())
        num_elements = sum(piece.stop - piece.start for piece in owned)
        buffer = self._room(len(header) + num_elements * 4 * len(slices.STATES), pinned=on_gpu)
        buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        body = buffer[len(header) :].view(torch.float32)
        at = 0
        for piece in owned:
            for key in slices.STATES:
                length = piece.stop - piece.start
                body[at : at + length].copy_(piece.tensors[key], non_blocking=on_gpu)
                at += length
        if on_gpu:
            torch.cuda.synchronize()
        scheduler = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
        self._last = Snapshot(
            step=step,
            rank=rank,
            world_size=world_size,
            buffer=memoryview(cast(Any, buffer.numpy())),
            header_bytes=len(header),
            num_elements=num_elements,
            optimizer=slices.optimizer_facts(engine),
            scheduler=scheduler,
            stall_s=time.perf_counter() - began,
        )
        return self._last


def encode_header(owned: list[slices.Slice], *, step: int, rank: int, world_size: int) -> bytes:
    """The safetensors header with its 8 length bytes; padded with blanks so that the data starts at a multiple of 8."""
    metadata = {
        "format": FORMAT,
        "step": str(step),
        "rank": str(rank),
        "world_size": str(world_size),
        "rng": json.dumps(random_state()),
        "slices": json.dumps({piece.name: [piece.start, piece.stop, piece.numel] for piece in owned}),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for piece in owned:
        for key in slices.STATES:
            size_bytes = (piece.stop - piece.start) * 4
            header[f"{piece.name}|{key}"] = {
                "dtype": "F32",
                "shape": [piece.stop - piece.start],
                "data_offsets": [at, at + size_bytes],
            }
            at += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // ALIGN) * ALIGN)
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------- random state


def random_state() -> dict[str, str]:
    """This rank's torch generators, base64. Nothing else in the trainer draws random numbers."""
    state = {"cpu": _packed(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _packed(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict[str, str]) -> None:
    torch.set_rng_state(_unpacked(state["cpu"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unpacked(state["cuda"]))


def _packed(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

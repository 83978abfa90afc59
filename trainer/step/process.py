"""A rank's process: process group, threads, determinism, and the wish to stop."""

from __future__ import annotations

import os
import signal
import warnings
from datetime import timedelta
from types import FrameType

import deepspeed
import torch
import torch.distributed as dist

from trainer.recipe import Compute
from trainer.step.mesh import Mesh, make_mesh

TIMEOUT = timedelta(minutes=30)


def join_group(compute: Compute, seed: int) -> tuple[Mesh, torch.device]:
    """Join the process group that the environment names (torchrun's variables) and make results repeatable.

    Raises:
        UsageError: sequence parallelism above 1.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mesh = make_mesh(rank, world_size, compute.sequence_parallel)
    # DeepSpeed 0.19.8 calls names that torch 2.13 renames; said once a rank and call site otherwise.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with a fixed workspace
    # On CPU DeepSpeed compiles an all-reduce for tensor-parallel inference when a rank starts: with g++, up to a minute
    # the first time, again whenever two environments take turns at the cache that they share, and for ever where a
    # killed compiler left its lock. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(compute.threads)
    torch.manual_seed(seed)
    # Operations without a deterministic form warn instead of failing: on CUDA some of attention's backward has none.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Filling fresh memory is for finding reads of it; it costs time in every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not dist.is_initialized():
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "0"),
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
        ):
            os.environ.setdefault(name, value)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return mesh, device


class StopSignal:
    """Remembers SIGTERM: the step in progress is finished, then committed, by all ranks together."""

    def __init__(self) -> None:
        self.asked = False
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

"""Figures of a step: what was learned, how fast, how full and how even; and the line that people see."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trainer.flops import Cost, Flops, peak_flops_per_s
from trainer.observe.gpu import Gpu
from trainer.step.asked import Job
from trainer.step.engine import StepFigures
from trainer.step.inputs import Inputs, means


class StepClock:
    """Times steps and the waits for data, and turns sums into metrics. One per rank."""

    def __init__(self, job: Job, inputs: Inputs, device: torch.device):
        self.cost = Cost(inputs.family.shape(), job.stage.train)
        self.plan, self.world_size = inputs.plan, inputs.mesh.world_size
        self.pairs = job.stage.dpo is not None
        self.peak = peak_flops_per_s(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.device = device
        self.gpu = Gpu(device.index or 0) if device.type == "cuda" else None
        self.data_wait_s = 0.0
        self._began = time.perf_counter()

    def timed(self, steps: Iterable[Any]) -> Iterator[Any]:
        """The steps; the time that the next one was waited for is `data_wait_s`."""
        source = iter(steps)
        while True:
            self._began = time.perf_counter()
            try:
                step = next(source)
            except StopIteration:
                return
            self.data_wait_s = time.perf_counter() - self._began
            yield step

    def own(self, batches: Sequence[Any], *, stop: bool) -> dict[str, float]:
        """This rank's part of what is summed over ranks."""
        work = Flops(0.0, 0.0)
        for batch in batches:
            work += self.cost.pack(batch.segments.tolist(), batch.grid_thw.tolist(), batch.num_targets)
        return {
            "stop": float(stop),
            "flops_vision": work.vision,
            "flops_llm": work.llm,
            "tokens": float(sum(batch.num_tokens for batch in batches)),
            "patches": float(sum(batch.num_patches for batch in batches)),
            "packs": float(sum(batch.pack >= 0 for batch in batches)),
            "targets": float(sum(batch.num_targets for batch in batches)),
            "data_wait_s": self.data_wait_s,
        }

    def values(self, figures: StepFigures, rates: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the step, the same on every rank except for times."""
        sums, wall_s = figures.sums, time.perf_counter() - self._began
        flops = sums["flops_vision"] + sums["flops_llm"]
        found = {
            **means(sums, max(1.0, sums["counted"])),
            "grad_norm": figures.grad_norm,
            **{f"lr.{group}": rate for group, rate in rates.items()},
            "tokens": sums["tokens"],
            "target_tokens": sums["targets"],
            "patches": sums["patches"],
            "packs": sums["packs"],
            "fill": sums["tokens"] / max(1.0, sums["packs"] * self.plan.length),
            "balance.vision": _balance(figures.per_rank["flops_vision"]),
            "balance.llm": _balance(figures.per_rank["flops_llm"]),
            "data_wait_s": max(figures.per_rank["data_wait_s"]),
            "step_s": wall_s,
            "tokens_per_s": sums["tokens"] / wall_s,
            "flops": flops,
            "flops.vision_share": sums["flops_vision"] / max(1.0, flops),
        }
        if self.pairs:
            found["pairs"] = sums["counted"]
        if self.peak is not None:
            found["mfu"] = flops / wall_s / (self.peak * self.world_size)
        if self.gpu is not None:
            found |= self.gpu.read()
            found["gpu.memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
        return found


def _balance(work: Sequence[float]) -> float:
    """Mean over ranks by the largest: 1 when no rank waits for another."""
    return sum(work) / len(work) / max(work) if max(work) > 0 else 1.0


def step_line(name: str, step: int, num_steps: int, values: Mapping[str, float], left_s: float) -> str:
    extra = f" accuracy {values['accuracy']:.2f} margin {values['margin']:.3f}" if "accuracy" in values else ""
    return (
        f"{name}: step {step}/{num_steps} loss {values['loss']:.4f}{extra} grad {values['grad_norm']:.2f} "
        f"{values['tokens_per_s']:.0f} tokens/s, data wait {values['data_wait_s'] * 1000:.0f} ms, {left_s:.0f} s left"
    )

"""What a stage says while it runs: rows of metrics for the checkpoint, a line for people, and (rank 0) MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from trainer import storage
from trainer.observe.metrics import Metrics
from trainer.step.asked import Job
from trainer.step.clock import step_line
from trainer.step.inputs import Inputs

LINE_EVERY_S = 2.0


class Log:
    """Rank 0 speaks; the other ranks keep silent and hand over no rows."""

    def __init__(self, job: Job, inputs: Inputs, done: int):
        self.job, self.inputs, self.done = job, inputs, done
        self.speaks = inputs.mesh.rank == 0
        attempt = storage.local_path(storage.join(job.uri, "attempts", f"{job.attempt:04d}"))
        self.metrics = Metrics(os.path.join(attempt, "metrics.jsonl") if attempt and self.speaks else None)
        self.run_id: str | None = None
        self._began = self._shown = time.monotonic()

    def begin(self, held_out: Mapping[str, float]) -> None:
        plan, mesh = self.inputs.plan, self.inputs.mesh
        resumed = f"goes on after step {self.done} of {plan.num_steps}" if self.done else f"{plan.num_steps} steps"
        known = "".join(f", held-out {name} {value:.4f}" for name, value in held_out.items() if name != "count")
        self._say(f"{self.job.name}: {resumed}, {mesh.world_size} ranks, fill {plan.fill:.2%}{known}")

    def step(self, number: int, values: Mapping[str, float]) -> None:
        if not self.speaks:
            return
        self.metrics.log(number, values)
        now, num_steps = time.monotonic(), self.inputs.plan.num_steps
        if now - self._shown >= LINE_EVERY_S or number in (self.done + 1, num_steps):
            self._shown = now
            left_s = (now - self._began) / (number - self.done) * (num_steps - number)
            self._say(step_line(self.job.name, number, num_steps, values, left_s))

    def end(self, result: Any) -> None:
        if result is not None:
            loss = result.metrics.get("held_out_after", {}).get("loss")
            told = f", held-out loss {loss:.4f}" if loss is not None else ""
            self._say(f"{self.job.name}: done in {result.wall_s:.1f} s{told}")
        self.metrics.close()

    def _say(self, line: str) -> None:
        if self.speaks:
            print(line, flush=True)

"""What a stage says while it runs: rows of metrics for the checkpoint, a line for people, and (rank 0) MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from trainer import storage
from trainer.command import PARENT_RUN
from trainer.heartbeat import RUN_DIR
from trainer.observe import tracking
from trainer.observe.metrics import Metrics
from trainer.state.upload import Identity
from trainer.step.asked import Job
from trainer.step.clock import step_line
from trainer.step.inputs import Inputs

LINE_EVERY_S = 2.0


class Log:
    """Rank 0 speaks; the other ranks keep silent and hand over no rows."""

    def __init__(self, job: Job, inputs: Inputs, identity: Identity, done: int):
        self.job, self.inputs, self.done = job, inputs, done
        self.speaks = inputs.mesh.rank == 0
        self.path = _metrics_path(job) if self.speaks else None
        self.metrics = Metrics(self.path)
        self._sender = self._start_sender(identity) if self.speaks else None
        self._began = self._shown = time.monotonic()

    @property
    def run_id(self) -> str | None:
        """Of MLflow; None when its server never answered."""
        return tracking.run_id(self.job.uri)

    def _start_sender(self, identity: Identity) -> tracking.Sender | None:
        job, inputs = self.job, self.inputs
        uri = tracking.tracking_uri(job.recipe, job.out)
        if uri is None or self.path is None:
            return None
        digests = {
            "plan": inputs.plan.digest,
            "data": inputs.data_digest,
            "stage": identity.stage_digest,
            "base_model": inputs.parent.model.digest,
        }
        params = tracking.params_of(
            job.recipe,
            job.name,
            digests=digests,
            world_size=inputs.mesh.world_size,
            parent_stage_run=inputs.parent.mlflow_run_id or tracking.run_id(storage.join(job.out, inputs.parent.stage)),
            checkpoint_uri=storage.join(job.uri, "checkpoints"),
        )
        return tracking.start(
            tracking.Spec(
                uri=uri,
                experiment=job.recipe.tracking.experiment or job.recipe.name,
                out=job.out,
                stage=job.name,
                attempt=job.attempt,
                metrics_path=self.path,
                params=params,
                parent_run=os.environ.get(PARENT_RUN),
                from_step=self.done,
            )
        )

    def begin(self, held_out: Mapping[str, float]) -> None:
        plan, mesh = self.inputs.plan, self.inputs.mesh
        resumed = f"goes on after step {self.done} of {plan.num_steps}" if self.done else f"{plan.num_steps} steps"
        known = "".join(f", held-out {name} {value:.4f}" for name, value in held_out.items() if name != "count")
        known = known or ", no held-out samples"
        self._say(f"{self.job.name}: {resumed}, {mesh.world_size} ranks, fill {plan.fill:.2%}{known}")
        if self.inputs.skips:
            self._say(
                f"{self.job.name}: leaves out {len(self.inputs.skips)} samples: {', '.join(self.inputs.skips[:8])}"
            )

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
        if self._sender is not None:
            table = [row.model_dump() for row in result.freeze_table] if result is not None else []
            self._sender.finish(status="FINISHED" if result is not None else "KILLED", freeze_table=table)

    def _say(self, line: str) -> None:
        if self.speaks:
            print(line, flush=True)


def _metrics_path(job: Job) -> str | None:
    """The attempt's file in a local output; else one in the launcher's folder, which the sender reads."""
    attempt = storage.local_path(storage.join(job.uri, "attempts", f"{job.attempt:04d}"))
    folder = attempt or os.environ.get(RUN_DIR)
    return os.path.join(folder, "metrics.jsonl") if folder else None

"""Trains one stage: `python -m trainer.train --recipe R --stage sft --out OUT`, one process a rank (trainer/launch.py).

Read it top to bottom: what is asked for -> finished already? -> process group -> plan and parent -> model -> engine ->
reference (dpo) -> resume -> held-out loss -> steps: log, commit, stop -> held-out loss -> freeze proof -> hand-over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer import handover
from trainer.edge import by_hand
from trainer.errors import Preempted
from trainer.heartbeat import Figures, pulse
from trainer.step.asked import Job, parse
from trainer.step.imports import import_large

if TYPE_CHECKING:
    from trainer.manifest import Manifest
    from trainer.state.upload import Identity
    from trainer.step.inputs import Inputs
    from trainer.step.log import Log
    from trainer.step.process import StopSignal


def main(argv: Sequence[str] | None = None) -> None:
    job = parse(argv, __doc__)
    if handover.finished(job.recipe, job.name, job.out, accept=job.accept) is not None:
        print(f"{job.name}: finished already, {handover.result_uri(job.out, job.name)}")
        return
    import_large()  # seconds that a finished stage does not wait for
    train(job)


def train(job: Job) -> None:
    from trainer.state import resume
    from trainer.step import ending
    from trainer.step import inputs as start
    from trainer.step.engine import make_engine
    from trainer.step.process import StopSignal, join_group

    began = time.monotonic()
    stage = job.stage

    # ---- process group, plan, parent
    mesh, device = join_group(stage.compute, job.recipe.seed)
    stop = StopSignal()
    inputs = start.read_inputs(job, mesh)
    manifest = resume.newest(job.uri)
    changes = start.claim(job, inputs, manifest)
    identity = start.identity_of(job, inputs, changes)
    if manifest is not None:
        resume.check(manifest, identity, where=job.uri)

    # ---- the parent's weights; what is frozen and what is trained; engine
    pulse().beat(phase="load")
    model, frozen_plan, read_digests = start.build_model(job, inputs, device)
    engine = make_engine(model, stage, inputs.zero_config, inputs.group_of)
    began_with = ending.weights_of(model, engine, frozen_plan, inputs.family, read=read_digests)

    # ---- the reference is made by these weights; then the last committed checkpoint replaces them
    reference, held_out_reference = start.references(job, inputs, engine, device)
    place = start.placer(model, device, known=reference)
    place_held_out = start.placer(model, device, known=held_out_reference)
    if manifest is not None:
        resume.load(engine, job.uri, manifest)
    done = manifest.step if manifest else 0

    # ---- loss on held-out data before the first step
    pulse().beat(phase="evaluate", step=done)
    before = manifest.extra["held_out"] if manifest else start.held_out_loss(job, inputs, engine, place_held_out)

    # ---- steps
    log = steps(Ready(job, inputs, device, engine, place, identity, stop), manifest, held_out=before)

    # ---- loss on held-out data after the last step, freeze proof, hand-over
    pulse().beat(phase="evaluate")
    after = start.held_out_loss(job, inputs, engine, place_held_out)
    pulse().beat(phase="handover")
    saved = ending.save_model(job, inputs, model, frozen_plan)
    table = ending.freeze_table(began_with, model, engine, inputs, saved)
    result: Any = None
    if mesh.rank == 0:
        result = ending.result_of(
            job,
            inputs,
            saved,
            table,
            changes,
            held_out=(before, after),
            resumed_from=done or None,
            mlflow_run_id=log.run_id,
            wall_s=time.monotonic() - began,
        )
        handover.write(job.out, result)
    log.end(result)
    ending.leave_together()


@dataclass(frozen=True)
class Ready:
    """A stage whose engine holds the weights that the next step changes."""

    job: Job
    inputs: Inputs
    device: Any
    engine: Any
    place: Callable[[Any], Any]
    """A batch to the device, with the reference's log-probabilities where there is one."""
    identity: Identity
    stop: StopSignal


def steps(ready: Ready, manifest: Manifest | None, held_out: Mapping[str, float]) -> Log:
    """Every step after the manifest's: train, log, commit; stop when asked to, after a commit.

    Raises:
        Preempted: SIGTERM came; what was done is committed.
    """
    from trainer.state.snapshot import Snapshots
    from trainer.state.upload import Uploader
    from trainer.step.clock import StepClock
    from trainer.step.engine import train_step
    from trainer.step.log import Log
    from trainer.step.optim import lr_factor, set_lr

    job, inputs, engine = ready.job, ready.inputs, ready.engine
    stage, num_steps = job.stage, inputs.plan.num_steps
    done = manifest.step if manifest else 0
    left_out = dict(manifest.extra.get("left_out", {}) if manifest else {})
    pulse().beat(phase="train", step=done)
    uploader = Uploader(job.uri, ready.identity, keep=stage.checkpoint.keep, resumed=manifest)
    snapshots = Snapshots()
    clock, log = StepClock(job, inputs, ready.device), Log(job, inputs, ready.identity, done)
    loader = inputs.loader(start_step=done)
    log.begin(held_out)
    for step in clock.timed(loader):
        number = step.number + 1
        rates = set_lr(engine, lr_factor(step.number, num_steps, stage.schedule), stage.optim)
        figures = train_step(
            engine,
            [ready.place(batch) for batch in step.batches],
            denominator=step.pairs if stage.dpo else step.target_tokens,
            count="pairs" if stage.dpo else "target tokens",
            step=number,
            own=clock.own(step.batches, stop=ready.stop.asked),
        )
        for name, count in step.left_out.items():
            left_out[name] = left_out.get(name, 0) + count
        last, stopping = number == num_steps, figures.sums["stop"] > 0
        pulse().beat(step=number)
        uploader.poll()
        if number % stage.log_every_steps == 0 or last:
            values = clock.values(figures, rates)
            log.step(number, values)
            pulse().beat(figures=Figures(num_steps=num_steps, loss=values["loss"], tokens_per_s=values["tokens_per_s"]))
        if number % stage.checkpoint.every_steps == 0 or last or stopping:
            uploader.commit(
                snapshots.take(engine, step=number),
                loader=loader.state,
                skips=inputs.skips,
                metrics=log.metrics.drain(),
                extra={"held_out": held_out, "left_out": dict(left_out)},
            )
        if stopping and not last:
            pulse().beat(phase="commit")
            uploader.wait()
            log.end(None)
            raise Preempted(
                "stopped from outside, after a commit", where=f"{job.name}, step {number}", do="run it again"
            )
    pulse().beat(phase="commit")
    uploader.wait()
    loader.close()
    return log


if __name__ == "__main__":
    by_hand(main)

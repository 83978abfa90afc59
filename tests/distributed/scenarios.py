"""Runs in every rank: real process group, real ZeRO-3. `python -m tests.distributed.scenarios FOLDER`

Writes FOLDER/WORLD.json with what each scenario measured and, from rank 0, the weights it ended with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.step.imports import lean_imports

with lean_imports():
    import torch
    import torch.distributed as dist
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

from tests.distributed.runs import Run
from tests.step.builders import a_batch, a_family, a_sequence
from trainer.errors import CountMismatch, FreezeError, NumericsError
from trainer.models import freeze
from trainer.models.qwen2_5_vl_model import PARTS as parts
from trainer.recipe import Compute, Stage
from trainer.state import resume
from trainer.state.snapshot import Snapshots
from trainer.state.upload import Identity, Uploader
from trainer.step import engine as engines
from trainer.step.packed import place
from trainer.step.process import join_group

LENGTH, STEPS = 96, 4
ALL = {"vision": True, "merger": True, "llm": True}


def a_stage(train: dict[str, bool] | None = None, **compute: Any) -> Stage:
    return Stage.model_validate(
        {
            "train": train or ALL,
            "packing": {"length": LENGTH, "patch_budget": 512},
            "data": {"hand": 1},
            "optim": {"lr": 3e-3, "lr_of": {"vision": 1e-3} if (train or ALL)["vision"] else {}, "clip": 0.5},
            "schedule": {"steps": STEPS, "packs_per_step": 2, "warmup": 0.3},
            "compute": {"precision": "fp32", "activation_checkpointing": False} | compute,
            "zero": {
                "param_persistence_threshold": 0, "sub_group_size": 20000, "reduce_bucket_size": 20000,
                "prefetch_bucket_size": 20000, "max_live_parameters": 100000,
            },
        }
    )  # fmt: skip


def step_batches(step: int) -> list[Any]:
    """Two packs: one with pictures of uneven sizes, one of text only, with very different numbers of targets."""
    seed = 10 * step
    return [
        a_batch([a_sequence(seed, grid=(1, 6, 10)), a_sequence(seed + 1, grid=(2, 4, 4), text=20)], length=LENGTH),
        a_batch([a_sequence(seed + 2, text=5), a_sequence(seed + 3, text=3)], length=LENGTH),
    ]


def denominator(step: int) -> int:
    return sum(len(batch.label_ids) for batch in step_batches(step))


def a_run(folder: Path, stage: Stage) -> Run:
    """An engine on the model in FOLDER/model."""
    return Run(a_family(), folder, stage, batches=step_batches)


def refused(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that `call` raises on this rank; empty when it raises none."""
    try:
        call()
    except kind as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- scenarios


def all_trained(folder: Path, world: str) -> Any:
    run = a_run(folder, a_stage())
    figures = run.train()
    saved = run.save(f"all-{world}")
    return {"figures": figures, "rows": run.prove(saved), "copied": saved.copied, "held": held_out(run)}


def held_out(run: Run) -> dict[str, float]:
    mine = step_batches(9)[dist.get_rank() :: dist.get_world_size()]
    return engines.evaluate(run.engine, [place(batch, run.model, "cpu") for batch in mine], "target tokens")


def checkpointed_activations(folder: Path, world: str) -> Any:
    return a_run(folder, a_stage(activation_checkpointing=True)).train(last=2)


def half_precision(folder: Path, world: str) -> Any:
    run = a_run(folder, a_stage(precision="bf16"))
    kept = {name: str(buffer.dtype) for name, buffer in run.model.named_buffers()}
    exact = parts.build(run.family.export_config(), dtype=torch.float32)
    same = all(
        torch.equal(mine, theirs) for mine, theirs in zip(run.model.model.buffers(), exact.buffers(), strict=True)
    )
    return {"figures": run.train(last=2), "buffers": kept, "same": same}


def frozen_vision(folder: Path, world: str) -> Any:
    run = a_run(folder, a_stage({"vision": False, "merger": True, "llm": True}))
    figures = run.train()
    saved = run.save(f"frozen-vision-{world}")
    rows = run.prove(saved)
    name, parameter = next((n, p) for n, p in run.model.model.named_parameters() if not p.requires_grad)
    if dist.get_rank() == 0:
        parameter.ds_tensor.data[0] += 1e-3  # type: ignore[attr-defined]
    return {
        "figures": figures,
        "rows": rows,
        "copied": saved.copied,
        "mutated": run.family.hub_name(name),
        "refused": refused(FreezeError, lambda: run.prove(saved)),
    }


def vision_only(folder: Path, world: str) -> Any:
    """The literal reading of the report's first stage: neither merger nor language model."""
    run = a_run(folder, a_stage({"vision": True, "merger": False, "llm": False}))
    figures = run.train()
    return {"figures": figures, "rows": run.prove(run.save(f"vision-{world}"))}


def text_only(folder: Path, world: str) -> Any:
    """No rank has a picture: the vision tower gets gradients of zero, not those of the step before."""
    run = a_run(folder, a_stage())
    run.train(last=1)
    before = freeze.master_digests(run.engine)
    for group in run.engine.optimizer.param_groups:
        group["weight_decay"], group["betas"] = 0.0, (0.0, 0.95)
    run.train(1, 2, lambda step: [a_batch([a_sequence(5, text=9)], length=LENGTH)] * 2)
    now = freeze.master_digests(run.engine)
    groups: dict[str, bool] = {}
    for name, digest in now.items():
        group = run.group_of(name)
        groups[group] = groups.get(group, False) or digest != before[name]
    saved = run.save(f"text-{world}")
    return {"moved": groups, "saved": len(saved.digests)}


def wrong_numbers(folder: Path, world: str) -> Any:
    run = a_run(folder, a_stage())
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def step(wrong: int = 0) -> None:
        packs = [place(batch, run.model, "cpu") for batch in step_batches(0)[rank::world_size]]
        engines.train_step(
            run.engine, packs, denominator=denominator(0) + wrong, count="target tokens", step=7, own={"stop": 0.0}
        )  # fmt: skip

    counted = refused(CountMismatch, lambda: step(wrong=1))
    same = freeze.master_digests(run.engine) == run.before.masters
    run = a_run(folder, a_stage())
    for name, parameter in run.model.model.named_parameters():
        if name.endswith("visual.merger.ln_q.weight") and rank == 0:  # reached by packs with pictures only
            parameter.ds_tensor.data[0] = float("nan")  # type: ignore[attr-defined]
    before = freeze.master_digests(run.engine)
    infinite = refused(NumericsError, step)
    return {
        "counted": counted,
        "same": same,
        "infinite": infinite,
        "untouched": freeze.master_digests(run.engine) == before,
    }


def resumed(folder: Path, world: str) -> Any:
    """Stopped after two steps and gone on with in a new engine: the same bits as without the stop."""
    uri = str(folder / f"stage-{world}")
    identity = Identity("stage1", 1, "stage", "plan", "base")
    run = a_run(folder, a_stage())
    figures = run.train(last=2)
    uploader = Uploader(uri, identity)
    uploader.commit(Snapshots().take(run.engine, step=2), loader={"step": 2})
    uploader.wait()
    figures += run.train(2, STEPS)
    want = freeze.master_digests(run.engine)
    again = a_run(folder, a_stage())
    manifest = resume.newest(uri)
    assert manifest is not None
    resume.load(again.engine, uri, manifest)
    rest = again.train(2, STEPS)
    return {"figures": figures, "rest": rest, "equal": freeze.master_digests(again.engine) == want}


SCENARIOS = (
    all_trained,
    checkpointed_activations,
    half_precision,
    frozen_vision,
    vision_only,
    text_only,
    wrong_numbers,
    resumed,
)


def main() -> None:
    folder = Path(sys.argv[1])
    join_group(Compute(precision="fp32"), 7)
    world = str(dist.get_world_size())
    found = {}
    for scenario in SCENARIOS:
        if len(sys.argv) > 2 and scenario.__name__ not in sys.argv[2:]:
            continue
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, scenario(folder, world))
        found[scenario.__name__] = everyone
    if dist.get_rank() == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

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
    import deepspeed  # noqa: F401
    import torch
    import torch.distributed as dist
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

from tests.step.builders import a_batch, a_family, a_sequence
from trainer.errors import CountMismatch, FreezeError, NumericsError
from trainer.handover import ModelFile
from trainer.models import freeze, hub
from trainer.models import qwen2_5_vl_model as parts
from trainer.recipe import Compute, Stage
from trainer.state import resume
from trainer.state.snapshot import Snapshots
from trainer.state.upload import Identity, Uploader
from trainer.step import engine as engines
from trainer.step.optim import lr_factor, set_lr
from trainer.step.packed import PackedModel, place
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


class Run:
    """An engine on the model in FOLDER/model."""

    def __init__(self, folder: Path, stage: Stage):
        self.folder, self.stage, self.family = folder, stage, a_family()
        self.uri = str(folder / "model")
        world_size = dist.get_world_size()
        config = engines.zero_config(stage, 2 // world_size)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[stage.compute.precision]
        with engines.sharded(config):
            model = parts.build(self.family.export_config(), dtype=dtype, attn_implementation="segments", init=False)
        self.read = hub.load(model, self.uri, self.family, files=stored_files(folder), dtype=torch.float32)
        self.plan = freeze.freeze_plan([name for name, _ in model.named_parameters()], self.family, stage.train)
        freeze.apply(model, self.plan, self.family)
        if stage.compute.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = PackedModel(model, parts, mean=self.family.image_mean, std=self.family.image_std)
        self.engine = engines.make_engine(self.model, stage, config, self.group_of)
        self.frozen = freeze.frozen_digests(model, self.plan, self.family)
        self.masters = freeze.master_digests(self.engine)

    def group_of(self, name: str) -> str:
        return self.family.group_of(name.removeprefix("model."))

    def train(
        self, first: int = 0, last: int = STEPS, batches: Callable[[int], list[Any]] = step_batches
    ) -> list[list[float]]:
        """[loss, gradient norm] of each step."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        found = []
        for step in range(first, last):
            mine = batches(step)[rank::world_size]
            set_lr(self.engine, lr_factor(step, STEPS, self.stage.schedule), self.stage.optim)
            figures = engines.train_step(
                self.engine,
                [place(batch, self.model, "cpu") for batch in mine],
                denominator=sum(len(batch.label_ids) for batch in batches(step)),
                count="target tokens",
                step=step + 1,
                own={"stop": 0.0},
            )
            found.append([figures.sums["loss_sum"] / figures.sums["counted"], figures.grad_norm])
        return found

    def save(self, name: str) -> hub.Saved:
        return hub.save(
            self.model.model,
            str(self.folder / name),
            self.family,
            dtype=torch.float32,
            file_bytes=40_000,
            parent=(self.uri, stored_files(self.folder)),
            frozen_groups=freeze.frozen_groups(self.plan),
        )

    def prove(self, saved: hub.Saved) -> list[dict[str, Any]]:
        from trainer.step.ending import changed_in_memory

        rows = freeze.prove(
            self.plan,
            sizes=dict.fromkeys(self.plan, 1),
            read=self.read,
            handed_over=saved.digests,
            changed_in_memory=changed_in_memory(
                self.frozen, freeze.frozen_digests(self.model.model, self.plan, self.family)
            ),
            moved_groups=freeze.moved(self.engine, self.masters, self.group_of),
        )
        return [row.model_dump() for row in rows]


def stored_files(folder: Path) -> dict[str, ModelFile]:
    return {name: ModelFile(**entry) for name, entry in json.loads((folder / "files.json").read_text()).items()}


def refused(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that `call` raises on this rank; empty when it raises none."""
    try:
        call()
    except kind as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- scenarios


def all_trained(folder: Path, world: str) -> Any:
    run = Run(folder, a_stage())
    figures = run.train()
    saved = run.save(f"all-{world}")
    return {"figures": figures, "rows": run.prove(saved), "copied": saved.copied, "held": held_out(run)}


def held_out(run: Run) -> dict[str, float]:
    mine = step_batches(9)[dist.get_rank() :: dist.get_world_size()]
    return engines.evaluate(run.engine, [place(batch, run.model, "cpu") for batch in mine], "target tokens")


def checkpointed_activations(folder: Path, world: str) -> Any:
    return Run(folder, a_stage(activation_checkpointing=True)).train(last=2)


def half_precision(folder: Path, world: str) -> Any:
    run = Run(folder, a_stage(precision="bf16"))
    kept = {name: str(buffer.dtype) for name, buffer in run.model.named_buffers()}
    exact = parts.build(run.family.export_config(), dtype=torch.float32)
    same = all(
        torch.equal(mine, theirs) for mine, theirs in zip(run.model.model.buffers(), exact.buffers(), strict=True)
    )
    return {"figures": run.train(last=2), "buffers": kept, "same": same}


def frozen_vision(folder: Path, world: str) -> Any:
    run = Run(folder, a_stage({"vision": False, "merger": True, "llm": True}))
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
    run = Run(folder, a_stage({"vision": True, "merger": False, "llm": False}))
    figures = run.train()
    return {"figures": figures, "rows": run.prove(run.save(f"vision-{world}"))}


def text_only(folder: Path, world: str) -> Any:
    """No rank has a picture: the vision tower gets gradients of zero, not those of the step before."""
    run = Run(folder, a_stage())
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
    run = Run(folder, a_stage())
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def step(wrong: int = 0) -> None:
        packs = [place(batch, run.model, "cpu") for batch in step_batches(0)[rank::world_size]]
        engines.train_step(
            run.engine, packs, denominator=denominator(0) + wrong, count="target tokens", step=7, own={"stop": 0.0}
        )  # fmt: skip

    counted = refused(CountMismatch, lambda: step(wrong=1))
    same = freeze.master_digests(run.engine) == run.masters
    run = Run(folder, a_stage())
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
    run = Run(folder, a_stage())
    figures = run.train(last=2)
    uploader = Uploader(uri, identity)
    uploader.commit(Snapshots().take(run.engine, step=2), loader={"step": 2})
    uploader.wait()
    figures += run.train(2, STEPS)
    want = freeze.master_digests(run.engine)
    again = Run(folder, a_stage())
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

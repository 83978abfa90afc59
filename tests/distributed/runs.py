"""An engine with ZeRO-3 in a real rank, of any family: Run(family, folder, stage, batches=...).train()"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainer.step.imports import lean_imports

with lean_imports():
    import deepspeed  # noqa: F401
    import torch
    import torch.distributed as dist

from trainer.handover import ModelFile
from trainer.models import freeze, hub
from trainer.models.family import Family, parts_of
from trainer.recipe import Stage
from trainer.step import ending
from trainer.step import engine as engines
from trainer.step.optim import lr_factor, set_lr
from trainer.step.packed import PackedModel, place

MODEL, FILES = "model", "files.json"
Batches = Callable[[int], list[Any]]
"""Step -> every rank's packs."""


class Run:
    """An engine on the model in FOLDER/model, whose digests are in FOLDER/files.json where there is one."""

    def __init__(self, family: Family, folder: Path, stage: Stage, *, batches: Batches, uri: str | None = None):
        self.folder, self.stage, self.family, self.batches = folder, stage, family, batches
        self.uri = uri or str(folder / MODEL)
        world_size = dist.get_world_size()
        config = engines.zero_config(stage, stage.schedule.packs_per_step // world_size)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[stage.compute.precision]
        parts = parts_of(family)
        with engines.sharded(config):
            model = parts.build(family.export_config(), dtype=dtype, attn_implementation="segments", init=False)
        self.read = hub.load(model, self.uri, self.family, files=stored_files(folder), dtype=torch.float32)
        self.plan = freeze.freeze_plan([name for name, _ in model.named_parameters()], self.family, stage.train)
        freeze.apply(model, self.plan, self.family)
        if stage.compute.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = PackedModel(model, parts, mean=self.family.image_mean, std=self.family.image_std)
        self.engine = engines.make_engine(self.model, stage, config, self.group_of)
        self.before = ending.weights_of(self.model, self.engine, self.plan, family, read=self.read)

    def group_of(self, name: str) -> str:
        return self.family.group_of(name.removeprefix("model."))

    def train(self, first: int = 0, last: int | None = None, batches: Batches | None = None) -> list[list[float]]:
        """[loss, gradient norm] of each step."""
        batches, num_steps = batches or self.batches, self.stage.schedule.steps
        assert num_steps is not None
        rank, world_size = dist.get_rank(), dist.get_world_size()
        found = []
        for step in range(first, num_steps if last is None else last):
            mine = batches(step)[rank::world_size]
            set_lr(self.engine, lr_factor(step, num_steps, self.stage.schedule), self.stage.optim)
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
            parent=(self.uri, stored_files(self.folder) or {}),
            frozen_groups=freeze.frozen_groups(self.plan),
        )

    def prove(self, saved: hub.Saved) -> list[dict[str, Any]]:
        """The stage's own proof."""
        inputs: Any = SimpleNamespace(family=self.family)
        rows = ending.freeze_table(self.before, self.model, self.engine, inputs, saved)
        return [row.model_dump() for row in rows]


def stored_files(folder: Path) -> dict[str, ModelFile] | None:
    path = folder / FILES
    return {name: ModelFile(**entry) for name, entry in json.loads(path.read_text()).items()} if path.exists() else None

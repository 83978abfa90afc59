"""Runs in every rank: `python -m tests.models.ranks RESULTS MIXES FAMILY=FOLDER ...`, one warm process group for all.

Each FOLDER has pool.pt (encoded samples) and the trained folder of a finished run. Writes RESULTS/WORLD.json, family ->
scenario -> what each rank found.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.runs import Run
from trainer.step.imports import lean_imports

with lean_imports():
    import torch
    import torch.distributed as dist

from trainer import storage
from trainer.data.batch import pack_batch
from trainer.data.encode import Encoded
from trainer.errors import FreezeError
from trainer.models import hub
from trainer.models.family import Family, load_family
from trainer.recipe import Compute, Stage
from trainer.step.packed import place
from trainer.step.process import join_group

STEPS, PACKS = 2, 6
ALL = {"vision": True, "merger": True, "llm": True}
POOL = "pool.npz"


# ---------------------------------------------------------------- what the test process hands over


def write_pool(path: Path, encoded: dict[str, Encoded], pad_id: int) -> None:
    arrays = {f"{name}/{field}": value for name, found in encoded.items() for field, value in vars(found).items()}
    np.savez(path, pad_id=np.int64(pad_id), **arrays)


def read_pool(path: Path) -> tuple[dict[str, Encoded], int]:
    with np.load(path) as stored:
        found: dict[str, dict[str, np.ndarray]] = {}
        for key in stored.files:
            name, _, field = key.partition("/")
            if field:
                found.setdefault(name, {})[field] = stored[key]
        return {name: Encoded(**fields) for name, fields in found.items()}, int(stored["pad_id"])


class Pool:
    """Samples of one family, and packs of them."""

    def __init__(self, family: Family, folder: Path):
        self.samples, self.pad_id = read_pool(folder / POOL)
        self.shape = {"patch_width": family.patch_width, "grid_columns": family.grid_columns}

    def batch(self, names: list[str], index: int = 0) -> Any:
        found = [self.samples[name] for name in names]
        used = max(32, sum(len(sample.ids) for sample in found))
        return pack_batch(found, names, length=used, pad_id=self.pad_id, pack=index, **self.shape)

    def step(self, number: int) -> list[Any]:
        """PACKS packs: pictures beside text alone, one with several pictures, a video or another picture, an empty
        one."""
        last = "clip" if "clip" in self.samples else "tall"
        rows = [["one", "short"], ["text"], ["two", "turns"], [last], [], ["short", "text", "tall"]]
        return [self.batch(names, index) for index, names in enumerate(rows[number:] + rows[:number])]

    def mix(self, rng: np.random.Generator) -> list[str]:
        """Up to four samples, now and then none, often text alone."""
        text = [name for name, found in self.samples.items() if not len(found.grid_thw)]
        names = text if rng.random() < 0.4 else sorted(self.samples)
        return [str(name) for name in rng.choice(names, rng.integers(0, 4))]


def a_stage(train: dict[str, bool] | None = None, *, steps: int = STEPS, packs: int = PACKS) -> Stage:
    return Stage.model_validate(
        {
            "train": train or ALL,
            "packing": {"length": 4096, "patch_budget": 65536},
            "data": {"some": 1},
            "optim": {"lr": 1e-3, "clip": 0.5},
            "schedule": {"steps": steps, "packs_per_step": packs, "warmup": 0.3},
            "compute": {"precision": "fp32", "activation_checkpointing": False},
            "zero": {
                "param_persistence_threshold": 0, "sub_group_size": 40000, "reduce_bucket_size": 40000,
                "prefetch_bucket_size": 40000, "max_live_parameters": 100000,
            },
        }
    )  # fmt: skip


def opened(name: str, folder: str) -> Family:
    return load_family(name, storage.read_json(storage.join(folder, "stage1", "model", "config.json")))


def a_run(family: Family, folder: str, stage: Stage, pool: Pool) -> Run:
    return Run(family, Path(folder), stage, batches=pool.step, uri=storage.join(folder, "stage1", "model"))


# ---------------------------------------------------------------- what is called, and in which order


@contextmanager
def recorded(run: Run) -> Iterator[list[str]]:
    """Parts of the family and modules with parameters of their own, in the order in which forward calls them: ZeRO-3
    gathers in this order, and a rank with another one waits for ever."""
    calls: list[str] = []
    parts, hooks = run.model.parts, []

    def told(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return getattr(parts, name)(*args)

        return call

    names = ("embed_tokens", "run_vision", "run_language")
    run.model.parts = copy.copy(parts)
    for name in names:
        setattr(run.model.parts, name, told(name))
    for name, module in run.model.model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"module {name}")))
    try:
        yield calls
    finally:
        run.model.parts = parts
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- scenarios


def trained(name: str, folder: str, pool: Pool, results: Path) -> dict[str, Any]:
    """Some steps with everything trained: figures, the model, the order of calls of each micro-batch, the proof."""
    run = a_run(opened(name, folder), folder, a_stage(), pool)
    with recorded(run) as calls:
        figures = run.train()
    saved = hub.save(
        run.model.model, str(results / f"{name}-{dist.get_world_size()}"), run.family, dtype=torch.float32,
        file_bytes=10**9,
    )  # fmt: skip
    starts = [at for at, call in enumerate(calls) if call == "embed_tokens"]
    batches = [calls[start:stop] for start, stop in zip(starts, [*starts[1:], len(calls)], strict=True)]
    return {
        "figures": figures,
        "vision_calls": [batch.count("run_vision") for batch in batches],
        "orders": len(set(map(tuple, batches))),
        "parts": [call for call in batches[0] if not call.startswith("module ")],
        "modules": batches[0],
        "rows": run.prove(saved),
    }


def mixes(name: str, folder: str, pool: Pool, count: int) -> dict[str, Any]:
    """Random packs on every rank, one optimizer step each: text beside pictures beside nothing, without a hang. Every
    rank calls the same modules in the same order each time."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    run = a_run(opened(name, folder), folder, a_stage(packs=world_size, steps=10**6), pool)
    kinds, orders, began = Counter[str](), set(), time.monotonic()
    for number in range(count):
        rows = [pool.mix(np.random.default_rng([number, other])) for other in range(world_size)]
        names = rows[rank]
        pack = place(pool.batch(names), run.model, "cpu")
        with recorded(run) as calls:
            loss, _ = run.engine(pack)
        orders.add(" ".join(calls))
        run.engine.backward(loss, scale_wrt_gas=False)
        run.engine.step()
        kinds["pictures" if pack.has_pictures else "text" if names else "empty"] += 1
    return {"count": count, "kinds": kinds, "orders": sorted(orders), "s": time.monotonic() - began}


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except FreezeError as error:
        return str(error)
    return ""


def faults(name: str, folder: str, pool: Pool, results: Path) -> dict[str, Any]:
    """Each fault of a freeze configuration, injected into a run whose proof passes without it."""
    family = opened(name, folder)
    frozen = {"vision": False, "merger": True, "llm": True}
    found: dict[str, Any] = {}

    def a_frozen_run() -> Run:
        return a_run(family, folder, a_stage(frozen, steps=1), pool)

    def proof(run: Run) -> Any:
        saved = hub.save(
            run.model.model, str(results / f"{name}-fault"), family, dtype=torch.float32, file_bytes=10**9
        )  # fmt: skip
        return run.prove(saved)

    run = a_frozen_run()
    run.train()
    found["states"] = {row["group"] + ("" if row["state"] != "constant" else " constant"): row for row in proof(run)}
    found["none"] = refused(lambda: proof(run))
    names = dict(run.model.model.named_parameters())
    still = next(key for key, entry in run.plan.items() if entry.state == "frozen")
    moving = next(key for key, entry in run.plan.items() if entry.state == "trained" and entry.group == "llm")
    by_hub = {family.hub_name(key): parameter for key, parameter in names.items()}

    by_hub[still].requires_grad_(True)
    found["a frozen one asks for gradients"] = refused(lambda: proof(run)), still
    by_hub[still].requires_grad_(False)
    by_hub[moving].requires_grad_(False)
    found["a trained one asks for none"] = refused(lambda: proof(run)), moving
    by_hub[moving].requires_grad_(True)
    for group in run.engine.optimizer.fp16_groups:
        group[:] = [parameter for parameter in group if parameter is not by_hub[moving]]
    found["forgotten by the optimizer"] = refused(lambda: proof(run)), moving

    run = a_frozen_run()
    run.train()
    part: Any = dict(run.model.model.named_parameters())[family.model_name(still)]
    if dist.get_rank() == 0:
        part.ds_tensor.data.view(-1)[0] += 1e-3
    found["a frozen one is written to"] = refused(lambda: proof(run)), still

    constant = [key for key, entry in run.plan.items() if entry.state == "constant"]
    state = {family.hub_name(piece.name.removeprefix("model.")) for piece in freeze_slices(run)}
    found["constants"], found["constants_with_state"] = constant, sorted(set(constant) & state)
    return found


def freeze_slices(run: Run) -> Any:
    from trainer.state import slices

    return slices.local(run.engine)


def main() -> None:
    results, count = Path(sys.argv[1]), int(sys.argv[2])
    join_group(Compute(precision="fp32"), 7)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    found: dict[str, Any] = {}
    for item in sys.argv[3:]:
        name, _, folder = item.partition("=")
        pool = Pool(opened(name, folder), Path(folder))
        scenarios: dict[str, Callable[[], Any]] = {"trained": partial(trained, name, folder, pool, results)}
        if world_size == 3:
            scenarios["mixes"] = partial(mixes, name, folder, pool, count)
        else:
            scenarios["faults"] = partial(faults, name, folder, pool, results)
        for scenario, call in scenarios.items():
            began, everyone = time.monotonic(), [None] * world_size
            try:
                mine = call()
            except Exception as error:  # told by the test of this family; the others' go on
                mine = {"error": f"rank {rank}: {type(error).__name__}: {error}"}
            dist.all_gather_object(everyone, mine)
            found.setdefault(name, {})[scenario] = everyone
            if rank == 0:
                print(f"{name} {scenario}: {time.monotonic() - began:.1f} s", flush=True)
    if rank == 0:
        (results / f"{world_size}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

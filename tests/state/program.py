"""A small ZeRO-3 program for the checkpoint tests: trains, commits, loads, and prints digests of the whole state.

python -m tests.state.program OUT SCRIPT      SCRIPT is JSON: [["train", n], ["commit"], ["load"], ["digest", NAME],
...]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from trainer import heartbeat
from trainer.observe.metrics import Metrics
from trainer.state import resume, slices
from trainer.state.snapshot import Snapshots
from trainer.state.upload import Identity, Uploader

GROUPS = 2


class Model(torch.nn.Module):
    """Tied head, a frozen layer, sizes that no world size divides, a parameter smaller than the world."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(37, 13)
        self.frozen = torch.nn.Linear(13, 13)
        self.middle = torch.nn.Sequential(torch.nn.Linear(13, 29), torch.nn.GELU(), torch.nn.Linear(29, 13))
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.head = torch.nn.Linear(13, 37, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.middle(self.frozen(hidden)) * self.scale[0] + self.scale[1]
        logits = self.head(hidden[:, :-1])
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 37), ids[:, 1:].reshape(-1))


def make_engine(threshold: int) -> Any:
    torch.manual_seed(7)
    model = Model()
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "lr": 3e-3, "weight_decay": 0.0}], lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 1 / (1 + step)])
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold, "sub_group_size": 400},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=decay + plain, optimizer=optimizer, lr_scheduler=schedule, config=config
    )
    return engine


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            seed = engine.micro_steps * 1000 + dist.get_rank()
            ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(seed))
            loss = engine(ids)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    return losses


def state_digest(engine: Any) -> str:
    """sha256 over the full masters, moments, what the model computes with, and the optimizer's facts."""
    mine = [(s.name, s.start, {k: v.clone() for k, v in s.tensors.items()}) for s in slices.local(engine)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = hashlib.sha256()
    pieces = sorted((piece for rank in everyone for piece in rank), key=lambda piece: piece[:2])
    for key in slices.STATES:
        for name, start, tensors in pieces:
            found.update(name.encode() if start == 0 else b"")
            found.update(tensors[key].numpy().tobytes())
    for _, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found.update(parameter.detach().numpy().tobytes())
    facts = slices.optimizer_facts(engine)
    facts.pop("global_samples")  # grows with the world size
    found.update(
        json.dumps([facts, engine.lr_scheduler.last_epoch, [g["lr"] for g in engine.optimizer.param_groups]]).encode()
    )
    return found.hexdigest()


def identity(**changes: Any) -> Identity:
    facts = {
        "stage": "sft",
        "attempt": int(os.environ.get("QWENVL_ATTEMPT", "1")),
        "stage_digest": "s",
        "plan_digest": "p",
        "base_model_digest": "b",
    }
    return Identity(**(facts | changes))


def main(out: str, script: list[list[Any]]) -> None:
    deepspeed.init_distributed("gloo")
    told: dict[str, Any] = {"losses": []}
    engine = make_engine(int(os.environ.get("THRESHOLD", "0")))
    metrics, snapshots = Metrics(None), Snapshots()
    manifest = resume.newest(out)
    uploader = Uploader(out, identity(), keep=2, resumed=manifest)
    for action, *arguments in script:
        if action == "train":
            told["losses"] += train(engine, *arguments)
            metrics.log(engine.global_steps, {"loss": told["losses"][-1]})
            heartbeat.pulse().beat(step=engine.global_steps, phase="train")
            uploader.poll()
        elif action == "load":
            assert manifest is not None
            resume.load(engine, out, manifest)
            told["loaded"] = [engine.global_steps, engine.micro_steps]
        elif action == "commit":
            snapshot = snapshots.take(engine, step=engine.global_steps)
            loader = {"step": engine.global_steps}
            uploader.commit(snapshot, loader=loader, metrics=metrics.drain(), extra={"note": 1})
            told["stall_s"] = uploader.stall_s
        elif action == "wait":
            told["committed"] = uploader.wait()
        elif action == "digest":
            told[arguments[0]] = state_digest(engine)
        elif action == "kill":
            dist.barrier()
            os.kill(os.getpid(), 9)
    dist.barrier()
    if dist.get_rank() == 0:
        print("TOLD " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

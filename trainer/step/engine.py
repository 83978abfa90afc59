"""DeepSpeed ZeRO-3 around a PackedModel: configuration, construction, one optimizer step.

The loss of a step is the sum over target tokens (dpo: pairs) of all ranks and micro-batches, divided by their global
number. DeepSpeed averages gradients over ranks, so every micro-batch's sum is scaled by world / number, and its own
division by the accumulation is turned off. Gradients are accumulated and sent in fp32, also when weights are bf16.

Shapes: K figures, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import CountMismatch, NumericsError
from trainer.recipe import Stage
from trainer.step.optim import parameter_groups
from trainer.step.packed import Pack, PackedModel

NEVER = 10**9


def zero_config(stage: Stage, num_micro_batches: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a stage."""
    on_gpu = torch.cuda.is_available()
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": stage.optim.clip,
        "bf16": {"enabled": stage.compute.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "sub_group_size": stage.zero.sub_group_size,
            "reduce_bucket_size": stage.zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": stage.zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": stage.zero.param_persistence_threshold,
            "stage3_max_live_parameters": stage.zero.max_live_parameters,
            "stage3_max_reuse_distance": stage.zero.max_live_parameters,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def sharded(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Modules made in here keep only this rank's part of each parameter: a 72B model never lies whole on a rank.

    The dtype comes from the configuration. Given as an argument it is not obeyed on CPU: DeepSpeed 0.19.8 reads
    `dtype or fp16 if fp16 is supported else bf16` and makes the model bf16, in silence.
    """
    return deepspeed.zero.Init(config_dict_or_path=config)


def make_engine(model: PackedModel, stage: Stage, config: dict[str, Any], group_of: Callable[[str], str]) -> Any:
    """The engine; masters and moments start from the weights that `model` has now."""
    groups = parameter_groups(model.named_parameters(), group_of, stage.optim)
    optimizer = torch.optim.AdamW(
        groups, lr=stage.optim.lr, betas=stage.optim.betas, eps=stage.optim.eps, fused=torch.cuda.is_available()
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    model.exact_buffers()
    wanted = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    assert all(parameter.dtype == wanted for parameter in model.parameters()), "a parameter of another dtype"
    return engine


# ---------------------------------------------------------------- one step


@dataclass(frozen=True)
class StepFigures:
    """Sums over all ranks and micro-batches of a step."""

    sums: dict[str, float]
    grad_norm: float
    """Before clipping, over all trained parameters."""
    per_rank: dict[str, list[float]]
    """`own` figures by rank."""


def train_step(
    engine: Any, packs: Sequence[Pack], *, denominator: int, count: str, step: int, own: Mapping[str, float]
) -> StepFigures:
    """Forward, backward, checks, optimizer step.

    Args:
        own: figures of this rank (work, a wish to stop) that are summed over ranks in the same collective.
        packs: this rank's micro-batches, as many on every rank.
        denominator: global number of target tokens (`count` targets) or pairs (`count` pairs) that the plan names.

    Raises:
        NumericsError: a loss or gradient is not finite; raised on every rank, before weights change.
        CountMismatch: the packs hold another number of targets than the plan says; likewise.
    """
    world_size = dist.get_world_size()
    figures: list[dict[str, Tensor]] = []
    for number, pack in enumerate(packs):
        loss, found = engine(pack)
        engine.backward(loss * (world_size / max(1, denominator)), scale_wrt_gas=False)
        figures.append(found)
        if number < len(packs) - 1:
            engine.step()  # counts the micro-batch; the optimizer moves in the last one
    counted = sum(len(pack.pairs) if count == "pairs" else pack.num_targets for pack in packs)
    sums, per_rank = _over_ranks(figures, counted, _gradient_square(engine), own)
    _check_finite(sums, packs, figures, step)
    if int(sums["counted"]) != denominator:
        raise CountMismatch(
            f"encoded {count} differ from the plan's",
            where=f"step {step}",
            expected=denominator,
            got=int(sums["counted"]),
            do="the data changed after planning, or code that counts and code that encodes disagree: plan again",
        )
    engine.step()
    return StepFigures(sums, math.sqrt(sums["grad_square"]), per_rank)


def evaluate(engine: Any, packs: Sequence[Pack], count: str) -> dict[str, float]:
    """Sums of the figures over these packs and all ranks, without gradient; as many packs on every rank."""
    engine.eval()
    figures = []
    with torch.no_grad():
        for pack in packs:
            figures.append(engine(pack)[1])
    engine.train()
    counted = sum(len(pack.pairs) if count == "pairs" else pack.num_targets for pack in packs)
    return _over_ranks(figures, counted, torch.zeros(()), {})[0]


def _over_ranks(
    figures: Sequence[dict[str, Tensor]], counted: int, grad_square: Tensor, own: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(sums, own figures by rank): one collective and one wait for the device a step, summed in fp64 in the order of
    ranks, so that it repeats."""
    names = sorted(figures[0])
    device = figures[0][names[0]].device
    mine = torch.stack(
        [torch.stack([found[name].double() for found in figures]).sum() for name in names]
        + [grad_square.double().to(device)]
        + [torch.tensor(float(value), dtype=torch.float64, device=device) for value in (counted, *own.values())]
    )  # fp64[K]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    columns = torch.stack(everyone, dim=1).tolist()  # K x W
    keys = [*names, "grad_square", "counted", *own]
    table = dict(zip(keys, columns, strict=True))
    sums = {key: math.fsum(row) if all(map(math.isfinite, row)) else math.nan for key, row in table.items()}
    return sums, {key: table[key] for key in own}


def _gradient_square(engine: Any) -> Tensor:
    """Sum of squares of this rank's part of the accumulated gradient."""
    parts = [grad for group in engine.optimizer.averaged_gradients.values() for grad in group or () if grad is not None]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([grad.double().square().sum() for grad in parts]).sum()


def _check_finite(
    sums: dict[str, float], packs: Sequence[Pack], figures: Sequence[dict[str, Tensor]], step: int
) -> None:
    if all(map(math.isfinite, sums.values())):
        return
    rank = dist.get_rank()
    bad = [pack for pack, found in zip(packs, figures, strict=True) if not all(map(torch.isfinite, found.values()))]
    what = "loss" if not math.isfinite(sums["loss_sum"]) else "gradient"
    suspects = bad or (packs if what == "gradient" else [])
    raise NumericsError(
        f"the {what} is not finite",
        where=f"step {step}, rank {rank}",
        expected="a finite number on every rank",
        got=f"{what} {sums['loss_sum' if what == 'loss' else 'grad_square']}"
        + (f"; samples here: {', '.join(name for pack in suspects for name in pack.sample_ids)}" if suspects else
           "; this rank's own loss is finite, another rank's is not"),
        do="look at these samples; leave bad ones out (stages.STAGE.skip_samples), or lower the learning rate",
    )  # fmt: skip

"""A stage of every family by the trainer itself on one GPU: NCCL, ZeRO-3, bf16; against the same stage in fp32 on the
CPU, and what the driver says meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.gpu.cuda import GPU
from tests.models.builders import Built
from trainer import handover
from trainer.command import StageCall, merged, stage_command
from trainer.handover import StageResult
from trainer.observe.gpu import Gpu
from trainer.observe.metrics import decode_rows
from trainer.step.attention import chosen

pytestmark = GPU
STAGE = "stage1"


@dataclass(frozen=True)
class Trained:
    result: StageResult
    steps: list[Mapping[str, float]]
    """Metrics of every step."""
    told: str


def trained(built: Built, out: Path, device: Literal["cpu", "cuda"], precision: str) -> Trained:
    """The stage from its first step, one rank, as a recipe's step starts it."""
    shutil.copytree(built.out, out, ignore=shutil.ignore_patterns("export"))
    (out / STAGE / "result.json").unlink()
    shutil.rmtree(out / STAGE / "model")
    recipe = out / "recipe.json"
    recipe.write_text(json.dumps(built.recipe.model_dump(mode="json")))
    call = StageCall(
        recipe=str(recipe), stage=STAGE, out=str(out), device=device, python=sys.executable,
        overrides=(f"stages.{STAGE}.compute.precision={precision}",),
    )  # fmt: skip
    command = stage_command(call)
    done = subprocess.run(
        command.argv, env=merged(os.environ, command), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = decode_rows((out / STAGE / "attempts" / "0001" / "metrics.jsonl").read_bytes())
    return Trained(handover.read(str(out), STAGE, verify="full"), [row.values for row in rows], done.stdout)


def test_a_stage_in_bf16_on_nccl_learns_what_fp32_on_the_cpu_does(built: Built, tmp_path: Path) -> None:
    want, got = trained(built, tmp_path / "cpu", "cpu", "fp32"), trained(built, tmp_path / "cuda", "cuda", "bf16")
    assert len(got.steps) == len(want.steps) == built.recipe.stages.named()[STAGE].schedule.steps
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.03)
        assert mine["target_tokens"] == theirs["target_tokens"]
        assert mine["gpu.memory_peak_bytes"] > 0
    assert want.steps[-1]["loss"] < want.steps[0]["loss"], "negative control: there is something to learn"
    rows = got.result.freeze_table
    assert {row.group for row in rows if row.state == "trained"} == {"vision", "merger", "llm"}
    assert all((row.digest_before != row.digest_after) == (row.state == "trained") for row in rows)
    choice = chosen("cuda", torch.bfloat16)
    assert f"attention: {choice.name}, {choice.reason}" in got.told


def test_readings_are_those_of_the_device() -> None:
    """Memory always; what else a device reports lies where it can lie."""
    gpu = Gpu(torch.cuda.current_device())
    torch.zeros(1, device="cuda")
    before = gpu.read()
    block = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    after = gpu.read()
    assert after["gpu.memory_gib"] - before["gpu.memory_gib"] == pytest.approx(block.numel() / 2**30, abs=0.5)
    total = torch.cuda.get_device_properties(0).total_memory
    assert after["gpu.memory_gib"] / after["gpu.memory_share"] == pytest.approx(total / 2**30, rel=0.05)
    limits = {"gpu.utilisation": (0, 1), "gpu.power_w": (1, 2000), "gpu.temperature_c": (1, 120)}
    for name, (least, most) in limits.items():
        assert least <= after.get(name, least) <= most, name

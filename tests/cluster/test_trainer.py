"""The real trainer in real pods: data preparation as a Job, first weights and a stage as PyTorchJobs, all in S3.

A worker of the stage is killed in the middle; the next attempt resumes, and the weights are, bit for bit, those of a
run on this machine that nothing disturbed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import fsspec
import pytest

from k8s.loop import Launcher
from k8s.names import Run
from k8s.tasks import task_of
from pipelines.settle import settle
from tests.cluster import nodes, place
from tests.cluster.bench import ROOT, Bench, Launching
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from trainer import handover, storage
from trainer import manifest as manifests
from trainer.command import StageCall, merged, stage_command
from trainer.recipe import Recipe

pytestmark = pytest.mark.cluster

STAGE = "stage1"
OVERRIDES = [
    f"stages.{STAGE}.compute.node_pool=cpu",
    f"stages.{STAGE}.compute.nodes=2",
    f"stages.{STAGE}.compute.gpus_per_node=1",
    f"stages.{STAGE}.schedule.steps=24",
    f"stages.{STAGE}.checkpoint.every_steps=4",
]
LIMIT_S = 600


def step(bench: Bench, recipe: Recipe, what: str, stage: str | None = None) -> Launching:
    task = task_of(what, recipe, bench.cluster, Run(out=bench.out, id="run-1"), stage=stage)
    api = api_of(str(bench.launcher), bench.namespace)
    return bench.start(lambda say: Launcher(api, bench.cluster, task, say=say).launch())


def kill(pod: dict[str, Any]) -> None:
    """SIGKILL to the container's first process, as the kernel does it: exit code 137."""
    node = next(node for node in place.NODES if node.name == pod["spec"]["nodeName"])
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    nodes.ctr(node, "tasks", "kill", "--signal", "SIGKILL", container)


def undisturbed(out: str) -> handover.StageResult:
    """The same stage on this machine, its two ranks started by trainer/launch.py."""
    call = StageCall(
        recipe=storage.join(out, "recipe.json"),
        stage=STAGE,
        out=out,
        procs_per_node=2,
        device="cpu",
        python=sys.executable,
    )
    command = stage_command(call)
    done = subprocess.run(
        command.argv, cwd=ROOT, env=merged(os.environ, command), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return handover.read(out, STAGE)


def test_a_stage_with_a_killed_worker_ends_in_the_bits_of_an_undisturbed_one(bench: Bench, reached: Reached) -> None:
    if not reached.own:
        pytest.skip("a container of KUBECONFIG's cluster cannot be killed from here")
    recipe = settle("tiny_smoke", OVERRIDES, out=bench.out)
    for what, stage in (("prepare-data", None), ("prepare-stage", STAGE), ("init", None)):
        step(bench, recipe, what, stage).done(LIMIT_S)
    copy = f"{bench.out}-undisturbed"
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    files.copy(f"{bench.out}/", f"{copy}/", recursive=True)

    training = step(bench, recipe, "train", STAGE)
    uri = storage.join(bench.out, STAGE)

    def committed() -> int:
        newest = manifests.newest(uri)
        return newest.step if newest else 0

    before = bench.until("a commit", committed, LIMIT_S)
    assert before < 24, "the worker must be killed in the middle"
    kill(bench.running(step=STAGE)[1])
    training.done(LIMIT_S)
    jobs = [job["metadata"]["name"][-3:] for job in bench.jobs() if f"-{STAGE}-" in job["metadata"]["name"]]
    assert jobs == ["-a1", "-a2"]
    result = handover.read(bench.out, STAGE, verify="full")
    assert result.world_size == 2 and result.attempts == 2
    assert result.model.digest == undisturbed(copy).model.digest

"""The real trainer in real pods: data preparation as Jobs, stage1 and sft as PyTorchJobs of two workers.

Data and checkpoints are in S3, MLflow is on the network, all goes through a queue. A worker of stage1 is killed in the
middle, sft is suspended for a more urgent job; the weights are, bit for bit, those of a run on this machine that
nothing disturbed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import fsspec
import pytest

from k8s.loop import Launcher
from k8s.names import Run
from k8s.tasks import committed_of, task_of
from pipelines.settle import settle
from tests.cluster import nodes, services
from tests.cluster.bench import ROOT, Bench, Launching
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from tests.cluster.queues import queued, room
from trainer import handover, storage
from trainer.command import StageCall, merged, stage_command
from trainer.observe.tracking import run_id
from trainer.recipe import Recipe

pytestmark = [pytest.mark.cluster, pytest.mark.unshielded]

STEPS = 16
STAGES = ("stage1", "sft")
OVERRIDES = [
    *(f"stages.{left_out}=null" for left_out in ("stage2", "stage3", "dpo", "sft.sampling")),
    "prepare.sources.preferences=null",
    "stages.sft.data={instructions: 1}",
    *(
        f"stages.{stage}.{field}"
        for stage in STAGES
        for field in (
            "compute.node_pool=cpu",
            "compute.nodes=2",
            "compute.gpus_per_node=1",
            f"schedule.steps={STEPS}",
            "checkpoint.every_steps=4",
        )
    ),
]
LIMIT_S = 900


@pytest.fixture
def chain(bench: Bench, reached: Reached) -> Iterator[Bench]:
    """On nodes that no other test disturbs, through a queue with room for one stage, followed by MLflow."""
    if not reached.own:
        pytest.skip("a container of KUBECONFIG's cluster cannot be killed from here")
    services.start_mlflow()
    tracked = bench.with_cluster(
        {
            "tracking_uri": services.address(services.MLFLOW, services.MLFLOW_PORT),
            "pools": {"cpu": {"labels": {"qwenvl-train/pool": "gpu-b"}}},
        }
    )
    with room(tracked, pool="gpu-b", cpu="4"):
        yield queued(tracked)


def step(bench: Bench, recipe: Recipe, what: str, stage: str | None = None) -> Launching:
    task = task_of(what, recipe, bench.cluster, Run(out=bench.out, id="run-1"), stage=stage)
    api = api_of(str(bench.launcher), bench.namespace)
    return bench.start(lambda say: Launcher(api, bench.cluster, task, say=say).launch())


def committed(bench: Bench, stage: str) -> Callable[[], bool]:
    """Whether an attempt has committed, and has some way to go."""
    uri = storage.join(bench.out, stage)

    def look() -> bool:
        newest = committed_of(uri) or 0
        assert newest < STEPS, "it must be disturbed in the middle"
        return newest > 0

    return look


def undisturbed(out: str) -> list[handover.StageResult]:
    """The same stages on this machine, their two ranks started by trainer/launch.py."""
    for stage in STAGES:
        uri = storage.join(out, "recipe.json")
        call = StageCall(recipe=uri, stage=stage, out=out, procs_per_node=2, device="cpu", python=sys.executable)
        command = stage_command(call)
        done = subprocess.run(
            command.argv, cwd=ROOT, env=merged(os.environ, command), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [handover.read(out, stage) for stage in STAGES]


def test_two_stages_with_a_kill_and_a_preemption_end_in_the_bits_of_an_undisturbed_run(chain: Bench) -> None:
    recipe = settle("tiny_smoke", OVERRIDES, out=chain.out)
    for what, stage in (("prepare-data", None), ("init", None), *(("prepare-stage", stage) for stage in STAGES)):
        step(chain, recipe, what, stage).done(LIMIT_S)
    copy = f"{chain.out}-undisturbed"
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    files.copy(f"{chain.out}/", f"{copy}/", recursive=True)
    with ThreadPoolExecutor() as pool:
        want: Future[list[handover.StageResult]] = pool.submit(undisturbed, copy)

        training = step(chain, recipe, "train", "stage1")
        chain.until("a commit of stage1", committed(chain, "stage1"), LIMIT_S)
        nodes.task(chain.running(step="stage1")[1], "kill", "--signal", "SIGKILL")  # 137, as the kernel does it
        training.done(LIMIT_S)

        training = step(chain, recipe, "train", "sft")
        chain.until("a commit of sft", committed(chain, "sft"), LIMIT_S)
        urgent = queued(chain, priority_class="urgent").other_out()
        high = urgent.launch({"steps": 2}, run_id="run-2", pool="cpu")
        chain.until("the suspension", lambda: training.heard("queue: suspended"))
        high.done(LIMIT_S)
        training.done(LIMIT_S)

    jobs = sorted(job["metadata"]["name"] for job in chain.jobs() if job["metadata"]["annotations"])
    ends = [name.rsplit("-", 1)[1] for stage in STAGES for name in jobs if f"smoke-{stage}-" in name]
    assert ends[:2] == ["a1", "a2"], "stage1 was killed once"
    results = [handover.read(chain.out, stage, verify="full") for stage in STAGES]
    assert [result.attempts for result in results] == [2, 1], "a suspension is no attempt"
    assert [result.world_size for result in results] == [2, 2]
    assert [result.model.digest for result in results] == [result.model.digest for result in want.result()]
    for stage in STAGES:
        seen_in_mlflow(chain, recipe, stage)


def seen_in_mlflow(chain: Bench, recipe: Recipe, stage: str) -> None:
    """One run of the stage below the pipeline's, with its freeze configuration and every step, once."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(services.MLFLOW_URI)
    found, parent = run_id(storage.join(chain.out, stage)), run_id(chain.out)
    assert found is not None and parent is not None
    run = client.get_run(found)
    assert run.data.tags["mlflow.parentRunId"] == parent and run.info.status == "FINISHED"
    wanted = recipe.stages.named()[stage]
    assert run.data.params["freeze.vision"] == ("trained" if wanted.train.vision else "frozen")
    assert run.data.params["packing.length"] == str(wanted.packing.length)
    assert [metric.step for metric in client.get_metric_history(found, "loss")] == list(range(1, STEPS + 1))

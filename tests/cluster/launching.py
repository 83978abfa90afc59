"""k8s/launcher.py on a stage whose ranks run payload.py: in a thread of a test, or as a process that can be killed.

    python -m tests.cluster.launching SPEC.json

Everything but the argv of the container is what the product renders and does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from k8s import names, pytorchjob, trainjob
from k8s.client import KubernetesApi
from k8s.cluster import Cluster
from k8s.loop import Launcher
from k8s.names import Run
from k8s.pytorchjob import Rendered, spec_sha256
from k8s.record import FOLDER
from k8s.tasks import Task, progress_of
from trainer import storage
from trainer.errors import QwenVLError
from trainer.recipe import STAGES, Recipe
from trainer.resolve import digest, load_recipe

Json = dict[str, Any]


class Dying(KubernetesApi):
    """The real one; the process is killed before or after it creates the job, whose ConfigMap is not made yet."""

    moment: str | None = None

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        job = body["kind"] in ("PyTorchJob", "TrainJob") and not dry_run
        if job and self.moment == "before create":
            die()
        made = super().create(body, dry_run=dry_run)
        if job and self.moment == "after create":
            die()
        return made


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def api_of(kubeconfig: str, namespace: str) -> Dying:
    """The launcher's own client, with the credentials of one kubeconfig."""
    from kubernetes import client, config

    def load() -> Any:
        configuration = client.Configuration()
        config.load_kube_config(kubeconfig, client_configuration=configuration)
        return client.ApiClient(configuration)

    return Dying(namespace, load=load)


def launch(spec: Json, say: Callable[[str], None]) -> None:
    """Launch the stage `sft` of tiny_smoke with payload.py as its program.

    spec: cluster, out, kubeconfig, payload; run_id; pool, nodes, gpus; memory (limit of the container); image;
    die: a moment at which this process gets SIGKILL, see Dying; clocks of pods (payload.py) and ahead_s of the
    launcher: wall clocks that are wrong.

    Raises:
        ClusterError: as the launcher does.
    """
    cluster = Cluster.model_validate(spec["cluster"])
    recipe = recipe_on("sft", spec.get("pool", "gpu"), spec.get("nodes", 2), spec.get("gpus", 1))
    stage_uri = storage.join(spec["out"], "sft")
    done = storage.join(stage_uri, "payload", "done.json")
    run = Run(out=spec["out"], id=spec.get("run_id", "run-1"), stage_digest="payload")

    def render(one: Run) -> Rendered:
        renderer = trainjob if cluster.job_kind == "TrainJob" else pytorchjob
        return with_payload(renderer.render_stage(recipe, "sft", cluster, one), spec)

    def finished() -> bool:
        found = storage.exists(done)
        if found and spec.get("die") == "after success":
            die()
        return found

    task = Task(
        step="sft",
        run=run,
        render=render,
        finished=finished,
        progress=lambda attempt: progress_of(stage_uri, attempt),
        committed=lambda: max(commits(stage_uri), default=None),
        stage_uri=stage_uri,
        records=storage.join(spec["out"], FOLDER),
    )
    api = api_of(spec["kubeconfig"], cluster.namespace)
    api.moment = spec.get("die")
    Launcher(api, cluster, task, say=say, now=lambda: time.time() + spec.get("ahead_s", 0)).launch()


def commits(stage_uri: str) -> list[int]:
    """Steps that payload.py has committed."""
    names = storage.list_dir(storage.join(stage_uri, "payload", "commits"))
    return sorted(int(name.partition(".")[0]) for name in names)


def recipe_on(stage: str, pool: str = "gpu", nodes: int = 2, gpus: int = 8) -> Recipe:
    """tiny_smoke with one stage on a pool's nodes, and lanes for all its ranks."""
    ranks = nodes * gpus
    compute = {"node_pool": pool, "nodes": nodes, "gpus_per_node": gpus}
    overrides = [f"stages.{stage}.compute.{name}={value}" for name, value in compute.items()]
    overrides += [f"stages.{name}.schedule.packs_per_step={ranks}" for name in STAGES]
    return load_recipe("tiny_smoke", [*overrides, f"prepare.lanes={ranks}"])


def with_payload(rendered: Rendered, spec: Json) -> Rendered:
    """The rendered job with payload.py in the place of trainer.train, one rank a pod; the digest is made anew."""
    job, (template,) = rendered.job, rendered.templates()
    container = template["spec"]["containers"][0]
    own, rest = container["args"][: container["args"].index("--")], container["args"]
    own[own.index("--nproc-per-node") + 1] = "1"
    if rendered.runtime is None:
        job["spec"]["nprocPerNode"] = "1"
    else:
        job["spec"]["trainer"]["numProcPerNode"] = 1
    out, stage = rest[rest.index("--out") + 1], rest[rest.index("--stage") + 1]
    container["args"] = [*own, "--module", "payload", "--heartbeat", "2", "--", "--out", out, "--stage", stage]
    container["args"].append(json.dumps(spec["payload"], sort_keys=True))
    if "clocks" in spec:
        container["args"][container["args"].index("trainer.launch")] = "payload"
        container["env"].append({"name": "TEST_CLOCKS", "value": json.dumps(spec["clocks"])})
    if "memory" in spec:
        container["resources"]["limits"]["memory"] = spec["memory"]
        container["resources"]["requests"]["memory"] = spec["memory"]
    if "image" in spec:
        container["image"] = spec["image"]
    job["metadata"]["annotations"][names.SPEC] = spec_sha256(job)
    if rendered.runtime is not None:
        mark = rendered.runtime["metadata"]["annotations"][names.SPEC] = spec_sha256(rendered.runtime)
        job["metadata"]["annotations"][names.SPEC] = digest([mark, spec_sha256(job)])
    return rendered


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    try:
        launch(asked, lambda line: print(line, flush=True))
    except QwenVLError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.code)

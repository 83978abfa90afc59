"""(recipe, step, cluster, run, command) -> the RayJob of a data preparation step, for prepare.engine ray. Pure.

The same step and the same command as k8s/job.py, over several nodes: a head, where the step's own process runs, and
`ray.workers` pods of the cluster's CPU pool, where Daft's row functions run. All are made by pod_template, with the
prepare image; so is the small pod that submits the step and follows its lines, because KubeRay's own has no security
context and Pod Security's level restricted would refuse it.

Read in the sources of KubeRay v1.5.1 (images/versions.env):
- It replaces command and arguments of the Ray containers with its own `ray start`, made from rayStartParams.
- Its probes call wget, which a slim Python image lacks; probes that are given here stay.
- A RayJob's name has at most 47 characters.
- After its ttlSecondsAfterFinished the pods of Ray go and the RayJob with its submitter stays: 0 here, since they would
  hold their nodes; who removes a RayJob that has ended is k8s/reaper.py.
- The submitter ends with 0 although the step failed; status.jobStatus says how it ended.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from k8s import names
from k8s.cluster import Cluster, NodePool, quantity
from k8s.job import prepare_pod
from k8s.names import Run
from k8s.pods import Pod, pod_template
from k8s.pytorchjob import Rendered, an_object, job_metadata, queue_labels
from trainer.command import Command
from trainer.recipe import Recipe

Json = dict[str, Any]

API_VERSION = "ray.io/v1"
KIND = "RayJob"
RAY_VERSION = "2.59.0"
"""Of the prepare image (constraints.txt; a test compares); KubeRay asks for it before it turns authentication on."""
MAX_NAME = 47
HEAD, WORKER, SUBMITTER = "ray-head", "ray-worker", "ray-job-submitter"
"""Names of the containers. The launcher reads the submitter's log: it is the step's."""
AGENT = ("http://localhost:52365/api/local_raylet_healthz",)
HEAD_URLS = (*AGENT, "http://localhost:8265/api/gcs_healthz")
OBJECT_STORE_SHARE = 0.9
"""Of /dev/shm: Ray refuses an object store that does not fit into it."""


def render_prepare(recipe: Recipe, step: str, cluster: Cluster, run: Run, command: Command) -> Rendered:
    """The RayJob of one attempt of a preparation step; arguments as of k8s.job.render_prepare."""
    assert cluster.ray is not None, "tasks.py asks for a RayJob where the cluster file has `ray`"
    quiet = Command([], {**command.env, "DAFT_PROGRESS_BAR": "0"})  # every worker would draw its own
    config, pod = prepare_pod(recipe, step, cluster, run, quiet, HEAD)
    pool, workers = pod.pool, cluster.ray.workers
    spec = {
        "entrypoint": shlex.join(command.argv),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},  # a submitter that is made again finds the step and follows it
        "submitterPodTemplate": _submitter(pod),
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                # No row function runs beside the step's own process: it must not be killed for their memory.
                "rayStartParams": {**_start(pool), "num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": _ray_template(pod, HEAD_URLS),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": workers,
                    "minReplicas": workers,
                    "maxReplicas": workers,
                    "rayStartParams": {**_start(pool), "num-cpus": str(max(1, int(quantity(pool.cpu))))},
                    "template": _ray_template(replace(pod, container=WORKER), AGENT),
                }
            ],
        },
    }
    name = names.job_name(recipe.name, step, run, MAX_NAME)
    about = job_metadata(name, cluster, run, {**pod.labels, **queue_labels(cluster)})
    return Rendered(config, an_object(API_VERSION, KIND, about, spec))


def _start(pool: NodePool) -> dict[str, str]:
    return {"object-store-memory": str(int(quantity(pool.shm) * OBJECT_STORE_SHARE)), "disable-usage-stats": "true"}


def _ray_template(pod: Pod, urls: tuple[str, ...]) -> Json:
    """A pod whose program KubeRay writes, with probes that need nothing but Python."""
    template = pod_template(pod)
    container = template["spec"]["containers"][0]
    del container["command"], container["args"]
    probe = {"exec": {"command": ["python", "-c", PROBE, *urls]}, "timeoutSeconds": 10, "periodSeconds": 10}
    # As patient as KubeRay's own: a raylet that is busy is not dead.
    container["livenessProbe"] = {**probe, "initialDelaySeconds": 30, "failureThreshold": 120}
    container["readinessProbe"] = {**probe, "initialDelaySeconds": 10, "failureThreshold": 10}
    return template


PROBE = (
    "import sys, urllib.request as request\n"
    "for url in sys.argv[1:]:\n"
    "    if b'success' not in request.urlopen(url, timeout=4).read():\n"
    "        sys.exit(url)\n"
)


def _submitter(pod: Pod) -> Json:
    """KubeRay fills in what it runs: `ray job submit`, then `ray job logs --follow`."""
    template = pod_template(replace(pod, container=SUBMITTER))
    container = template["spec"]["containers"][0]
    del container["command"], container["args"]
    container["env"] = [entry for entry in container["env"] if entry["name"] != "PYTHONUNBUFFERED"]  # KubeRay adds it
    container["resources"] = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}
    return template

"""RayJob for data preparation: the step of the one-pod Job, in pods that KubeRay can finish, for a strict server."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from k8s import job, rayjob
from k8s.cluster import Cluster, load_cluster, shipped
from k8s.pods import RECIPE_FILE
from k8s.pytorchjob import Rendered
from k8s.schemas.validate import problems
from tests.k8s.golden import RAY, RUN
from trainer.command import PrepareCall, prepare_command
from trainer.resolve import load_recipe

Json = dict[str, Any]
COMMAND = prepare_command(PrepareCall("prepare-data", RECIPE_FILE, RUN.out))
ROOT = Path(__file__).parents[2]


def a_rayjob(cluster: Cluster | None = None, recipe: str = "qwen2_5_vl_72b") -> Rendered:
    cluster = cluster or load_cluster("onprem", [RAY])
    return rayjob.render_prepare(load_recipe(recipe), "prepare-data", cluster, RUN, COMMAND)


def templates(one: Rendered) -> dict[str, Json]:
    ray = one.job["spec"]["rayClusterSpec"]
    found = [one.job["spec"]["submitterPodTemplate"], ray["headGroupSpec"]["template"]]
    found += [group["template"] for group in ray["workerGroupSpecs"]]
    return {template["spec"]["containers"][0]["name"]: template for template in found}


@pytest.mark.parametrize("cluster", shipped())
@pytest.mark.parametrize("recipe", ["tiny", "qwen2_5_vl_7b_finetune", "qwen2_5_vl_72b"])
def test_a_strict_server_takes_it(cluster: str, recipe: str) -> None:
    one = a_rayjob(load_cluster(cluster, [RAY]), recipe)
    assert problems(one.job) == []
    assert problems(one.config_map) == []
    one.job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["nodeSelektor"] = {}
    assert any("nodeSelektor" in problem for problem in problems(one.job))


def test_its_name_has_no_more_characters_than_kuberay_takes() -> None:
    for recipe in ("qwen2_5_vl_7b_finetune", "llava_1_6_vicuna_7b", "tiny"):
        name = a_rayjob(recipe=recipe).name
        assert len(name) <= 47 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert name.endswith(f"-prepare-data-{RUN.identity}-a1")


def test_it_runs_the_very_command_of_the_one_pod_job() -> None:
    one = a_rayjob()
    plain = job.render_prepare(load_recipe("qwen2_5_vl_72b"), "prepare-data", load_cluster("onprem"), RUN, COMMAND)
    container = plain.job["spec"]["template"]["spec"]["containers"][0]
    assert shlex.split(one.job["spec"]["entrypoint"]) == container["command"] + container["args"]
    assert one.config_map == plain.config_map


def test_every_pod_is_the_prepare_pod_but_for_program_and_probes() -> None:
    plain = job.render_prepare(load_recipe("qwen2_5_vl_72b"), "prepare-data", load_cluster("onprem"), RUN, COMMAND)
    want = plain.job["spec"]["template"]
    container = want["spec"]["containers"].pop()
    del want["spec"]["shareProcessNamespace"]  # KubeRay's command is process 1 there, and passes signals on
    for name, template in templates(a_rayjob()).items():
        (found,) = template["spec"].pop("containers")
        assert template == {"metadata": want["metadata"], "spec": {k: v for k, v in want["spec"].items() if v != []}}
        assert "command" not in found and "args" not in found, "KubeRay writes them"
        for field in ("image", "securityContext", "volumeMounts", "terminationMessagePath"):
            assert found[field] == container[field], (name, field)
        if name != "ray-job-submitter":
            assert found["resources"] == container["resources"]
            theirs, ours = ({entry["name"]: entry for entry in one["env"]} for one in (found, container))
            assert theirs == ours | {"DAFT_PROGRESS_BAR": {"name": "DAFT_PROGRESS_BAR", "value": "0"}}


def test_the_head_takes_no_row_function_and_workers_take_one_a_processor() -> None:
    ray = a_rayjob(load_cluster("onprem", ["ray.workers=7"])).job["spec"]["rayClusterSpec"]
    head, (workers,) = ray["headGroupSpec"], ray["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["rayStartParams"]["num-cpus"] == "32"
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (7, 7, 7)
    for group in (head, workers):
        assert int(group["rayStartParams"]["object-store-memory"]) < 8 * 2**30, "Ray refuses more than /dev/shm holds"
    assert not {
        entry["name"] for entry in templates(a_rayjob())["ray-job-submitter"]["spec"]["containers"][0]["env"]
    } & {"PYTHONUNBUFFERED"}, "KubeRay appends it without looking"


def test_one_attempt_and_nothing_left_running() -> None:
    spec = a_rayjob().job["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 0, "Ray's pods hold their nodes so long"


def test_rays_port_is_closed_to_who_has_no_token_and_the_version_is_the_images() -> None:
    ray = a_rayjob().job["spec"]["rayClusterSpec"]
    assert ray["authOptions"] == {"mode": "token"}
    assert f"ray=={ray['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    extra = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'"ray\[default\]', extra), "without its dashboard Ray takes no submitted step"


@pytest.mark.parametrize(
    ("answers", "want"), [({"/a": (200, b"success")}, 0), ({"/a": (200, b"down")}, 1), ({"/a": (503, b"success")}, 1)]
)
def test_the_probe_needs_nothing_but_python(answers: dict[str, tuple[int, bytes]], want: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a"
        done = subprocess.run([sys.executable, "-c", rayjob.PROBE, url], capture_output=True, timeout=30, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == want

"""What a step hands to a cluster, and what is told when this machine cannot."""

from __future__ import annotations

import json
import sys
from importlib import resources
from typing import Any

import pytest

from k8s.client import connect
from pipelines import work
from trainer import storage
from trainer.command import PARENT_RUN
from trainer.errors import UsageError
from trainer.resolve import load_recipe, resolved


def broken(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def run_step(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("k8s.launcher.run_step", run_step)


@pytest.mark.parametrize("name", ["kubernetes", "kubernetes.client", "kubeflow.training"])
def test_a_missing_kubernetes_client_is_told_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, ModuleNotFoundError(f"No module named {name!r}", name=name))
    with pytest.raises(UsageError, match=r"install qwenvl-train\[cluster\]"):
        work._on_cluster("onprem", "init", "s3://b/out", "r1")


@pytest.mark.parametrize("name", ["urllib3", "trainer.nothing", None])
def test_any_other_import_that_fails_is_not_taken_for_it(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, ImportError("cannot import name", name=name))
    with pytest.raises(ImportError, match="cannot import name"):
        work._on_cluster("onprem", "init", "s3://b/out", "r1")


def test_the_client_that_is_really_missing_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a made-up error: the import as Python refuses it, where the launcher first needs it."""
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.setattr("k8s.launcher.run_step", lambda *_, **__: connect("default"))
    with pytest.raises(UsageError, match="needs the Kubernetes client"):
        work._on_cluster("onprem", "init", "s3://b/out", "r1")


@pytest.mark.parametrize("injected", ["run-of-kfp", None])
def test_the_run_that_kfp_puts_into_a_steps_environment_is_the_parent(
    injected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP 2.17 may set MLFLOW_RUN_ID in a step's pod; older ones set nothing, and the stage makes a parent itself."""
    out = f"memory://work/{injected}"
    storage.write_bytes(storage.join(out, "recipe.json"), json.dumps(resolved(load_recipe("tiny_smoke"))).encode())
    cluster = (resources.files("k8s") / "clusters" / "test.yaml").read_text(encoding="utf-8")
    launched: list[Any] = []

    class Launcher:
        def __init__(self, api: object, cluster: object, task: Any, **_: object):
            launched.append(task.render(task.run))

        def launch(self) -> None: ...

    monkeypatch.setattr("k8s.launcher.Launcher", Launcher)
    monkeypatch.setattr("k8s.launcher.connect", lambda namespace: None)
    if injected is None:
        monkeypatch.delenv(PARENT_RUN, raising=False)
    else:
        monkeypatch.setenv(PARENT_RUN, injected)
    work.init(cluster=cluster.replace("sha256:" + "0" * 64, "sha256:" + "1" * 64), out=out, run_id="r1")
    (rendered,) = launched
    (container,) = rendered.job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env.get("MLFLOW_RUN_ID") == injected

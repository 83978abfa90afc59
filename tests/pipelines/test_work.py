"""What a step hands to a cluster, and what is told when this machine cannot."""

from __future__ import annotations

import sys

import pytest

from k8s.client import connect
from pipelines import work
from trainer.errors import UsageError


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

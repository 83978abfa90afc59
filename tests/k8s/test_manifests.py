"""The examples for platform teams, and helm and kubectl from their package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from k8s.cluster import load_cluster, shipped
from k8s.schemas.validate import problems
from k8s.tools import tool

MANIFESTS = sorted((Path(__file__).parents[2] / "k8s" / "manifests").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_strict_server_takes_the_examples(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        assert problems(document) == []


def test_priority_classes_that_example_clusters_name_are_among_the_examples() -> None:
    documents = [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    known = {one["metadata"]["name"] for one in documents if one["kind"] == "PriorityClass"}
    for name in shipped():
        priorities = load_cluster(name).priorities
        assert {priorities.train, priorities.prepare} - {None} <= known


@pytest.mark.parametrize("name", ["helm", "kubectl"])
def test_the_tools_come_out_of_their_package(name: str) -> None:
    arguments = ["version", "--client"] if name == "kubectl" else ["version"]
    output = subprocess.run([str(tool(name)), *arguments], capture_output=True, text=True, check=True).stdout
    assert "v" in output

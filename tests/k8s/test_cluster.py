"""Cluster files: validated like recipes, and compared with a recipe before anything is rendered."""

from __future__ import annotations

import pytest

from k8s.cluster import check, example_images, load_cluster, quantity, shipped
from trainer import resolve
from trainer.errors import RecipeError, UsageError

DIGEST = "sha256:" + "1" * 64


@pytest.mark.parametrize("name", ["aks", "eks", "gke", "onprem", "test"])
def test_every_shipped_example_is_valid_and_fits_every_shipped_recipe(name: str) -> None:
    assert name in shipped()
    cluster = load_cluster(name)
    assert cluster.name == name
    for recipe in resolve.shipped():
        assert check(resolve.load_recipe(recipe), cluster) == []


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("pools.gpu.shms=1Gi", "pools.gpu.shms: unknown key; did you mean shm?"),
        ("storage.cach={}", "storage.cach: unknown key; did you mean cache?"),
        ("images.trainer=repo/trainer:latest", "images.trainer"),
        ("pools.gpu.shm=9Gi", "pools.gpu: shm 9Gi does not fit into memory 8Gi"),
        ("pools.gpu.memory=8 GB", "pools.gpu.memory"),
        ("cpu_pool=gpus", "cpu_pool: no pool 'gpus'"),
        ("grace.termination_s=30", "grace.termination_s: leaves the trainer less than 20 s"),
        ("storage.cache={kind: claim, size: 1Ti}", "kind claim needs claim"),
        ("storage.cache={kind: empty_dir, size: 1Ti, path: /x}", "kind empty_dir has no path"),
        ("queue={kind: kueue, name: q, topologie: required}", "did you mean topology?"),
        ("queue={kind: slurm, name: q}", "queue"),
        ("secrets={AWS_PROFILE: {secret: a, key: b}}", "secrets.AWS_PROFILE: storage.credentials gives"),
        ("secrets={KEY: {secret: a}}", "secrets.KEY.key"),
        ("pools.gpu.tolerations=[{key: a, operator: Equal}]", "operator Equal needs a value"),
    ],
)
def test_a_wrong_field_is_told_by_its_path(override: str, want: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_cluster("test", [override])
    assert "the cluster file has" in str(error.value)
    assert want in str(error.value)


def test_all_problems_of_a_file_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        load_cluster("test", ["nmae=x", "grace.termination_s=soon", "images.prepare=x"])
    assert len(error.value.problems) == 3


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="one of aks, eks"):
        load_cluster("no-such-cluster.yaml")


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        (["stages.stage1.compute.node_pool=h200"], "stages.stage1.compute.node_pool: cluster test has no pool 'h200'"),
        (
            ["stages.sft.compute={gpus_per_node: 16, nodes: 4}"],
            "stages.sft.compute.gpus_per_node: 16, but a node of pool gpu has 8",
        ),
        (["stages.sft.compute={node_pool: cpu, nodes: 1, gpus_per_node: 8}"], "has 2 CPUs and no GPU"),
    ],
)
def test_a_recipe_that_asks_for_more_than_the_cluster_has_is_refused(overrides: list[str], want: str) -> None:
    recipe = resolve.load_recipe("qwen2_5_vl_7b", overrides)
    assert any(want in problem for problem in check(recipe, load_cluster("test")))
    assert check(resolve.load_recipe("qwen2_5_vl_7b"), load_cluster("test")) == []


def test_example_images_are_known_as_such() -> None:
    assert example_images(load_cluster("test")) == ["trainer", "launcher", "prepare"]
    own = [f"images.{name}=r.example/{name}@{DIGEST}" for name in ("trainer", "launcher", "prepare")]
    assert example_images(load_cluster("test", own)) == []


@pytest.mark.parametrize(("text", "want"), [("2Gi", 2**31), ("500m", 0.5), ("1.5", 1.5), ("3G", 3e9), ("96", 96)])
def test_quantities_are_read_as_kubernetes_reads_them(text: str, want: float) -> None:
    assert quantity(text) == want

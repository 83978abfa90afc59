"""A queue of a test's own, with room for one stage: tests beside it have theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import yaml

from tests.cluster import place
from tests.cluster.bench import Bench
from tests.cluster.operators import QUEUES


@contextlib.contextmanager
def room(bench: Bench, *, pool: str = "gpu-a", **quotas: str) -> Iterator[None]:
    """The queue `train` of the test's namespace, over nodes of a pool; `quotas` are the resources that are scarce."""
    objects = {one["kind"]: one for one in yaml.safe_load_all(QUEUES.read_text())}
    flavor, whole = objects["ResourceFlavor"], objects["ClusterQueue"]
    flavor["metadata"]["name"] = whole["metadata"]["name"] = bench.namespace
    flavor["spec"]["nodeLabels"] = {"qwenvl-train/pool": pool}
    (offered,) = whole["spec"]["resourceGroups"][0]["flavors"]
    offered["name"] = bench.namespace
    for resource in offered["resources"]:
        resource["nominalQuota"] = quotas.get(resource["name"].replace(place.GPU, "gpus"), resource["nominalQuota"])
    local = {"apiVersion": whole["apiVersion"], "kind": "LocalQueue", "metadata": {"name": "train"}}
    bench.apply(flavor, whole, {**local, "spec": {"clusterQueue": bench.namespace}})
    try:
        yield
    finally:
        for kind in ("clusterqueue", "resourceflavor"):
            bench.until(f"the removal of the {kind}", partial(_deleted, bench, kind))


def _deleted(bench: Bench, kind: str) -> bool:
    """False while the API server does not answer: the test may be one that goes on while another one stops it."""
    try:
        bench.kubectl("delete", kind, bench.namespace, "--wait=false", "--ignore-not-found")
    except AssertionError:
        return False
    return True


def queued(bench: Bench, **queue: str) -> Bench:
    """Stages go through that queue; Kueue, not the fabric's affinity, says where they fit."""
    pools = {"gpu": {"fabric_key": None}}
    return bench.with_cluster({"queue": {"kind": "kueue", "name": "train", **queue}, "pools": pools})

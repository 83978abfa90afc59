"""Kubelets with Debian's containerd and runc: real nodes that share one machine, with pretended GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tests.cluster.control import answers, kubectl
from tests.cluster.images import PAUSE, Image, mounts
from tests.cluster.place import CGROUPS, DNS_SERVICE, GATEWAY, GPU, NODES, PKI, POD_RANGE, RUN, TAINT, Node
from tests.cluster.processes import run, spawn, wait_for
from tests.cluster.programs import CNI, Programs, find

CONTAINERD = """\
version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{folder}/containerd.sock"
[ttrpc]
  address = "{folder}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  stream_server_address = "127.0.0.1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{cni}"
  conf_dir = "{folder}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  base_runtime_spec = "{folder}/base-spec.json"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
"""


SHARES = 6144
"""CPU weight of all pods together, beside what else runs on the machine: six processes'. By default it is one's."""


def containerd_name(node: Node) -> str:
    return f"containerd-{node.name}"


def kubelet_name(node: Node) -> str:
    return f"kubelet-{node.name}"


def start_containerd(node: Node) -> None:
    (node.folder / "cni").mkdir(parents=True, exist_ok=True)
    (node.folder / "cni" / "10-bridge.conflist").write_text(json.dumps(_network(node)))
    (node.folder / "base-spec.json").write_text(json.dumps(_base_spec()))
    text = CONTAINERD.format(folder=node.folder, pause=PAUSE, cni=CNI)
    (node.folder / "containerd.toml").write_text(text)
    program = find("containerd")
    assert program is not None
    spawn(containerd_name(node), program, "--config", node.folder / "containerd.toml", "--log-level", "info")


def load_images(node: Node, images: Iterable[Image]) -> None:
    """Import the archives; references by digest become names of the image."""
    wait_for(f"containerd of {node.name}", lambda: "Server" in ctr(node, "version"), name=containerd_name(node))
    for image in images:
        ctr(node, "images", "import", image.archive)
        for reference in image.references:
            ctr(node, "images", "tag", "--force", image.tag, reference)


def start_kubelet(programs: Programs, node: Node) -> None:
    _make_cgroup(node)
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,  # true by default since 1.35
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.cgroup,
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "address": "0.0.0.0",
        "port": 10250 + 10 * node.index,
        "healthzPort": 10248 + 10 * node.index,
        "tlsCertFile": f"{PKI}/kubelet.crt",
        "tlsPrivateKeyFile": f"{PKI}/kubelet.key",
        "authentication": {
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
            "anonymous": {"enabled": False},
            "webhook": {"enabled": False},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "registerWithTaints": [TAINT],
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": True,  # without: no file system statistics, and eviction fails every 10 s
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "1s",
        "nodeLeaseDurationSeconds": 5,
        "podLogsDir": f"{node.folder}/pod-logs",
    }
    (node.folder / "kubelet.json").write_text(json.dumps(settings))
    labels = ",".join(f"{key}={value}" for key, value in node.labels.items())
    spawn(
        kubelet_name(node), programs["kubelet"], f"--config={node.folder}/kubelet.json",
        f"--kubeconfig={RUN}/{node.name}.kubeconfig", f"--root-dir={node.folder}/kubelet",
        f"--hostname-override={node.name}", f"--node-ip={GATEWAY}", f"--node-labels={labels}",
    )  # fmt: skip


def node_ready(node: Node) -> None:
    """Until pods can be bound to it, and ask for its GPUs."""
    wait_for(f"the kubelet of {node.name}", lambda: answers(f"http://127.0.0.1:{10248 + 10 * node.index}/healthz"),
             name=kubelet_name(node))  # fmt: skip
    ready = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    wait_for(f"node {node.name} to be ready", lambda: _node(node, ready) == "True", name=kubelet_name(node))
    path = f"/status/capacity/{GPU.replace('/', '~1')}"
    patch = json.dumps([{"op": "add", "path": path, "value": str(node.gpus)}])
    kubectl("patch", "node", node.name, "--subresource=status", "--type=json", "-p", patch)
    allocatable = rf"jsonpath={{.status.allocatable.{GPU.replace('.', chr(92) + '.')}}}"
    wait_for(f"the GPUs of {node.name}", lambda: _node(node, allocatable) == str(node.gpus), name=kubelet_name(node))


def _node(node: Node, output: str) -> str:
    return kubectl("get", "node", node.name, "-o", output, check=False)


def ctr(node: Node, *arguments: object) -> str:
    """A node's containerd, spoken to directly."""
    return run("ctr", "-a", node.socket, "-n", "k8s.io", *arguments, check=arguments[0] != "version")


def task(pod: dict[str, Any], *arguments: str) -> None:
    """A pod's container, by its containerd: ("pause",), ("resume",), ("kill", "--signal", "SIGKILL")."""
    node = next(node for node in NODES if node.name == pod["spec"]["nodeName"])
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    ctr(node, "tasks", *arguments, container)


def _network(node: Node) -> dict[str, object]:
    third = node.index + 1
    addresses = {
        "subnet": POD_RANGE,
        "rangeStart": f"10.244.{third}.1",
        "rangeEnd": f"10.244.{third}.254",
        "gateway": GATEWAY,
    }
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[addresses]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(node.folder / "addresses"),
        },
    }
    return {"cniVersion": "0.4.0", "name": node.name, "plugins": [bridge]}


def _base_spec() -> dict[str, object]:
    """containerd's own, with the host's programs in every container."""
    spec = json.loads(run("ctr", "oci", "spec"))
    spec["process"].pop("rlimits", None)  # would cap open files at 1024
    spec["mounts"] += [
        {"destination": inside, "source": outside, "type": "bind", "options": ["rbind", "ro"]}
        for outside, inside in mounts().items()
    ]
    return spec


def _make_cgroup(node: Node) -> None:
    """The node's own subtree in every hierarchy: a kubelet insists that it exists. cpuset's children start empty."""
    for hierarchy in CGROUPS.iterdir():
        if hierarchy.is_symlink() or not (hierarchy / "cgroup.procs").exists():
            continue
        parent = hierarchy
        for name in node.cgroup.strip("/").split("/"):
            path = parent / name
            path.mkdir(exist_ok=True)
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (path / file).exists():
                    (path / file).write_text((parent / file).read_text())
            if (path / "cpu.shares").exists() and parent == hierarchy:
                (path / "cpu.shares").write_text(str(SHARES))
            parent = path

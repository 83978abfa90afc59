"""Operators that only some tests need, each from a Go module of its own: built and started by the first test that asks.

    start(KUBERAY); start(JOBSET, TRAINER)     they are at work when this returns, and end with the cluster

One that runs already stays. What a cluster is made from (programs.py) does not hang on them: a change of theirs builds
nothing else again, and a cluster without such a test neither starts nor builds any.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from tests.cluster import control, sharing
from tests.cluster.operators import CERTIFICATES, NOT_APPLIED, certificates, webhook_service
from tests.cluster.place import DNS_SERVICE, HOME, RUN, WHICH
from tests.cluster.processes import pid_of, spawn, wait_for
from tests.cluster.programs import SOURCES, Programs, digest_of, go, kustomized, made_once

Json = dict[str, Any]

STARTING = HOME / f".extras{WHICH}"
FLAGS = "-s -w"
NAMESERVER = 'mount --bind "$0" "$(readlink -f /etc/resolv.conf)"'
"""For programs that speak to Services: in a mount namespace of its own, cluster DNS."""
OWN_TMP = f'mount -t tmpfs none /tmp && mkdir -p {CERTIFICATES} && cp "$1"/* {CERTIFICATES}'


@dataclass(frozen=True)
class Webhook:
    """Where the operator's configurations of webhooks say that it listens; `common` names its CA."""

    namespace: str
    service: str
    secret: str
    common: str
    port: int


@dataclass(frozen=True)
class Extra:
    """An operator.

    Args:
        name: of its folder in go/, of its binary and of its process.
        module: its Go module.
        package: what is built.
        kustomizations: folders of the module: its CustomResourceDefinitions and webhooks.
        health: port of its probes, on the loopback device.
        config: its configuration file; without one it takes `arguments` only.
    """

    name: str
    module: str
    package: str
    kustomizations: tuple[str, ...]
    health: int
    arguments: tuple[str, ...] = ()
    config: Json | None = None
    webhook: Webhook | None = None


KUBERAY = Extra(
    name="kuberay",
    module="github.com/ray-project/kuberay/ray-operator",
    package="github.com/ray-project/kuberay/ray-operator",
    kustomizations=("config/crd",),
    health=8111,
    arguments=("--metrics-addr=127.0.0.1:8112", "--health-probe-bind-address=127.0.0.1:8111",
               "--enable-leader-election=false"),
)  # fmt: skip
JOBSET = Extra(
    name="jobset",
    module="sigs.k8s.io/jobset",
    package="sigs.k8s.io/jobset",
    kustomizations=("config/default",),
    health=8121,
    config={
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:8121"},
        "metrics": {"bindAddress": "127.0.0.1:8122"},
        "webhook": {"port": 9463},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {
            "enable": True,
            "webhookServiceName": "jobset-webhook-service",
            "webhookSecretName": "jobset-webhook-server-cert",
        },
    },
    webhook=Webhook("jobset-system", "jobset-webhook-service", "jobset-webhook-server-cert", "jobset", 9463),
)
TRAINER = Extra(
    name="trainer",
    module="github.com/kubeflow/trainer/v2",
    package="github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager",
    kustomizations=("manifests/base/crds", "manifests/base/webhook"),
    health=8131,
    config={
        "apiVersion": "config.trainer.kubeflow.org/v1alpha1",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:8131"},
        "metrics": {"bindAddress": "127.0.0.1:8132", "secureServing": False},
        "webhook": {"port": 9473},
        "leaderElection": {"leaderElect": False},
        "certManagement": {
            "enable": True,
            "webhookServiceName": "kubeflow-trainer-controller-manager",
            "webhookSecretName": "kubeflow-trainer-webhook-cert",
        },
    },
    webhook=Webhook(
        "kubeflow-system", "kubeflow-trainer-controller-manager", "kubeflow-trainer-webhook-cert", "kubeflow-trainer",
        9473,
    ),
)  # fmt: skip


def start(*extras: Extra) -> None:
    """Their kinds are known to the API server, and they work; of several test processes one starts them.

    Raises:
        UsageError: one does not build, or does not start.
    """
    with sharing.locked(STARTING):
        for extra in extras:
            programs = build(extra)
            if pid_of(extra.name) is None:
                _install(extra, programs)
                _spawn(extra, programs)
        for extra in extras:
            url = f"http://127.0.0.1:{extra.health}/readyz"
            wait_for(extra.name, lambda url=url: control.answers(url), name=extra.name)


def build(extra: Extra, say: Callable[[str], None] = print) -> Programs:
    """From the cache, or some minutes of two cores.

    Raises:
        UsageError: it does not build; the compiler's last lines are in the message.
    """
    webhook = extra.webhook and [extra.webhook.namespace, extra.webhook.service]
    settings = [extra.module, extra.package, extra.kustomizations, webhook, FLAGS]
    place = HOME / f"{extra.name}-{digest_of(settings, [extra.name])}"
    if place.exists():
        return Programs(place)
    began = time.monotonic()
    with made_once(place) as new:
        go(SOURCES / extra.name, "build", "-ldflags", FLAGS, "-o", str(new / "bin" / extra.name), extra.package)
        (new / "manifests").mkdir()
        (new / "manifests" / f"{extra.name}.yaml").write_text(json.dumps(_manifests(extra)))  # YAML, and read quickly
    say(f"built {extra.name} in {time.monotonic() - began:.0f} s")
    return Programs(place)


def _manifests(extra: Extra) -> Json:
    """What the module's kustomizations render, without what a process beside the cluster does not need."""
    rendered = "\n---\n".join(kustomized(extra.name, extra.module, path) for path in extra.kustomizations)
    found = [one for one in yaml.load_all(rendered, Loader=yaml.CSafeLoader) if one["kind"] not in NOT_APPLIED]
    if extra.webhook is not None:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": extra.webhook.namespace}}
        found = [namespace, *(one for one in found if one["kind"] != "Namespace")]
        for one in (hook for each in found for hook in each.get("webhooks", [])):
            one["clientConfig"]["service"] |= {"namespace": extra.webhook.namespace, "name": extra.webhook.service}
    return {"apiVersion": "v1", "kind": "List", "items": found}


def _install(extra: Extra, programs: Programs) -> None:
    control.apply(programs.manifests(extra.name))
    control.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
    if (hook := extra.webhook) is not None:
        folder = certificates(extra.name, hook.namespace, hook.common, hook.service)
        control.apply(webhook_service(hook.namespace, hook.service, hook.secret, folder, hook.port))


def _spawn(extra: Extra, programs: Programs) -> None:
    resolver, arguments = RUN / "resolv.conf", list(extra.arguments)
    resolver.write_text(f"nameserver {DNS_SERVICE}\noptions timeout:1 attempts:2\n")
    if extra.config is not None:
        path = RUN / f"{extra.name}.json"
        path.write_text(json.dumps(extra.config))
        arguments.append(f"--config={path}")
    parts = [NAMESERVER, *([OWN_TMP] if extra.webhook else []), 'shift && exec "$@"']
    spawn(
        extra.name, "unshare", "--mount", "--propagation", "private", "sh", "-c", " && ".join(parts), resolver,
        RUN / "certificates" / extra.name, programs[extra.name], *arguments,
        env={"KUBECONFIG": str(RUN / "operators.kubeconfig")},
    )  # fmt: skip

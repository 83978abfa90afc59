"""Operators that only some tests need, each from a Go module of its own: built and started by the first test that asks.

    started(KUBERAY)     -> its programs; it is at work when this returns, and ends with the cluster

One that runs already stays. What a cluster is made from (programs.py) does not hang on them: a change of theirs builds
nothing else again, and a cluster without such a test neither starts nor builds any.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster import control, sharing
from tests.cluster.place import DNS_SERVICE, HOME, RUN, WHICH
from tests.cluster.processes import pid_of, spawn, wait_for
from tests.cluster.programs import SOURCES, Programs, digest_of, go, made_once, module_folder
from trainer.errors import UsageError

STARTING = HOME / f".extras{WHICH}"
FLAGS = "-s -w"
NAMESERVER = 'mount --bind "$0" "$(readlink -f /etc/resolv.conf)" && exec "$@"'
"""For a program that is beside the cluster and speaks to Services: in a mount namespace of its own, cluster DNS."""


@dataclass(frozen=True)
class Extra:
    """An operator.

    Args:
        name: of its folder in go/, of its binary and of its process.
        module: its Go module.
        package: what is built.
        kinds: the module's files with its CustomResourceDefinitions.
        arguments: of the program.
        ready: address that answers when it is at work.
    """

    name: str
    module: str
    package: str
    kinds: str
    arguments: tuple[str, ...]
    ready: str


KUBERAY = Extra(
    name="kuberay",
    module="github.com/ray-project/kuberay/ray-operator",
    package="github.com/ray-project/kuberay/ray-operator",
    kinds="config/crd/bases/*.yaml",
    arguments=("--metrics-addr=127.0.0.1:8112", "--health-probe-bind-address=127.0.0.1:8111",
               "--enable-leader-election=false"),
    ready="http://127.0.0.1:8111/readyz",
)  # fmt: skip


def build(extra: Extra, say: Callable[[str], None] = print) -> Programs:
    """From the cache, or half a minute to some minutes of two cores; programs.build says what it raises."""
    settings = [extra.module, extra.package, extra.kinds, FLAGS]
    place = HOME / f"{extra.name}-{digest_of(settings, [extra.name])}"
    if place.exists():
        return Programs(place)
    source, began = SOURCES / extra.name, time.monotonic()
    with made_once(place) as new:
        go(source, "build", "-ldflags", FLAGS, "-o", str(new / "bin" / extra.name), extra.package)
        (new / "manifests").mkdir()
        files = sorted(module_folder(source, extra.module).glob(extra.kinds))
        if not files:
            raise UsageError("a module lacks its manifests", where=extra.module, expected=extra.kinds)
        for file in files:
            shutil.copy(file, new / "manifests" / file.name)
    say(f"built {extra.name} in {time.monotonic() - began:.0f} s")
    return Programs(place)


def started(extra: Extra) -> Programs:
    """Its kinds are known to the API server, and it works; of several test processes one starts it.

    Raises:
        UsageError: it does not build, or does not start.
    """
    with sharing.locked(STARTING):
        programs = build(extra)
        if pid_of(extra.name) is None:
            _start(extra, programs)
        wait_for(extra.name, lambda: control.answers(extra.ready), name=extra.name)
    return programs


def _start(extra: Extra, programs: Programs) -> None:
    manifests = programs.folder / "manifests"
    control.kubectl("apply", "--server-side", "-f", manifests)
    control.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", manifests)
    resolver = RUN / "resolv.conf"
    resolver.write_text(f"nameserver {DNS_SERVICE}\noptions timeout:1 attempts:2\n")
    spawn(
        extra.name, "unshare", "--mount", "--propagation", "private", "sh", "-c", NAMESERVER, resolver,
        programs[extra.name], *extra.arguments, env={"KUBECONFIG": str(RUN / "operators.kubeconfig")},
    )  # fmt: skip

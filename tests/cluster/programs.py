"""The cluster's programs, built from Go modules with a committed go.mod and go.sum, once for each content.

    build() -> Programs      from the cache, or 6 to 12 minutes of two cores and 4 GB of module and build cache

    go/kubernetes   control (etcd, kube-apiserver, controller-manager, scheduler and kubelet in one binary), pause,
                    training-operator, Kueue
    go/coredns      CoreDNS with the plugins that a test cluster needs
    go/OTHER        an operator that only some tests need (extras.py), in a folder of the cache of its own

The manifests of training-operator and Kueue come with their modules and are kept beside the binaries, so that a cluster
starts without the module cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from k8s.tools import tool
from tests.cluster.place import CACHE, CGROUPS, HOME
from trainer.errors import UsageError

SOURCES = Path(__file__).parent / "go"
MODULES = ("coredns", "kubernetes")
"""Folders of SOURCES that every cluster is made from."""
KUBERNETES = "v1.36.3"
OPERATOR = "github.com/kubeflow/training-operator"
KUEUE = "sigs.k8s.io/kueue"
SAME_BINARY = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
RENDERED = {"training-operator": (OPERATOR, "manifests/overlays/standalone"), "kueue": (KUEUE, "config/default")}
"""Name -> (module, folder of its kustomization)."""

COMMANDS = {
    "containerd": "containerd",
    "runc": "runc",
    "ctr": "containerd",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "sysctl": "procps",
    "curl": "curl",
}
"""Program -> Debian package."""
CNI = Path("/usr/lib/cni")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/go/bin"


@dataclass(frozen=True)
class Programs:
    """A folder of programs and manifests that belong together."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / "bin" / name

    def manifests(self, name: str) -> str:
        return (self.folder / "manifests" / f"{name}.yaml").read_text()


def find(program: str) -> str | None:
    return shutil.which(program, path=PATH)


def missing() -> list[str]:
    """What this machine lacks to run the test cluster, in words for people; empty when it can."""
    lacks = []
    if os.geteuid() != 0:
        lacks.append("root (network namespaces, mounts, cgroups)")
    packages = {package for program, package in COMMANDS.items() if find(program) is None}
    if not (CNI / "bridge").exists():
        packages.add("containernetworking-plugins")
    if packages:
        lacks.append(f"Debian packages: apt-get install --no-install-recommends {' '.join(sorted(packages))}")
    if not (CGROUPS / "pids").is_dir():
        lacks.append("cgroup v1 (the only one that this was run on)")
    if find("go") is None and not folder().exists():
        lacks.append("Go 1.26 or newer, to build Kubernetes")
    return lacks


def doctor(what: str, command: str, lacks: Sequence[str], *, strict: bool, instead: str = "") -> int:
    """Say what this machine lacks to run some tests, or that it can. Returns the exit code: that of UsageError when it
    lacks anything and `strict`, else 0."""
    if lacks:
        print(f"NOT RUN: {what} ({command}). This machine lacks:")
        print("\n".join([*(f"  {one}" for one in lacks), *filter(None, [instead])]))
        return UsageError.code if strict else 0
    if not strict:
        print(f"Not part of make test: {what}; {command} runs it here.")
    return 0


def key() -> str:
    """Digest of all that the programs are made from."""
    return digest_of([KUBERNETES, sorted(RENDERED.items()), _flags()], MODULES)


def digest_of(settings: object, modules: Iterable[str]) -> str:
    """Of folders of SOURCES, and of what else decides what is built from them: what is built lies under this name."""
    content = hashlib.sha256(json.dumps(settings).encode())
    for path in sorted(path for module in modules for path in (SOURCES / module).rglob("*") if path.is_file()):
        content.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def folder() -> Path:
    return HOME / f"programs-{key()}"


@contextlib.contextmanager
def made_once(place: Path) -> Iterator[Path]:
    """A new folder beside `place` that takes its name when the block has ended, so that `place` is there whole or not
    at all. It is removed when the block fails, or when another process has been quicker."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="building-", dir=place.parent))
    try:
        yield new
        new.chmod(0o755)
        try:
            new.rename(place)
        except OSError:
            if not place.exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def build(say: Callable[[str], None] = print) -> Programs:
    """The programs of this checkout; built when the cache does not have them.

    Raises:
        UsageError: something does not build; the compiler's last lines are in the message.
    """
    place = folder()
    if place.exists():
        return Programs(place)
    say(f"building Kubernetes {KUBERNETES}, training-operator, Kueue and CoreDNS, once: 6 to 12 minutes on two cores")
    with made_once(place) as new:
        (new / "bin").mkdir()
        for title, where, packages, linker in (
            ("kubernetes", "kubernetes", ["./control", "./pause", f"{OPERATOR}/cmd/training-operator.v1",
                                          f"{KUEUE}/cmd/kueue"], _flags()),
            ("coredns", "coredns", ["."], "-s -w"),
        ):  # fmt: skip
            began = time.monotonic()
            target = new / "bin" / ("coredns" if where == "coredns" else "")
            go(SOURCES / where, "build", "-ldflags", linker, "-o",
               f"{target}/" if where == "kubernetes" else str(target), *packages)  # fmt: skip
            say(f"  {title} {time.monotonic() - began:.0f} s")
        (new / "bin" / "training-operator.v1").rename(new / "bin" / "training-operator")
        for name in SAME_BINARY:
            (new / "bin" / name).symlink_to("control")
        (new / "manifests").mkdir()
        for name, (module, path) in RENDERED.items():
            (new / "manifests" / f"{name}.yaml").write_text(kustomized("kubernetes", module, path))
    return Programs(place)


def _flags() -> str:
    """Kubernetes and Kueue read their version from these; without one, Kueue ends at once."""
    major, minor, _ = KUBERNETES.lstrip("v").split(".")
    says = {
        "gitVersion": KUBERNETES,
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "gitCommit": "0",
        "buildDate": "2026-08-01T00:00:00Z",
    }
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join(
        ["-s -w", *(f"-X {package}.{name}={value}" for package in packages for name, value in says.items())]
    )


def go(at: Path, *arguments: str, cgo: bool = False) -> str:
    """Output of a go command in a module's folder, with our own module and build caches.

    Raises:
        UsageError: it failed; the compiler's last lines are in the message.
    """
    env = {
        **os.environ,
        "PATH": PATH,
        "GOMODCACHE": str(CACHE / "go" / "mod"),
        "GOCACHE": str(CACHE / "go" / "build"),
        "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly -modcacherw",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "1" if cgo else "0",
    }
    command = ["nice", "-n", "5", find("go") or "go", *arguments]
    done = subprocess.run(command, cwd=at, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            "the test cluster's programs do not build",
            where=f"{at}: go {arguments[0]}",
            got="\n".join(done.stderr.splitlines()[-15:]),
            do="Go 1.26 or newer and a module proxy (GOPROXY) are needed",
        )
    return done.stdout


def kustomized(folder: str, module: str, path: str) -> str:
    """What a kustomization of a module renders; the go.mod of a folder of SOURCES says which version."""
    root = go(SOURCES / folder, "list", "-m", "-f", "{{.Dir}}", module).strip()
    command = [str(tool("kubectl")), "kustomize", f"{root}/{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

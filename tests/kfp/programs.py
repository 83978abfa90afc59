"""Kubeflow Pipelines' own programs for the test cluster, built from Go modules, once for each content.

    build() -> Programs      from the cache, or some minutes of two cores

    apiserver, driver, launcher-v2, persistence_agent      Kubeflow Pipelines
    workflow-controller, argoexec                          Argo Workflows
    metadata/                                              ML Metadata's store, from PyPI
    manifests/                                             what of the modules' own manifests is applied

go/go.mod names three modules and go/go.sum their digests; each is built with its own go.mod and go.sum. Two things a
module archive does not have: the protocol buffers' Go code of Kubeflow Pipelines' `api` and `kubernetes_platform`,
which is made here from the 2.14 descriptors that the pipeline's tests carry, and one file of Argo that is a link
upstream.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster import programs as cluster_programs
from tests.cluster.place import HOME
from tests.cluster.programs import Programs, find, go, made_once
from trainer.errors import UsageError

HERE = Path(__file__).parent
SOURCES, REQUIREMENTS = HERE / "go", HERE / "requirements.txt"
DESCRIPTORS = HERE.parent / "pipelines" / "kfp_2_14.json"
PIPELINES = "github.com/kubeflow/pipelines"
API, PLATFORM = f"{PIPELINES}/api", f"{PIPELINES}/kubernetes_platform"
ARGO = "github.com/argoproj/argo-workflows/v3"
BACKEND = {
    "apiserver": "backend/src/apiserver",
    "driver": "backend/src/v2/cmd/driver",
    "launcher-v2": "backend/src/v2/cmd/launcher-v2",
    "persistence_agent": "backend/src/agent/persistence",
}
WORKFLOWS = ("workflow-controller", "argoexec")
KEPT = {
    PIPELINES: (
        "manifests/kustomize/base/pipeline/pipeline-runner-role.yaml",
        "manifests/kustomize/base/pipeline/cluster-scoped/scheduled-workflow-crd.yaml",
        "backend/src/apiserver/config/config.json",
    ),
    ARGO: ("manifests/base/crds/minimal/argoproj.io_*.yaml",),
}
"""Module -> its files that a running backend needs."""
COMMANDS = {
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadb": "mariadb-client-core",
}
"""Program -> Debian package."""


def missing() -> list[str]:
    """What this machine lacks beyond the test cluster's needs, in words for people."""
    lacks = cluster_programs.missing()
    packages = {package for program, package in COMMANDS.items() if find(program) is None}
    if not folder().exists() and find("gcc") is None:
        packages |= {"gcc", "libc6-dev"}
    if packages:
        lacks.append(f"Debian packages: apt-get install --no-install-recommends {' '.join(sorted(packages))}")
    if not folder().exists() and find("go") is None:
        lacks.append("Go 1.26 or newer, to build Kubeflow Pipelines")
    return list(dict.fromkeys(lacks))


def key() -> str:
    """Digest of all that the programs are made from."""
    parts = [BACKEND, WORKFLOWS, sorted(KEPT.items())]
    content = hashlib.sha256(json.dumps(parts).encode())
    for path in (SOURCES / "go.mod", SOURCES / "go.sum", REQUIREMENTS, DESCRIPTORS):
        content.update(path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def folder() -> Path:
    return HOME / f"kfp-{key()}"


def build(say: Callable[[str], None] = print) -> Programs:
    """The programs of this checkout; built when the cache does not have them.

    Raises:
        UsageError: something does not build; the last lines of what was said are in the message.
    """
    place = folder()
    if place.exists():
        return Programs(place)
    say("building Kubeflow Pipelines and Argo Workflows, once: 6 to 12 minutes on two cores")
    with made_once(place) as new:
        (new / "bin").mkdir()
        for title, part in (("Kubeflow Pipelines", _backend), ("Argo Workflows", _argo), ("ML Metadata", _metadata)):
            began = time.monotonic()
            part(new)
            say(f"  {title} {time.monotonic() - began:.0f} s")
        _keep_manifests(new / "manifests")
        shutil.rmtree(new / "source")
    return Programs(place)


# ---------------------------------------------------------------- modules


def versions() -> dict[str, str]:
    """Module -> version, as go.mod requires them."""
    found = json.loads(go(SOURCES, "mod", "edit", "-json"))
    return {one["Path"]: one["Version"] for one in found["Require"]}


def module(path: str) -> Path:
    """Folder of a module in the module cache; its digest is the one in go.sum."""
    found = json.loads(go(SOURCES, "mod", "download", "-json", f"{path}@{versions()[path]}"))
    line = f"{path} {found['Version']} {found['Sum']}"
    if line not in (SOURCES / "go.sum").read_text().splitlines():
        raise UsageError("a module is not the one that go.sum names", where=str(SOURCES / "go.sum"), got=line)
    return Path(found["Dir"])


def _copy(source: Path, target: Path, *names: str) -> None:
    """Files and folders of a module (default: all), to be written into: the module cache's are not ours to change."""
    target.mkdir(parents=True)
    for name in names or sorted(entry.name for entry in source.iterdir()):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copy(source / name, target / name)
    subprocess.run(["chmod", "-R", "u+w", str(target)], check=True)


def _keep_manifests(target: Path) -> None:
    target.mkdir()
    for path, patterns in KEPT.items():
        for pattern in patterns:
            files = sorted(module(path).glob(pattern))
            if not files:
                raise UsageError("a module lacks a manifest", where=path, expected=pattern)
            for file in files:
                shutil.copy(file, target / file.name)


# ---------------------------------------------------------------- parts


def _backend(new: Path) -> None:
    source, target = module(PIPELINES), new / "source" / "pipelines"
    _copy(source, target, "go.mod", "go.sum", "backend")
    for path in (API, PLATFORM):
        nested = target / path.removeprefix(f"{PIPELINES}/")
        nested.mkdir()
        (nested / "go.mod").write_text(f"module {path}\n\ngo 1.24\n")
    cachekey = "v2alpha1/go/cachekey"
    _copy(module(API) / cachekey, target / "api" / cachekey)
    _generate(target)
    for name, package in BACKEND.items():  # with C: a driver of the API server's needs it, and most packages are shared
        go(target, "build", "-ldflags", "-s -w", "-o", str(new / "bin" / name), f"./{package}", cgo=True)


def _generate(target: Path) -> None:
    """Go code of the pipeline's and the platform's specification, as protoc would write it."""
    from google.protobuf import any_pb2, descriptor_pb2, duration_pb2, struct_pb2
    from google.protobuf.compiler import plugin_pb2
    from google.rpc import status_pb2

    plugin = target / "protoc-gen-go"
    go(target, "build", "-o", str(plugin), "google.golang.org/protobuf/cmd/protoc-gen-go")
    described = [
        descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(content))
        for content in json.loads(DESCRIPTORS.read_text())["files"]
    ]
    for path, file in zip((API, PLATFORM), described, strict=True):
        request = plugin_pb2.CodeGeneratorRequest(file_to_generate=[file.name], parameter=f"module={path}")
        for known in (any_pb2, duration_pb2, struct_pb2, status_pb2):
            known.DESCRIPTOR.CopyToProto(request.proto_file.add())
        request.proto_file.extend(described[: described.index(file) + 1])
        done = subprocess.run([str(plugin)], input=request.SerializeToString(), capture_output=True, check=True)
        response = plugin_pb2.CodeGeneratorResponse.FromString(done.stdout)
        if response.error:
            raise UsageError("no Go code of a specification", where=file.name, got=response.error)
        for made in response.file:
            place = target / path.removeprefix(f"{PIPELINES}/") / made.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(made.content)


def _argo(new: Path) -> None:
    source, target = module(ARGO), new / "source" / "argo"
    left_out = {"ui", "docs", "examples", "sdks", "test"}
    _copy(source, target, *(entry.name for entry in source.iterdir() if entry.name not in left_out))
    specific = target / "workflow" / "executor" / "osspecific"
    if not (specific / "signal_linux.go").exists():  # a link upstream, which module archives leave out
        shutil.copy(specific / "signal_darwin.go", specific / "signal_linux.go")
    for name in WORKFLOWS:
        go(target, "build", "-ldflags", "-s -w", "-o", str(new / "bin" / name), f"./cmd/{name}")


def _metadata(new: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--target", str(new / "metadata"), "--requirement", str(REQUIREMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        got = "\n".join(done.stderr.splitlines()[-15:])
        raise UsageError("ML Metadata cannot be installed", where=str(REQUIREMENTS), got=got)

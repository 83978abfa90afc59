"""Images of the test cluster without a registry: a skeleton, the packages of this checkout, and what the nodes mount.

A container sees the host's /usr, its Python and the virtual environment read-only (the base runtime specification of
containerd, nodes.py); what the image itself holds is trainer/, pipelines/ and k8s/ as they are in the checkout, so its
digest changes with them, and edits during a run do not reach pods.
"""

from __future__ import annotations

import compileall
import hashlib
import io
import json
import sys
import tarfile
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from tests.cluster.place import IMAGES
from tests.cluster.programs import Programs

ROOT = Path(__file__).parents[2]
PACKAGES = ("trainer", "pipelines", "k8s")
HOME = "/opt/qwenvl-train"
VENV, SOURCE, SCRIPTS = f"{HOME}/venv", f"{HOME}/source", f"{HOME}/bin"
REPOSITORIES = {name: f"test.example/qwenvl-train/{name}" for name in ("trainer", "launcher", "prepare")}
CALLED = ("ray",)
"""KubeRay starts Ray and submits jobs by it."""
PAUSE = "test.example/pause:1"
PAYLOAD = Path(__file__).parent / "payload.py"
USERS = "root:x:0:0:root:/:/bin/sh\nuser:x:10001:10001:user:/tmp:/bin/sh\n"
GROUPS = "root:x:0:\nuser:x:10001:\n"


@dataclass(frozen=True)
class Image:
    """A docker archive and the names that nodes know it by."""

    archive: Path
    tag: str
    digest: str
    repositories: tuple[str, ...] = ()

    @property
    def references(self) -> list[str]:
        """By digest, as manifests have it, for each of the images that a cluster file names."""
        return [f"{repository}@{self.digest}" for repository in self.repositories]


def mounts() -> dict[str, str]:
    """Folder of the host -> where every container sees it, read-only."""
    found = {"/usr": "/usr", sys.prefix: VENV}
    if not sys.base_prefix.startswith("/usr/") and sys.base_prefix != "/usr":
        found[sys.base_prefix] = sys.base_prefix  # the environment's python is a link into it
    return found


def scripts() -> dict[str, str]:
    """Programs of the virtual environment that are called by name: there they begin with its path on the machine."""
    found = metadata.entry_points(group="console_scripts")
    return {
        one.name: f"#!{VENV}/bin/python\nimport sys\nfrom {one.module} import {one.attr}\nsys.exit({one.attr}())\n"
        for one in found
        if one.name in CALLED
    }


def make_pause(programs: Programs) -> Image:
    """The image of pod sandboxes."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        add_file(tar, "pause", programs["pause"].read_bytes(), mode=0o755)
    return archive("pause", PAUSE, layer.getvalue(), {"Entrypoint": ["/pause"]})


def make_trainer() -> Image:
    """The image of trainer, launcher and prepare alike."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        add_skeleton(tar)
        for folder in (HOME[1:], VENV[1:], SOURCE[1:], SCRIPTS[1:]):
            add_folder(tar, folder)
        for name, text in scripts().items():
            add_file(tar, f"{SCRIPTS[1:]}/{name}", text.encode(), mode=0o755)
        for package in PACKAGES:
            compileall.compile_dir(ROOT / package, quiet=1)  # a pod cannot: its root file system is read-only
            tar.add(ROOT / package, f"{SOURCE[1:]}/{package}", filter=_plain)
        add_file(tar, f"{SOURCE[1:]}/payload.py", PAYLOAD.read_bytes())
    settings = {
        "Env": [
            f"PATH={SCRIPTS}:{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
            f"PYTHONPATH={SOURCE}",
            "PYTHONDONTWRITEBYTECODE=1",
        ],
        "WorkingDir": "/tmp",
    }
    image = archive("trainer", f"{REPOSITORIES['trainer']}:test", layer.getvalue(), settings)
    return replace(image, repositories=tuple(REPOSITORIES.values()))


def add_skeleton(tar: tarfile.TarFile) -> None:
    """What a program expects of a root file system, when /usr is the machine's."""
    for folder in ("etc", "proc", "sys", "dev", "run", "var", "usr", "root", "opt"):
        add_folder(tar, folder)
    add_folder(tar, "tmp", mode=0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
        tar.addfile(link)
    add_file(tar, "etc/passwd", USERS.encode())
    add_file(tar, "etc/group", GROUPS.encode())
    add_file(tar, "etc/nsswitch.conf", b"hosts: files dns\n")
    add_file(tar, "etc/ld.so.cache", Path("/etc/ld.so.cache").read_bytes())


def archive(name: str, tag: str, layer: bytes, settings: dict[str, object]) -> Image:
    """A docker archive of one layer. Its digest is that of its configuration, which names the layer's."""
    layer_digest = hashlib.sha256(layer).hexdigest()
    configuration = {
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
    }
    content = json.dumps(configuration).encode()
    digest = hashlib.sha256(content).hexdigest()
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{name}.tar"
    manifest = [{"Config": f"{digest}.json", "RepoTags": [tag], "Layers": [f"{layer_digest}/layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        add_file(tar, f"{digest}.json", content)
        add_file(tar, f"{layer_digest}/layer.tar", layer)
        add_file(tar, "manifest.json", json.dumps(manifest).encode())
    return Image(path, tag, f"sha256:{digest}")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Owned by root, readable by all."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode |= 0o755 if entry.isdir() else 0o444
    return entry


def add_file(tar: tarfile.TarFile, path: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def add_folder(tar: tarfile.TarFile, path: str, mode: int = 0o755) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)

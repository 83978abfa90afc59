"""Build files: one shape, no version outside of versions.env, and every image installs what its programs import."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from k8s.pods import USER
from k8s.schemas.refresh import versions
from trainer.command import PROGRAMS

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
NAMES = sorted(path.parent.name for path in IMAGES.glob("*/Containerfile"))
OURS = ("trainer", "pipelines", "k8s")


def text(name: str) -> str:
    return (IMAGES / name / "Containerfile").read_text(encoding="utf-8")


def code(name: str) -> str:
    return "\n".join(line for line in text(name).splitlines() if not line.startswith("#"))


# ---------------------------------------------------------------- shape and versions


def test_the_images_of_the_design_are_there() -> None:
    assert {"trainer", "launcher", "prepare"} <= set(NAMES)
    assert {f"{name.upper()}_IMAGE" for name in NAMES} <= versions().keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_the_same_shape(name: str) -> None:
    lines = [line.split(" ", 1)[0] for line in code(name).splitlines() if re.match(r"[A-Z]+ ", line)]
    shape = [word for word, before in zip(lines, ["", *lines[:-1]], strict=True) if word != before and word != "RUN"]
    assert shape[:2] == ["ARG", "FROM"]
    assert shape[-5:] == ["COPY", "ENV", "USER", "WORKDIR", "CMD"]
    assert text(name).startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_every_image_runs_as_the_user_that_pods_ask_for(name: str) -> None:
    assert re.findall(r"^USER (.+)$", code(name), re.M) == [f"{USER}:{USER}"]


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_written_in_one_place(name: str) -> None:
    assert not re.search(r"\d+\.\d+|==[0-9]|:latest|sha256:", code(name)), "a version belongs into versions.env"
    assert not re.search(r"^ARG \w+=", code(name), re.M), "a default of an ARG is a second place"
    declared = set(re.findall(r"^ARG (\w+)$", code(name), re.M))
    used = set(re.findall(r"\$\{(\w+)\}", code(name)))
    assert used == declared
    assert declared <= versions().keys()


def test_a_version_in_a_build_file_would_be_found() -> None:
    assert re.search(r"\d+\.\d+|==[0-9]|:latest|sha256:", code("trainer").replace("uv==${UV_VERSION}", "uv==0.13.9"))


def test_every_version_is_used_somewhere() -> None:
    places = [
        *IMAGES.glob("*/Containerfile"),
        IMAGES / "build.sh",
        ROOT / "k8s/schemas/refresh.py",
        ROOT / "pipelines/images.py",
    ]
    everything = "\n".join(path.read_text(encoding="utf-8") for path in places)
    for key in versions():
        own = key.endswith("_IMAGE") and key.removesuffix("_IMAGE").lower() in NAMES
        assert own or re.search(rf"\b{key}\b", everything), f"{key} is read by nothing"


def test_uv_is_the_one_that_make_uses() -> None:
    (pinned,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert pinned == versions()["UV_VERSION"]


def test_the_s3_client_of_mlflow_fits_the_pinned_botocore() -> None:
    (botocore,) = re.findall(r"^botocore==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert versions()["BOTO3_VERSION"].split(".")[:2] == botocore.split(".")[:2]


def test_the_build_script_passes_every_arg_that_a_file_declares(tmp_path: Path) -> None:
    """With an engine that only writes down what it was asked."""
    engine = tmp_path / "podman"
    engine.write_text('#!/bin/sh\necho "$@"\n')
    engine.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in NAMES:
        command = [str(IMAGES / "build.sh"), "--registry", "r.example", name]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for arg in re.findall(r"^ARG (\w+)$", text(name), re.M):
            assert f"--build-arg {arg}={versions()[arg]}" in output
        assert f"-t r.example/{versions()[f'{name.upper()}_IMAGE']}" in output


# ---------------------------------------------------------------- what programs import


PROGRAMS_OF = {
    "trainer": ["trainer.launch", "trainer.train", *PROGRAMS.values()],
    "prepare": ["pipelines.prepare.__main__"],
    "launcher": ["pipelines.work", "pipelines.full_recipe", "k8s.launcher", "k8s.client"],
}
DEEP = {"trainer": True, "prepare": True, "launcher": False}
"""Whether imports inside functions are followed: in the launcher image these are what a laptop runs in its place."""
OPTIONAL = {"ray", "uvloop", "flash_attn"}
"""Imported where they are there, and done without where not."""


def module_file(name: str) -> Path | None:
    path = ROOT / Path(*name.split("."))
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()), None)


def imports_of(path: Path, deep: bool) -> Iterator[str]:
    """Dotted names that a file imports; type-checking blocks left out."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not deep:
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


@cache
def third_party(image: str) -> dict[str, str]:
    """Top-level module -> the file of ours that imports it, over everything the image's programs reach."""
    todo, seen, found = list(PROGRAMS_OF[image]), set(), {}
    while todo:
        name = todo.pop()
        path = module_file(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        for imported in imports_of(path, DEEP[image]):
            top = imported.split(".")[0]
            if top in OURS:
                todo.append(imported)
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, str(path.relative_to(ROOT)))
    return found


@cache
def installed_by(image: str) -> frozenset[str]:
    """Distributions that the image's extras bring, with all that they need."""
    extras = re.findall(r"--extra (\w+)", text(image))
    assert extras
    todo, found = [("qwenvl-train", extra) for extra in ["", *extras]], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), one) for one in ["", *requirement.extras]]
    return frozenset(name for name, _ in found)


@cache
def distributions() -> dict[str, list[str]]:
    return {
        top: [canonicalize_name(one) for one in names]
        for top, names in importlib.metadata.packages_distributions().items()
    }


@pytest.mark.parametrize("image", sorted(PROGRAMS_OF))
def test_every_program_of_an_image_is_there(image: str) -> None:
    assert [name for name in PROGRAMS_OF[image] if module_file(name) is None] == []


@pytest.mark.parametrize("image", sorted(PROGRAMS_OF))
def test_an_image_installs_what_its_programs_import(image: str) -> None:
    missing = {
        top: where
        for top, where in third_party(image).items()
        if top not in OPTIONAL and not set(distributions().get(top, [top])) & installed_by(image)
    }
    assert missing == {}


def test_a_package_that_an_image_lacks_would_be_found() -> None:
    imported = third_party("trainer")
    assert "torch" in imported
    assert not set(distributions()["torch"]) & installed_by("launcher")


def test_the_launcher_and_data_images_do_without_torch() -> None:
    for image in ("launcher", "prepare"):
        assert not {"torch", "deepspeed", "transformers"} & installed_by(image)
    assert "torch" in installed_by("trainer")
    assert not {"kfp", "kubernetes", "daft"} & installed_by("trainer")

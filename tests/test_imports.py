"""Imports go one way: pipelines -> k8s -> trainer; what plans, launches and renders needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "torchx", "daft", "ray")
# what only runs where torch is: everything else in trainer/ imports without it
NEEDS_TORCH = ("trainer.train", "trainer.step", "trainer.state", "trainer.before", "trainer.after", "trainer.observe")
NEEDS_TORCH_TOO = (
    "trainer.data.loader",
    "trainer.data.batch",
    "trainer.models.causal",
    "trainer.models.freeze",
    "trainer.models.initial",
    "trainer.models.hub",
)


def modules(package: str) -> list[str]:
    files = (ROOT / package).rglob("*.py")
    return sorted(str(f.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for f in files)


def imports_of(module: str) -> set[str]:
    """Every module that the file names in an import, also inside functions."""
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reaches(names: set[str], *packages: str) -> list[str]:
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in packages))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("trainer", ("k8s", "pipelines", "kfp", "kubernetes")),
        ("k8s", ("pipelines", "kfp")),
        ("pipelines/prepare", ("k8s", "kfp", "kubernetes", "torch", "transformers", "deepspeed")),
        ("helm", ("trainer", "k8s", "pipelines")),
        ("images", ("trainer", "k8s", "pipelines")),
    ],
)
def test_a_package_imports_only_what_lies_below_it(package: str, forbidden: tuple[str, ...]):
    wrong = {module: bad for module in modules(package) if (bad := reaches(imports_of(module), *forbidden))}
    assert not wrong


def test_a_wrong_import_would_be_found():
    assert reaches({"k8s.launcher", "trainer.errors"}, "k8s") == ["k8s.launcher"]
    assert not reaches({"k8something"}, "k8s")


def light_modules() -> list[str]:
    found = [*modules("trainer"), *modules("k8s"), *modules("pipelines")]
    skip = (
        *NEEDS_TORCH,
        *NEEDS_TORCH_TOO,
        "trainer.component",
        "pipelines.prepare",
        "pipelines.full_recipe",
        "pipelines.steps",
    )
    return [m for m in found if not reaches({m}, *skip) and not m.endswith("_model") and not m.endswith(".refresh")]


def run_without(heavy: tuple[str, ...], statement: str) -> subprocess.CompletedProcess[str]:
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {heavy!r}:\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    command = [sys.executable, "-c", block + statement]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


def test_planner_launcher_renderer_and_cli_import_without_torch():
    """In one process, so that the cost is one start; the traceback names the module that broke the rule."""
    done = run_without(HEAVY, "\n".join(f"import {module}" for module in light_modules()))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_three_entry_points_import_without_torch():
    done = run_without(("torch", "transformers"), "import trainer.recipe, k8s.pytorchjob, pipelines.full_recipe")
    assert done.returncode == 0, done.stderr[-2000:]


def test_blocking_torch_really_blocks_it():
    assert run_without(HEAVY, "import torch").returncode != 0


def test_no_module_is_named_utils_common_or_helpers():
    bad = {"utils", "common", "helpers", "util", "misc"}
    assert not [m for p in ("trainer", "k8s", "pipelines") for m in modules(p) if m.split(".")[-1] in bad]


def test_every_package_has_a_readme_as_the_readme_says():
    packages = sorted(
        path.parent for name in ("trainer", "pipelines", "k8s") for path in (ROOT / name).rglob("__init__.py")
    )
    assert len(packages) > 20
    assert [str(folder.relative_to(ROOT)) for folder in packages if not (folder / "README.md").exists()] == []
    told = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "Every package of `trainer/`, `pipelines/` and `k8s/` has a README" in told

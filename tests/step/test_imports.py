"""Large packages are imported without what a rank never uses, and never against what is imported already."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(statement: str) -> str:
    done = subprocess.run([sys.executable, "-c", statement], check=False, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_optional_packages_are_not_imported_and_can_be_afterwards() -> None:
    assert python(
        "import sys; from trainer.step.imports import import_large; import_large()\n"
        "print([name for name in ('mlflow', 'pandas', 'sklearn', 'scipy') if name in sys.modules])\n"
        "import scipy.optimize"
    ) == "[]"  # fmt: skip


@pytest.mark.parametrize(
    ("hide", "want"),
    [
        ("from trainer.step.imports import import_large; import_large()", "imported"),
        ("sys.modules['scipy'] = None", "Could not import module 'modeling_qwen2_5_vl'"),  # what hiding would do
    ],
)
def test_what_transformers_has_found_already_is_not_hidden(hide: str, want: str) -> None:
    told = python(
        "import sys; from transformers.utils import is_scipy_available\n"
        f"assert is_scipy_available()\n{hide}\n"
        "from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl\n"
        "print('imported')"
    )
    assert want in told

"""One run of tiny_smoke for everything that looks at a finished run."""

from __future__ import annotations

import time

import pytest

from tests import verify
from tests.integration.runs import Finished


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """tiny_smoke from raw files to the report, through `qwenvl run`."""
    out = tmp_path_factory.mktemp("smoke") / "first"
    began = time.time()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_EXTENSIONS_DIR", str(out.with_name("extensions")))
        wall_s = verify.run("tiny_smoke", out)
    print(f"tiny_smoke: {wall_s:.0f} s")
    return Finished(out, began, wall_s, out.with_suffix(".log").read_text())

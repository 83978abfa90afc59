"""A stage by hand, as the README says it: torchx's local_cwd scheduler, without the pipeline around it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.integration.runs import Finished
from tests.test_component import torchx
from trainer import handover


def test_a_stage_by_hand_gives_the_weights_that_the_pipeline_gave(smoke: Finished, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(smoke.out, out, ignore=shutil.ignore_patterns("dpo", "export", "evaluate", "mlflow*", "corpus"))
    for part in (out / "sft").iterdir():
        if part.name != "plan":
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    words = f"run -s local_cwd trainer/component.py:stage --recipe tiny_smoke --stage sft --out {out}"
    done = torchx(words, timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    result, want = (handover.read(str(folder), "sft", verify="full") for folder in (out, smoke.out))
    assert result.model.digest == want.model.digest
    assert {row.group: row.state for row in result.freeze_table} == {row.group: row.state for row in want.freeze_table}
    assert (out / "sft" / "mlflow_run_id").exists()

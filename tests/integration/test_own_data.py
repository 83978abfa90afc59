"""Fine-tuning on somebody's own pictures, with accidents on the way: a rank dies, then the whole process group."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.runs import (
    LIMIT_S,
    Finished,
    llava,
    own_recipe,
    qwenvl,
    rank_pid,
    seconds_until_all_gone,
    start,
    told_by,
    tree_of,
    wait_until,
)
from trainer import handover
from trainer.errors import OutputInUse

KILLED = 128 + signal.SIGKILL


def manifests(out: Path) -> set[str]:
    return {str(path) for path in out.glob("sft/checkpoints/step-*/manifest.json")}


@pytest.mark.extended
def test_own_pictures_train_an_exported_model_also_when_a_rank_and_the_process_group_are_killed(
    smoke: Finished, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    llava(data)
    recipe = own_recipe(data, smoke.out / "export", schedule={"steps": 40}, checkpoint={"every_steps": 10})

    # ---- one rank: its death is told, and nothing of the run is left
    top = start(recipe, out)
    wait_until(lambda: bool(manifests(out)), top, out)
    tree = tree_of(top.pid)
    second = qwenvl("run", recipe, "--out", str(out))
    assert second.returncode == OutputInUse.code and f"process {top.pid} on " in second.stderr
    os.kill(rank_pid(tree, 1), signal.SIGKILL)
    assert top.wait(timeout=60) == KILLED, told_by(out)
    assert seconds_until_all_gone(top.pid, tree) < LIMIT_S
    told = told_by(out)
    assert "error in sft: rank 1 ended without saying why: killed by SIGKILL" in told
    assert "the same command goes on" in told and "Traceback" not in told
    assert not (out / "sft" / "result.json").exists()

    # ---- the process group: nobody is left to say anything
    committed = manifests(out)
    top = start(recipe, out)
    wait_until(lambda: "sft: goes on after step" in told_by(out), top, out)
    tree = tree_of(top.pid)
    assert rank_pid(tree, 1), "the ranks are there, in process groups of their own"
    os.killpg(top.pid, signal.SIGKILL)
    top.wait()
    assert seconds_until_all_gone(top.pid, tree) < LIMIT_S
    assert not (out / "sft" / "result.json").exists()
    assert manifests(out) >= committed

    # ---- the same command goes on to the end
    ended = qwenvl("run", recipe, "--out", str(out))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = handover.read(str(out), "sft", verify="full")
    assert result.metrics["resumed_from"] >= 10 and result.attempts == 3
    assert {row.group: row.state for row in result.freeze_table if row.state != "constant"} == {
        **{"vision": "frozen", "merger": "trained", "llm": "trained"}
    }
    assert set(result.init_origin) == {"vision", "merger", "llm"}
    assert all(str(smoke.out / "export") in origin for origin in result.init_origin.values())
    for name in ("export/config.json", "evaluate/evaluation.json", "report.html"):
        assert (out / name).exists()

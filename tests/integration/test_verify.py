"""A seed gives the same bits: in a second run, and in one that was killed in the middle of stage2."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests import verify
from tests.integration.runs import LIMIT_S, Finished, command_of, seconds_until_all_gone, told_by, tree_of
from trainer import handover


def test_a_second_run_gives_the_same_weights_bit_for_bit(smoke: Finished, tmp_path: Path) -> None:
    second = tmp_path / "second"
    verify.run("tiny_smoke", second)
    assert verify.differences(verify.weights(smoke.out), verify.weights(second)) == []
    spoilt = {**verify.weights(second), "export/model.safetensors": "0"}
    assert verify.differences(verify.weights(second), spoilt) == ["export/model.safetensors"], "a difference is seen"


def test_a_run_killed_in_stage2_leaves_no_process_and_goes_on_to_the_same_weights(
    smoke: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    tree: list[int] = []
    tops: list[int] = []

    def kill(top: subprocess.Popen[str]) -> None:
        tops.append(top.pid)
        tree.extend(tree_of(top.pid))
        words = [command_of(pid) for pid in tree]
        for part in ("executor_main", "trainer.launch", "trainer.warm"):
            assert any(part in word for word in words), f"{part} is part of a run: {words}"
        verify.kill_top(top)

    at = verify.kill_in_stage2("tiny_smoke", out, kill=kill)
    assert seconds_until_all_gone(tops[0], tree) < LIMIT_S
    finished = handover.read(str(out), "stage1").finished_at
    verify.run("tiny_smoke", out)
    assert "stage1: was done before" in told_by(out)
    assert handover.read(str(out), "stage1").finished_at == finished
    resumed = handover.read(str(out), "stage2").metrics["resumed_from"]
    assert resumed is not None and resumed >= int(at.removeprefix("step-"))
    assert verify.differences(verify.weights(smoke.out), verify.weights(out)) == []

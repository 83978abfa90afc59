"""Starting ranks for tests: a rank that fails ends the others, and a hang has an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import launch

SLEEP = "__import__('time').sleep(100)"
FAIL = "1 / 0 if __import__('os').environ['RANK'] == '1' else " + SLEEP


@pytest.mark.parametrize(
    ("statement", "hang_s", "told"),
    [
        (FAIL, 90, r"exit codes \[None, 1\](.|\n)*ZeroDivisionError"),
        (SLEEP, 0.1, r"exit codes \[None, None\]"),
    ],
    ids=["one fails", "all hang"],
)
def test_ranks_that_do_not_all_end_well_are_told_without_waiting_for_the_others(
    statement: str, hang_s: float, told: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=told):
        launch("timeit", ["-n", "1", "-r", "1", statement], world_size=2, logs=tmp_path, hang_s=hang_s)


def test_ranks_that_end_well_say_nothing(tmp_path: Path) -> None:
    launch("timeit", ["-n", "1", "-r", "1", "pass"], world_size=2, logs=tmp_path)

"""k8s/README.md names tests that there are: a trap whose test is renamed or removed shows here."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows() -> list[tuple[str, str]]:
    """(trap, its tests) of the table of traps."""
    text = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8").split("## Traps")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [(trap, tests) for trap, _, tests in cells[2:]]


def missing(tests: str) -> list[str]:
    """What a cell names and is not there: `T FILE `part of a name`, ...; C FILE, FILE`."""
    lost = []
    for part in tests.split(";"):
        where, _, rest = re.sub(r"\(.*?\)", "", part).strip().partition(" ")
        folder = {"T": "k8s", "C": "cluster"}[where]
        names = re.findall(r"`(\w+)`", rest)
        for file in re.findall(r"\w+", re.sub(r"`\w+`", "", rest)):
            path = ROOT / "tests" / folder / f"test_{file}.py"
            found = re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")) if path.exists() else []
            lost += [] if found else [f"{folder}/test_{file}.py"]
            lost += [f"{file}: {name}" for name in names if not any(name in one for one in found)]
    return lost


def test_every_trap_has_a_test_that_exists() -> None:
    found = rows()
    assert len(found) > 20 and all(tests for _, tests in found)
    assert {trap: lost for trap, tests in found if (lost := missing(tests))} == {}


def test_a_name_that_is_not_there_would_be_found() -> None:
    assert missing("T decide `no_such_test`") == ["decide: no_such_test"]
    assert missing("T nothing; C faults") == ["k8s/test_nothing.py"]

"""The same input gives byte-identical shards, columns and plans on the embedded runner and on a local Ray, for any
number of partitions and workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prepare.test_killed import files_of, some_data

PROGRAM = """
import json, sys
overrides, out, workers, partitions, block = json.loads(sys.argv[1])
if workers:
    import ray
    for turn in range(4):  # a node has 30 s to start, which is little where many tests run
        try:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
            break
        except Exception:
            ray.shutdown()
            if turn == 3:
                raise
from pipelines.prepare import engine, ingest
from pipelines.prepare.stage import prepare_stage
from trainer.resolve import load_recipe
ingest.BLOCK_ROWS = block
seen = []
real = engine.Engine.map
def counted(self, function, rows):
    if partitions:
        self.partitions = partitions
    seen.append(self.partitions)
    return real(self, function, rows)
engine.Engine.map = counted
recipe = load_recipe("tiny", overrides)
ingest.prepare_data(recipe, out)
prepare_stage(recipe, "stage1", out)
import daft
print("RAN", daft.get_or_create_runner().name, sorted(set(seen)))
"""


def prepared(folder: Path, name: str, overrides: list[str], workers: int, partitions: int, block: int) -> str:
    asked = [[*overrides, f"prepare.engine={'ray' if workers else 'native'}"], str(folder / name)]
    words = [sys.executable, "-c", PROGRAM, json.dumps([*asked, workers, partitions, block])]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("RAN"))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "data").mkdir()
    overrides = some_data(folder / "data", rows=200)
    assert prepared(folder, "native", overrides, 0, 0, 256) == "RAN native [1]"
    return folder, overrides


@pytest.mark.parametrize(
    ("workers", "partitions", "block"),
    [(0, 0, 77), *(pytest.param(*case, marks=pytest.mark.extended) for case in [(2, 0, 256), (3, 7, 100)])],
)
def test_shards_columns_and_plans_are_the_same_bytes(
    workers: int, partitions: int, block: int, native: tuple[Path, list[str]]
):
    folder, overrides = native
    name = f"{workers}-{partitions}-{block}"
    ran = prepared(folder, name, overrides, workers, partitions, block)
    assert ran == f"RAN {'ray' if workers else 'native'} [{partitions or workers or 1}]"
    whole, again = files_of(folder / "native"), files_of(folder / name)
    assert again == whole and sum(path.endswith(".tar") for path in whole) > 5

"""Benchmarks run, say what they measured in one JSON line each, and their counts are what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.__main__ import names

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """All of them in one process, the imports are most of the time: name -> the line of JSON that ends its output."""
    command = [sys.executable, "-m", "tests.bench", "--quick"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name": ')]  # others log, too
    return {result["name"]: result for result in found}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", names())
def test_every_benchmark_ends_with_one_json_object(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert result["name"] == name
    assert result["figures"] and all(isinstance(value, int | float) for value in result["figures"].values())
    assert result["machine"] and result["date"] and result["versions"]["torch"]


@pytest.mark.parametrize("windows", ["", "_windows_of_2000"])
@pytest.mark.parametrize("length", [8192, 32768])
def test_packs_are_as_few_as_can_be(length: int, windows: str, results: dict[str, dict[str, Any]]) -> None:
    figures = results["packing"]["figures"]
    assert 1 <= figures[f"bins_over_bound_{length}{windows}"] < 1.005
    assert 0.995 < figures[f"fill_{length}{windows}"] <= 1


def test_a_call_a_segment_gives_what_a_dense_mask_gives(results: dict[str, dict[str, Any]]) -> None:
    assert results["attention"]["figures"]["largest_difference"] < 1e-5


def test_duplicates_are_found_and_nothing_else(results: dict[str, dict[str, Any]]) -> None:
    figures = results["dedup"]["figures"]
    assert figures["text_recall"] >= 0.99 and figures["text_precision"] >= 0.99
    assert figures["image_precision"] >= 0.99
    assert all(figures[f"recall_by_transform.{name}"] >= 0.95 for name in ("jpeg_60", "half_size", "crop_2"))


def test_memory_of_a_preparation_does_not_grow_with_the_samples(results: dict[str, dict[str, Any]]) -> None:
    figures = results["prepare"]["figures"]
    assert figures["samples"] == 12_000 and figures["shards_mb"] > 200
    assert figures["pss_growth"] < 0.2 and figures["pss_12k_mb"] < figures["limit_mb"]
    per_hour = 3600 * figures["samples_per_s_per_core"]
    assert figures["cpu_hours_per_1m"] * per_hour == pytest.approx(1e6)
    assert figures["ray_over_native"] > 0


def test_a_benchmark_that_is_not_there_is_refused() -> None:
    command = [sys.executable, "-m", "tests.bench", "no-such-benchmark"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == 2
    assert "packing" in done.stderr

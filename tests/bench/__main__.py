"""python -m tests.bench [NAME ...] [--quick]: a table for people and, as the last line of each, one JSON object.

A benchmark is a module of this folder with `figures(quick: bool) -> dict[str, float]`. Ratios are taken in one run;
times depend on the machine and are never asserted, counts are asserted in tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "pyarrow", "daft", "kfp")


def names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return f"{os.cpu_count()} x {model}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*names(), []], metavar="NAME", help=", ".join(names()))
    parser.add_argument("--quick", action="store_true", help="the small size that CI runs")
    arguments = parser.parse_args()
    for name in arguments.names or names():
        figures = importlib.import_module(f"tests.bench.{name}").figures(arguments.quick)
        width = max(map(len, figures))
        print(f"{name}{' (quick)' if arguments.quick else ''}")
        for key, value in figures.items():
            print(f"  {key:<{width}}  {value:,.4g}")
        result = {
            "name": name,
            "figures": figures,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {package: metadata.version(package) for package in PACKAGES},
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

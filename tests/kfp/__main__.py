"""Kubeflow Pipelines on the test cluster, from the command line.

QWENVL_TEST_CLUSTER=kfp python -m tests.kfp up | build | exec COMMAND | doctor [--strict]

Without QWENVL_TEST_CLUSTER on the usual test cluster. What takes the cluster down takes it as well:
QWENVL_TEST_CLUSTER=kfp python -m tests.cluster down. `exec` runs a command in the cluster's network, with the variables
that the tests, kfp and qwenvl read.
"""

from __future__ import annotations

import os
import sys

from pipelines.cli.main import edge
from tests.cluster.processes import inside
from tests.cluster.programs import PATH, doctor
from tests.kfp import backend, programs
from trainer.errors import UsageError


def main(words: list[str]) -> int:
    match words:
        case ["up"]:
            backend.up()
        case ["build"]:
            print(programs.build().folder)
        case ["doctor", *strict] if strict in ([], ["--strict"]):
            what, instead = "tests/kfp, a real Kubeflow Pipelines", "or name another one: tests/kfp/README.md"
            return doctor(what, "make test-kfp", programs.missing(), strict=bool(strict), instead=instead)
        case ["exec", *rest] if rest:
            command = inside(*rest)
            os.execvpe(command[0], command, {**backend.environment(), "PATH": PATH})
        case _:
            print(__doc__, file=sys.stderr)
            return UsageError.code
    return 0


if __name__ == "__main__":
    sys.exit(edge(main, sys.argv[1:]))

"""Kubeflow Pipelines on the test cluster, from the command line.

QWENVL_TEST_CLUSTER=kfp python -m tests.kfp up | build | exec COMMAND | doctor [--strict]

Without QWENVL_TEST_CLUSTER on the usual test cluster. What takes the cluster down takes it as well:
QWENVL_TEST_CLUSTER=kfp python -m tests.cluster down. `exec` runs a command in the cluster's network, with the variables
that the tests, kfp and qwenvl read.
"""

from __future__ import annotations

import os
import sys

from tests.cluster.processes import inside
from tests.cluster.programs import PATH
from tests.kfp import backend, programs
from trainer.errors import QwenVLError, UsageError


def main(words: list[str]) -> int:
    match words:
        case ["up"]:
            backend.up()
        case ["build"]:
            print(programs.build().folder)
        case ["doctor", *strict] if strict in ([], ["--strict"]):
            if lacks := programs.missing():
                print("NOT RUN: tests/kfp, a real Kubeflow Pipelines (make test-kfp). This machine lacks:")
                print("\n".join(f"  {one}" for one in lacks))
                print("or name another one: tests/kfp/README.md")
                return UsageError.code if strict else 0
        case ["exec", *rest] if rest:
            command = inside(*rest)
            os.execvpe(command[0], command, {**backend.environment(), "PATH": PATH})
        case _:
            print(__doc__, file=sys.stderr)
            return UsageError.code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except QwenVLError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)

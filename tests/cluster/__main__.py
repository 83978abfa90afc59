"""The test cluster from the command line.

python -m tests.cluster up | down | build | ps | kubectl ARGUMENTS | exec COMMAND | doctor [--strict]

doctor says what this machine lacks; --strict: exit code 2 when it lacks anything.
"""

from __future__ import annotations

import os
import sys

from k8s.tools import tool
from pipelines.cli.main import edge
from tests.cluster import control, lifecycle, programs
from tests.cluster.place import KUBECONFIG
from tests.cluster.processes import inside, leftovers
from trainer.errors import UsageError


def main(words: list[str]) -> int:
    match words:
        case ["up"]:
            lifecycle.up()
        case ["down"]:
            lifecycle.down()
        case ["build"]:
            print(programs.build().folder)
        case ["ps"]:
            for name, pid, mebibytes in control.running():
                print(f"{name:26} {pid:>8} {mebibytes:6} MiB")
            print("all in all:", ", ".join(leftovers()) or "nothing")
        case ["doctor", *strict] if strict in ([], ["--strict"]):
            what, lacks = "tests/cluster, a real Kubernetes", programs.missing()
            return programs.doctor(what, "make test-cluster", lacks, strict=bool(strict))
        case ["kubectl", *rest]:
            command = inside(tool("kubectl"), "--kubeconfig", KUBECONFIG, *rest)
            os.execvpe(command[0], command, {**os.environ, "PATH": programs.PATH})
        case ["exec", *rest] if rest:
            command = inside(*rest)
            os.execvpe(command[0], command, {**os.environ, "PATH": programs.PATH, "KUBECONFIG": str(KUBECONFIG)})
        case _:
            print(__doc__, file=sys.stderr)
            return UsageError.code
    return 0


if __name__ == "__main__":
    sys.exit(edge(main, sys.argv[1:]))

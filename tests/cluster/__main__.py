"""The test cluster from the command line.

python -m tests.cluster up | down | build | ps | kubectl ARGUMENTS | exec COMMAND | doctor [--strict]

doctor says what this machine lacks; --strict: exit code 2 when it lacks anything.
"""

from __future__ import annotations

import os
import sys

from k8s.tools import tool
from tests.cluster import control, lifecycle, programs
from tests.cluster.place import KUBECONFIG
from tests.cluster.processes import inside, leftovers
from trainer.errors import QwenVLError, UsageError


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
            if lacks := programs.missing():
                print("NOT RUN: tests/cluster, a real Kubernetes (make test-cluster). This machine lacks:")
                print("\n".join(f"  {one}" for one in lacks))
                return UsageError.code if strict else 0
            if not strict:
                print("Not part of make test: tests/cluster, a real Kubernetes; make test-cluster runs it here.")
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
    try:
        sys.exit(main(sys.argv[1:]))
    except QwenVLError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)

"""The entry of the reaper's CronJob: removes jobs that no launcher watches any more and nobody took over.

python -m k8s.reaper --namespace qwenvl --after 6        every ten minutes: after an hour without a launcher
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from k8s.cleanup import reap
from k8s.client import connect
from trainer.errors import QwenVLError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m k8s.reaper", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--namespace", required=True)
    made.add_argument("--after", type=int, default=6, help="looks without a sign of a launcher")
    made.add_argument("--dry-run", action="store_true", help="say what would be removed; remember nothing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(argv)
    if asked.after < 1:
        parser().error("--after is at least 1: a single look cannot tell a launcher from none")
    try:
        for line in reap(connect(asked.namespace), after=asked.after, dry_run=asked.dry_run):
            print(line, flush=True)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())

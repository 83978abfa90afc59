"""The entry of the reaper's CronJob: removes jobs that no launcher watches any more and nobody took over.

python -m k8s.reaper --namespace qwenvl --after 6        every ten minutes: after an hour without a launcher
python -m k8s.reaper ... --kinds rayjobs trainjobs       of these too; and where they have ended, after --keep looks
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from k8s.cleanup import KEEP, reap
from k8s.client import MORE_VERBS, RAY_JOBS, TRAIN_JOBS, connect
from k8s.kinds import DEFAULT_KINDS
from trainer.errors import QwenVLError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m k8s.reaper", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--namespace", required=True)
    made.add_argument("--after", type=int, default=6, help="looks without a sign of a launcher")
    made.add_argument("--kinds", nargs="*", default=[], choices=sorted(MORE_VERBS), help="beside PyTorchJobs and Jobs")
    made.add_argument("--keep", type=int, default=KEEP, help="looks for which a RayJob or TrainJob stays after its end")
    made.add_argument("--dry-run", action="store_true", help="say what would be removed; remember nothing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(argv)
    if min(asked.after, asked.keep) < 1:
        parser().error("--after and --keep are at least 1: a single look cannot tell a launcher from none")
    more = [kind for kind in (RAY_JOBS, TRAIN_JOBS) if kind.plural in asked.kinds]
    kinds = (*DEFAULT_KINDS, *more)
    try:
        api = connect(asked.namespace)
        for line in reap(api, after=asked.after, dry_run=asked.dry_run, kinds=kinds, keep=asked.keep):
            print(line, flush=True)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())

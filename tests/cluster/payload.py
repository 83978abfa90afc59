"""What a rank does in the cluster's tests, inside the pods: the real trainer/launch.py starts it, torchrun brings the
ranks together, and it meets the other ranks by gloo, steps, commits and ends as its arguments say.

    python -m trainer.launch --nnodes 2 --module payload -- --out s3://... --stage sft '{"steps": 20}'

Arguments, one JSON object:
    steps, step_s     how long an attempt works
    commit_every      a commit each so many steps: one object under OUT/STAGE/payload/
    ends              {"ATTEMPT": {"RANK": [step, how]}}: at this step this rank ends by `how`: a number is an exit code
                      of trainer/errors.py, "kill" SIGKILL, "memory" more than the container may have, "hang" silence
Rank 0 writes OUT/STAGE/payload/done.json when all steps are done: the first and last step of each attempt, and what the
all-reduce gave.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from trainer import storage
from trainer.errors import MediaError, Preempted, UsageError
from trainer.heartbeat import pulse

RAISED = {2: UsageError, 65: MediaError, 1: RuntimeError}


def main(argv: list[str]) -> None:
    out, stage, told = argv[argv.index("--out") + 1], argv[argv.index("--stage") + 1], json.loads(argv[-1])
    base = storage.join(out, stage, "payload")
    attempt, rank = os.environ["QWENVL_ATTEMPT"], int(os.environ["RANK"])
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    dist.init_process_group("gloo")
    first = _committed(base)
    pulse().beat(phase="train", step=first)
    print(f"rank {rank} of {dist.get_world_size()}: attempt {attempt} begins at step {first}", flush=True)
    ends = told.get("ends", {}).get(attempt, {}).get(str(rank))
    total = 0.0
    for step in range(first + 1, told.get("steps", 5) + 1):
        if ends is not None and step >= ends[0]:
            _end(ends[1])
        flag = torch.tensor([float(rank + 1), float(bool(stopped))])
        dist.all_reduce(flag)
        total = float(flag[0])
        pulse().beat(step=step)
        time.sleep(told.get("step_s", 0.2))
        stop = flag[1] > 0
        if stop or (told.get("commit_every") and step % told["commit_every"] == 0):
            if rank == 0:
                uri = storage.join(base, "commits", f"{step:06d}.json")
                storage.write_json(uri, {"attempt": attempt, "from": first})
            dist.barrier()
            pulse().beat(committed_step=step)
        if stop:
            raise Preempted("stopped from outside", where=f"step {step}")
        if rank == 0:
            print(f"step {step}", flush=True)
    if rank == 0:
        storage.write_json(storage.join(base, "done.json"), {"attempt": attempt, "from": first, "reduced": total})
    dist.barrier()


def _committed(base: str) -> int:
    names = storage.list_dir(storage.join(base, "commits"))
    return max((int(name.partition(".")[0]) for name in names), default=0)


def _end(how: object) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        kept = []
        while True:
            kept.append(bytearray(os.urandom(1 << 20)) * 64)
    if how == "hang":
        pulse().beat(limit_s=2.0)
        time.sleep(3600)
    code = int(str(how))
    if code in RAISED:
        raise RAISED[code](f"told to end with {code}")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])

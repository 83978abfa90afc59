"""What a rank does in the cluster's tests, inside the pods: the real trainer/launch.py starts it, torchrun brings the
ranks together, and it meets the other ranks, steps, commits and ends as its arguments say.

    python -m trainer.launch --nnodes 2 --module payload -- --out s3://... --stage sft '{"steps": 20}'

Arguments, one JSON object:
    steps, step_s     how long an attempt works; without `steps` until OUT/STAGE/payload/go is there
    commit_every      a commit each so many steps: one object under OUT/STAGE/payload/
    gloo              the ranks meet by gloo, as training does; default: over plain sockets, which saves importing torch
    log_mb            rank 0 prints so much at each step
    ends              {"ATTEMPT": {"RANK": [step, how]}}: at this step this rank ends by `how`: a number is an exit code
                      of trainer/errors.py, "kill" SIGKILL, "memory" more than the container may have, "hang" silence
With TEST_CLOCKS, {"worker-1": 600}, the wall clocks of that pod's processes go so many seconds ahead; then
`python -m payload` stands for `python -m trainer.launch` too.

Rank 0 writes OUT/STAGE/payload/done.json when all steps are done: the first and last step of each attempt, and what the
all-reduce gave.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Protocol

from trainer import launch, storage
from trainer.errors import MediaError, PeerLost, Preempted, UsageError
from trainer.heartbeat import pulse

RAISED = {2: UsageError, 65: MediaError, 1: RuntimeError}
MEET_S = 120.0
LINE = "x" * 1023


class Ranks(Protocol):
    """All ranks of the attempt."""

    def sum(self, *values: float) -> list[float]:
        """Each value over all ranks; waits for all of them."""
        ...


class Gloo:
    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")

    def sum(self, *values: float) -> list[float]:
        import torch
        import torch.distributed as dist

        flag = torch.tensor(values)
        dist.all_reduce(flag)
        return flag.tolist()


class Sockets:
    """A star around rank 0, one port beside the rendezvous'. A peer that goes away shows as training shows it."""

    def __init__(self, rank: int, world_size: int):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
        self._peers: list[socket.socket] = []
        if rank == 0:
            with socket.create_server(("", address[1])) as listener:
                listener.settimeout(MEET_S)
                self._peers = [listener.accept()[0] for _ in range(world_size - 1)]
        else:
            self._peers = [_connected(address)]
        self._files = [peer.makefile("rw") for peer in self._peers]
        self._first = rank == 0

    def sum(self, *values: float) -> list[float]:
        mine = list(values)
        try:
            if not self._first:
                return self._say(mine) or self._hear(0)
            heard = [self._hear(index) for index in range(len(self._files))]
            total = [sum(column, 0.0) for column in zip(mine, *heard, strict=True)]
            self._say(total)
            return total
        except (OSError, ValueError) as error:
            raise PeerLost(f"the connection to another rank broke off: {error}") from None

    def _say(self, values: list[float]) -> None:
        for file in self._files:
            file.write(json.dumps(values) + "\n")
            file.flush()

    def _hear(self, index: int) -> list[float]:
        return json.loads(self._files[index].readline())


def _connected(address: tuple[str, int]) -> socket.socket:
    end = time.monotonic() + MEET_S
    while True:
        try:
            return socket.create_connection(address)
        except OSError as error:
            if time.monotonic() > end:
                raise PeerLost(f"rank 0 is not to be found at {address}: {error}") from None
        time.sleep(0.1)


def main(argv: list[str]) -> None:
    out, stage, told = argv[argv.index("--out") + 1], argv[argv.index("--stage") + 1], json.loads(argv[-1])
    base = storage.join(out, stage, "payload")
    attempt, rank, world_size = os.environ["QWENVL_ATTEMPT"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    ranks: Ranks = Gloo() if told.get("gloo") else Sockets(rank, world_size)
    first = _committed(base)
    pulse().beat(phase="train", step=first)
    print(f"rank {rank} of {world_size}: attempt {attempt} begins at step {first}", flush=True)
    ends = told.get("ends", {}).get(attempt, {}).get(str(rank))
    total, step, last = 0.0, first, told.get("steps")
    while last is None or step < last:
        step += 1
        if ends is not None and step >= ends[0]:
            _end(ends[1])
        over = last is None and rank == 0 and storage.exists(storage.join(base, "go"))
        total, stopping, ending = ranks.sum(float(rank + 1), float(bool(stopped)), float(over))
        pulse().beat(step=step)
        time.sleep(told.get("step_s", 0.2))
        stop = stopping > 0
        if stop or (told.get("commit_every") and step % told["commit_every"] == 0):
            if rank == 0:
                uri = storage.join(base, "commits", f"{step:06d}.json")
                storage.write_json(uri, {"attempt": attempt, "from": first})
            ranks.sum(0.0)
            pulse().beat(committed_step=step)
        if stop:
            raise Preempted("stopped from outside", where=f"step {step}")
        if rank == 0:
            for _ in range(told.get("log_mb", 0) << 10):
                print(LINE)
            print(f"step {step}", flush=True)
        if ending:
            break
    if rank == 0:
        storage.write_json(storage.join(base, "done.json"), {"attempt": attempt, "from": first, "reduced": total})
    ranks.sum(0.0)


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


def set_clock() -> None:
    """As a node's clock that is wrong: what is compared with other machines' must not depend on it."""
    clocks = json.loads(os.environ.get("TEST_CLOCKS", "{}"))
    ahead = next((seconds for pod, seconds in clocks.items() if os.environ["HOSTNAME"].endswith(pod)), 0.0)
    now, broken_down = time.time, time.gmtime
    time.time = lambda: now() + ahead
    time.gmtime = lambda seconds=None: broken_down(time.time() if seconds is None else seconds)


if __name__ == "__main__":
    set_clock()
    if "--module" in sys.argv:
        sys.exit(launch.main())
    main(sys.argv[1:])

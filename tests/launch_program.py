"""What a rank does in the launcher's tests: python -m tests.launch_program BEHAVIOUR RANK. The other ranks wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from trainer.errors import MediaError, Preempted
from trainer.heartbeat import pulse


def main(behaviour: str, which: int, *_: str) -> None:
    rank = int(os.environ["RANK"])
    pulse().beat(phase="train", step=3)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} pid {os.getpid()} {behaviour}", flush=True)
    if behaviour == "done":
        return
    if behaviour == "helper":  # a rank with a helper of its own, as the loader and the tracking sender are
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        print(f"helper pid {helper.pid}", flush=True)
    if behaviour == "commit":  # on SIGTERM: commit, leave with Preempted
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        while not stopped:
            time.sleep(0.02)
        time.sleep(0.3)
        pulse().beat(step=4, committed_step=4)
        raise Preempted("stopped from outside", where="step 4")
    if rank == which:
        time.sleep(0.2)
        if behaviour == "media":
            raise MediaError(
                "the image cannot be read", where="cat.png", expected="PNG", got="7 bytes", do="restore the file"
            )
        if behaviour == "bug":
            raise ZeroDivisionError("one over nothing")
        if behaviour == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "hang":
            pulse().beat(limit_s=0.5)
        if behaviour == "peer-first":  # the consequence is seen before its cause
            raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    elif behaviour == "peer-first":
        time.sleep(1)
        raise MediaError("the image cannot be read", where="late.png")
    time.sleep(120)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

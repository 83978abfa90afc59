"""Starts the ranks of one node, keeps what they say, and leaves with the one exit code that explains the end.

    python -m trainer.launch --nnodes 1 --nproc-per-node 2 -- --recipe tiny --stage sft --out out/tiny

On one node the ranks are started directly with the environment that torchrun would give them (importing torch in the
launcher would cost seconds before the first rank starts); on several nodes, or with --torchrun, through
torch.distributed.run, which reads PET_* as the training-operator sets them. Either way each rank runs under
trainer/edge.py.

    attempts/NNNN/events.jsonl        start, first failure, signals, end
    attempts/NNNN/rankR.log           everything rank R printed; rank 0's is shown here as well
    attempts/NNNN/end-NODE.json       Termination: code, decision, rank, phase, step, error
    heartbeat/NODE.json               while it runs

SIGTERM and SIGINT are passed on once; ranks have --shutdown-timeout to commit and leave. When one rank fails the others
have a short time to notice and are then killed; ranks die with this process. Imports without torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import heartbeat, storage
from trainer.attempt import Attempt, Reporter, last_lines
from trainer.errors import DONE, Hang, OutOfMemory, PeerLost, Preempted, QwenVLError, UsageError, decide, first_cause
from trainer.heartbeat import Ending, Termination
from trainer.observe import tracking
from trainer.ranks import Direct, Ranks, Torchrun
from trainer.warm import die_with_parent

POLL_S = 0.05
PEER_GRACE_S = 5.0
HANG_MARGIN_S = 30.0
MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""
TERMINATION_FILE = "QWENVL_TERMINATION_LOG"
DIE_WITH_PARENT = "QWENVL_DIE_WITH_PARENT"
CGROUP = "/sys/fs/cgroup"
"""A container sees its own there."""


@dataclass(frozen=True)
class Options:
    nnodes: int
    procs: int
    node: str
    module: str
    args: tuple[str, ...]
    stage_uri: str
    attempt: int | None
    shutdown_timeout_s: float
    peer_grace_s: float
    torchrun: bool
    heartbeat_s: float


def parse(argv: Sequence[str], env: Mapping[str, str]) -> Options:
    """Raises UsageError for what does not fit together."""
    own, rest = (
        (list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])) if "--" in argv else (list(argv), [])
    )
    parser = argparse.ArgumentParser(prog="python -m trainer.launch", description="Start the ranks of one node.")
    parser.add_argument("--nnodes", type=int, default=env.get("PET_NNODES", "1").split(":")[0])
    parser.add_argument("--nproc-per-node", type=int, default=env.get("PET_NPROC_PER_NODE", "1"))
    parser.add_argument("--module", default="trainer.train", help="program of a rank, run as python -m MODULE")
    parser.add_argument("--stage-uri", help="default: OUT/STAGE of the program's --out and --stage")
    parser.add_argument("--attempt", type=int, default=env.get(heartbeat.ATTEMPT))  # argparse converts text
    parser.add_argument("--shutdown-timeout", type=float, default=120.0, help="seconds for a commit after SIGTERM")
    parser.add_argument("--peer-grace", type=float, default=PEER_GRACE_S, help="seconds for ranks after another failed")
    parser.add_argument("--heartbeat", type=float, default=10.0, help="seconds between heartbeats in storage")
    parser.add_argument("--torchrun", action="store_true", help="through torchrun on one node, too")
    parser.add_argument("--die-with-parent", action="store_true", default=env.get(DIE_WITH_PARENT) == "1")
    known = parser.parse_args(own)
    if known.die_with_parent:
        die_with_parent()
    return Options(
        nnodes=known.nnodes,
        procs=known.nproc_per_node,
        node=env.get("NODE_NAME") or env.get("HOSTNAME") or os.uname().nodename,
        module=known.module,
        args=tuple(rest),
        stage_uri=known.stage_uri or _stage_uri(rest),
        attempt=known.attempt,
        shutdown_timeout_s=known.shutdown_timeout,
        peer_grace_s=known.peer_grace,
        torchrun=known.torchrun or known.nnodes > 1 or "PET_RDZV_ENDPOINT" in env,
        heartbeat_s=known.heartbeat,
    )


def _stage_uri(args: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--stage")
    known, _ = parser.parse_known_args(list(args))
    if not known.out or not known.stage:
        raise UsageError(
            "the launcher does not know where the attempt belongs",
            expected="--out and --stage among the program's arguments after --, or --stage-uri",
        )
    return storage.join(known.out, known.stage)


class Launch:
    """One attempt on one node."""

    def __init__(self, options: Options, env: Mapping[str, str]):
        self.options, self.env = options, env
        self.run_dir = tempfile.mkdtemp(prefix="qwenvl-")
        self.attempt = Attempt.begin(options.stage_uri, options.node, options.attempt, one_node=options.nnodes == 1)
        self.log_folder = storage.local_path(self.attempt.uri) or self.run_dir
        os.makedirs(self.log_folder, exist_ok=True)
        self.signalled: int | None = None
        self.ended_by_us: set[int] = set()
        self.oom_kills = _oom_kills()
        self._shown: dict[str, int] = {
            path.name: path.stat().st_size for path in Path(self.log_folder).glob("rank*.log")
        }
        self._look_again = 0.0

    # ------------------------------------------------------------ the course of things

    def run(self) -> int:
        options = self.options
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.attempt.event(
            "start", world_size=options.nnodes * options.procs, module=options.module, args=list(options.args)
        )
        ranks = (Torchrun if options.torchrun else Direct).start(options, self._rank_env(), self.log_folder)
        reporter = Reporter(self.attempt, self.run_dir, self.log_folder, ranks, every_s=options.heartbeat_s).start()
        try:
            codes = self._watch(ranks)
        finally:
            ranks.kill()
            self._show()
            reporter.stop()
        code = self._conclude(ranks, codes)
        if code != DONE:
            tracking.end_left(self.run_dir, "KILLED" if self.signalled or code == Preempted.code else "FAILED")
        shutil.rmtree(self.run_dir, ignore_errors=True)
        return code

    def _rank_env(self) -> dict[str, str]:
        return {
            **self.env,
            heartbeat.RUN_DIR: self.run_dir,
            heartbeat.ATTEMPT: str(self.attempt.number),
            "QWENVL_LAUNCHER_PID": str(os.getpid()),
            "QWENVL_ATTEMPT_URI": self.attempt.uri,
        }

    def _watch(self, ranks: Ranks) -> dict[int, int | None]:
        """Until every rank has ended; the statuses as waitpid tells them, None where only the record knows."""
        deadline: float | None = None
        forwarded = False
        while True:
            statuses = ranks.poll()
            now = time.monotonic()
            self._show()
            if all(status is not None for status in statuses.values()):
                return statuses
            if self.signalled is not None and not forwarded:
                forwarded, deadline = True, now + self.options.shutdown_timeout_s
                self.attempt.event("signal", signal=self.signalled)
                ranks.terminate()
            if deadline is None and any(statuses.values()):
                deadline = now + self.options.peer_grace_s
                self.attempt.event("rank ended", codes={str(rank): code for rank, code in statuses.items() if code})
            if deadline is not None and now > deadline:
                self.ended_by_us |= {rank for rank, status in statuses.items() if status is None}
                ranks.kill()
                deadline = now + 3600
            self._end_hung(ranks, statuses)
            time.sleep(POLL_S)

    def _on_signal(self, number: int, _: object) -> None:
        self.signalled = self.signalled or number

    def _end_hung(self, ranks: Ranks, statuses: Mapping[int, int | None]) -> None:
        """End ranks that hang while holding the interpreter lock, where their own watchdog cannot run."""
        if time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + 1.0
        for rank in [rank for rank, status in statuses.items() if status is None]:
            if not ranks.silent_for(rank, self.run_dir, HANG_MARGIN_S):
                continue
            beat = heartbeat.read_pulse(self.run_dir, rank)
            assert beat is not None
            error = Hang(
                "no progress within the phase's limit", where=f"rank {rank}, phase {beat.phase}, step {beat.step}"
            )
            ending = Ending(rank=rank, code=Hang.code, error=str(error), kind="Hang", phase=beat.phase, step=beat.step)
            heartbeat.ending_path(self.run_dir, rank).write_text(ending.model_dump_json())
            ranks.abort(rank)  # faulthandler writes the stacks without the lock

    def _show(self) -> None:
        """Pass on what the node's first rank has printed since the last look."""
        logs = sorted(Path(self.log_folder).glob("rank*.log"), key=lambda path: (len(path.name), path.name))
        if not logs:
            return
        with logs[0].open("rb") as file:
            file.seek(self._shown.get(logs[0].name, 0))
            data = file.read()
        if data:
            self._shown[logs[0].name] = self._shown.get(logs[0].name, 0) + len(data)
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    # ------------------------------------------------------------ the end

    def _conclude(self, ranks: Ranks, statuses: Mapping[int, int | None]) -> int:
        endings = {rank: self._ending_of(rank, status) for rank, status in ranks.final(statuses, self.run_dir).items()}
        codes = {rank: ending.code for rank, ending in endings.items()}
        said = {rank: code for rank, code in codes.items() if rank not in self.ended_by_us}
        rank, code = first_cause(said if any(said.values()) else codes)
        cause = endings.get(rank) or Ending(rank=-1, code=DONE)
        committed = [ending.committed_step for ending in endings.values() if ending.committed_step is not None]
        exit_code = 128 - code if code < 0 else code
        error = cause.error
        if code and not error:
            error = self._last_words(rank, code)
        termination = Termination(
            code=exit_code,
            decision=decide(codes.values()),
            rank=rank,
            phase=cause.phase,
            step=cause.step,
            committed_step=max(committed, default=None),
            error=error,
            codes=codes,
            attempt=self.attempt.number,
            node=self.options.node,
            time=heartbeat.utc(),
        )
        self._publish(termination)
        return exit_code

    def _ending_of(self, rank: int, status: int | None) -> Ending:
        """The rank's own record, or what its exit status says."""
        ending, beat = heartbeat.read_ending(self.run_dir, rank), heartbeat.read_pulse(self.run_dir, rank)
        if ending is not None and (ending.code != DONE or not status):
            return ending
        facts = {} if beat is None else {"phase": beat.phase, "step": beat.step, "committed_step": beat.committed_step}
        if rank in self.ended_by_us and status in (None, -signal.SIGKILL):
            what = (
                "did not leave in time after the signal"
                if self.signalled
                else "was ended because another rank had failed"
            )
            return Ending(rank=rank, code=PeerLost.code, error=f"rank {rank} {what}", **facts)
        if status == -signal.SIGKILL and _oom_kills() > self.oom_kills:
            error = OutOfMemory("the kernel killed the rank: host memory ran out", where=f"rank {rank}", got=_memory())
            return Ending(rank=rank, code=OutOfMemory.code, error=str(error), kind="OutOfMemory", **facts)
        return Ending(rank=rank, code=1 if status is None else status, **facts)

    def _last_words(self, rank: int, code: int) -> str:
        lines = last_lines(Path(self.log_folder) / f"rank{rank}.log", 15)
        what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "\n".join([f"rank {rank} ended without saying why: {what}", *(f"    {line}" for line in lines)])

    def _publish(self, end: Termination) -> None:
        self.attempt.event("end", code=end.code, decision=end.decision, rank=end.rank, step=end.step, error=end.error)
        if end.code != DONE:
            where = storage.join(self.attempt.uri, f"rank{end.rank}.log")
            say = [
                f"attempt {end.attempt} ended: rank {end.rank}, phase {end.phase or 'start'}, step {end.step}, "
                f"exit code {end.code} ({end.decision})",
                f"error: {end.error}",
                f"  log: {where}",
            ]
            print("\n".join(say), file=sys.stderr, flush=True)
        try:
            self.attempt.finish(end, self.log_folder)
        except QwenVLError as error:  # the end is told below as well; it must not hide the cause
            print(f"the end of the attempt could not be stored: {error}", file=sys.stderr, flush=True)
        _write_message(end, self.env)


def _write_message(end: Termination, env: Mapping[str, str]) -> None:
    """The pod's termination message, 4096 bytes at most: a long error is cut, the figures never."""
    path = env.get(TERMINATION_FILE, "/dev/termination-log")
    if not os.path.exists(path) and TERMINATION_FILE not in env:
        return
    codes, room = dict(list(end.codes.items())[:64]), 2000
    while True:
        cut = end.model_copy(update={"error": end.error[:room], "codes": codes})
        message = (cut.model_dump_json() + "\n").encode()
        if len(message) <= MESSAGE_BYTES or room == 0:
            break
        room = max(0, room - (len(message) - MESSAGE_BYTES + 3) // 4)  # a character has 4 bytes at most
    Path(path).write_bytes(message)


def _oom_kills() -> int:
    """How often the kernel has killed in this cgroup for want of memory."""
    for name in ("memory.events", "memory/memory.oom_control"):  # cgroup v2, v1
        try:
            text = Path(CGROUP, name).read_text()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)
    return 0


def _memory() -> str:
    figures = []
    v1 = [f"memory/memory.{name}" for name in ("usage_in_bytes", "max_usage_in_bytes", "limit_in_bytes")]
    for name in ("memory.current", "memory.peak", "memory.max", *v1):
        try:
            figures.append(f"{Path(name).name} {Path(CGROUP, name).read_text().strip()}")
        except OSError:
            continue
    return ", ".join(figures) or "no figures from the kernel"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return Launch(parse(sys.argv[1:] if argv is None else argv, os.environ), os.environ).run()
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code


if __name__ == "__main__":
    sys.exit(main())

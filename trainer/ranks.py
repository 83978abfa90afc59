"""The processes of one node's ranks: started directly with torchrun's environment, or by torchrun itself.

    ranks = Direct.start(options, env, log_folder)      # or Torchrun.start
    ranks.poll()                                        # {rank: exit status, or None while it lives}

Both tie the ranks' lives to the launcher's (trainer/warm.py, trainer/edge.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, Protocol

from trainer import heartbeat, warm
from trainer.edge import LOG_FOLDER


class Ranks(Protocol):
    def poll(self) -> dict[int, int | None]: ...
    def terminate(self) -> None: ...
    def abort(self, rank: int) -> None: ...
    def kill(self) -> None: ...
    def silent_for(self, rank: int, run_dir: str, margin_s: float) -> bool: ...
    def final(self, statuses: Mapping[int, int | None], run_dir: str) -> dict[int, int | None]: ...


class Silence:
    """How long a rank's pulse has not changed, on this process's clock."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def beyond(self, rank: int, run_dir: str, margin_s: float) -> bool:
        beat, now = heartbeat.read_pulse(run_dir, rank), time.monotonic()
        if beat is None:
            return False
        sequence, since = self._seen.get(rank, (-1, now))
        if sequence != beat.sequence:
            self._seen[rank] = (beat.sequence, now)
            return False
        return now - since > beat.phase_limit_s + margin_s


class Direct:
    """One process a rank, each in a process group of its own, so that its helpers go with it."""

    def __init__(self, programs: dict[int, warm.Program]):
        self.programs = programs
        self._swept: set[int] = set()
        self._silence = Silence()

    @classmethod
    def start(cls, options: Any, env: Mapping[str, str], log_folder: str) -> Direct:
        port, programs = _free_port(), {}
        for rank in range(options.procs):
            log = os.open(os.path.join(log_folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                own = {**env, **contract(rank, options.procs, port)}
                programs[rank] = warm.start("trainer.edge", [options.module, *options.args], env=own, output=log)
            finally:
                os.close(log)
        return cls(programs)

    def poll(self) -> dict[int, int | None]:
        statuses = {rank: program.poll() for rank, program in self.programs.items()}
        for rank, status in statuses.items():
            if status is not None and rank not in self._swept:
                self._swept.add(rank)
                _kill_group(self.programs[rank].pid)  # loader workers, the tracking sender
        return statuses

    def terminate(self) -> None:
        for program in self.programs.values():
            program.send_signal(signal.SIGTERM)

    def abort(self, rank: int) -> None:
        self.programs[rank].send_signal(signal.SIGABRT)

    def kill(self) -> None:
        for rank, program in self.programs.items():
            if rank not in self._swept:
                _kill_group(program.pid)

    def silent_for(self, rank: int, run_dir: str, margin_s: float) -> bool:
        return self._silence.beyond(rank, run_dir, margin_s)

    def final(self, statuses: Mapping[int, int | None], run_dir: str) -> dict[int, int | None]:
        return dict(statuses)


class Torchrun:
    """torch.distributed.run as one child; which global ranks live here is learned from what they write."""

    AGENT = -1

    def __init__(self, agent: warm.Program, shutdown_timeout_s: float):
        self.agent, self.shutdown_timeout_s = agent, shutdown_timeout_s
        self._silence = Silence()

    @classmethod
    def start(cls, options: Any, env: Mapping[str, str], log_folder: str) -> Torchrun:
        args = ["--shutdown-timeout", str(int(options.shutdown_timeout_s)), "--max-restarts", "0"]
        if "PET_NNODES" not in env:
            args += ["--nnodes", str(options.nnodes)]
        if "PET_NPROC_PER_NODE" not in env:
            args += ["--nproc-per-node", str(options.procs)]
        if options.nnodes == 1 and "PET_RDZV_ENDPOINT" not in env and "PET_MASTER_ADDR" not in env:
            args += ["--standalone"]
        args += ["-m", "trainer.edge", options.module, *options.args]
        return cls(
            warm.start("torch.distributed.run", args, env={**env, LOG_FOLDER: log_folder}), options.shutdown_timeout_s
        )

    def poll(self) -> dict[int, int | None]:
        return {self.AGENT: self.agent.poll()}

    def terminate(self) -> None:
        self.agent.send_signal(signal.SIGTERM)

    def abort(self, rank: int) -> None:
        self.agent.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        _kill_group(self.agent.pid)

    def silent_for(self, rank: int, run_dir: str, margin_s: float) -> bool:
        return any(self._silence.beyond(found, run_dir, margin_s) for found in ranks_in(run_dir))

    def final(self, statuses: Mapping[int, int | None], run_dir: str) -> dict[int, int | None]:
        """Ranks that left a record or a pulse; the agent's own code stands only when there is none."""
        agent = statuses[self.AGENT]
        found: dict[int, int | None] = dict.fromkeys(ranks_in(run_dir), -signal.SIGKILL if agent else 0)
        return found or {0: agent}


def contract(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of a rank on a single node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }


def ranks_in(run_dir: str) -> list[int]:
    """Ranks that have written anything into the run directory."""
    found = (re.fullmatch(r"rank-(\d+)\.(?:pulse|end\.json)", name) for name in os.listdir(run_dir))
    return sorted({int(match[1]) for match in found if match})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)

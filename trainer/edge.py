"""The edge of a rank's process: what happened inside becomes one exit code and one record, whatever it was.

    python -m trainer.edge MODULE ARGS...       started by trainer/launch.py, directly or through torchrun

It ties the rank's life to its parent's, keeps stacks ready (faulthandler), starts the hang watchdog, runs MODULE as
`__main__`, and writes an Ending (trainer/heartbeat.py) that the launcher reads: torchrun itself turns every failure
into 1. After a failure no collective is issued and no interpreter shutdown is waited for: log, leave.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from trainer.errors import DONE, UNKNOWN, OutOfMemory, PeerLost, QwenVLError
from trainer.heartbeat import Ending, pulse, utc, write_ending
from trainer.observe import watch
from trainer.warm import die_with_parent

LAUNCHER = "QWENVL_LAUNCHER_PID"
LOG_FOLDER = "QWENVL_LOG_FOLDER"

PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "gloo/transport/tcp",
    "nccl error",
    "socket timeout",
    "remote process exited",
    "recvvalue failed",
    "sendbytes failed",
    "connection was likely closed",
)
"""Words of torch.distributed, gloo and NCCL when the other side went away (lower case)."""


def code_of(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, QwenVLError):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemory.code
    if _is_peer_lost(error):
        return PeerLost.code
    return UNKNOWN


def _is_peer_lost(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    told = str(error).lower()
    return "RuntimeError" in kinds and any(sign in told for sign in PEER_SIGNS)


def told(error: BaseException) -> str:
    """The error as people read it: a QwenVLError's own message, else its class, text and the place it came from."""
    if isinstance(error, QwenVLError):
        return str(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else ""
    first = str(error).strip().split("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f"\n  where: {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {first}{place}"


def _ending(code: int, error: BaseException | None) -> Ending:
    state = pulse().state
    return Ending(
        rank=state.rank,
        code=code,
        error=told(error) if error is not None else "",
        kind=type(error).__name__ if error is not None else "",
        phase=state.phase,
        step=state.step,
        committed_step=state.committed_step,
        time=utc(),
    )


def _leave(code: int, error: BaseException | None) -> NoReturn:
    write_ending(_ending(code, error))
    if error is not None and told(error):
        if (
            not isinstance(error, QwenVLError | SystemExit) and code != PeerLost.code
        ):  # which collective it was: no news
            traceback.print_exception(error)
        print(f"error: {told(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _tie() -> None:
    """Die with the parent, and at once when the launcher is gone already."""
    die_with_parent()
    launcher = os.environ.get(LAUNCHER)
    if launcher:
        try:
            os.kill(int(launcher), 0)
        except ProcessLookupError:
            os._exit(128 + signal.SIGKILL)


def _take_log() -> None:
    """Under torchrun the rank itself sends its output to its log; started directly it has it from the launcher."""
    folder = os.environ.get(LOG_FOLDER)
    if folder:
        log = os.open(
            os.path.join(folder, f"rank{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        os.dup2(log, 1)
        os.dup2(log, 2)


def by_hand(program: Callable[[], None]) -> None:
    """The edge of a program that the launcher may have started, or a person: `python -m trainer.train ...` by hand
    ends with one message and the error's exit code; under `run` the error goes there."""
    if LAUNCHER in os.environ:
        return program()
    try:
        program()
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)


def run(module: str, args: Sequence[str]) -> NoReturn:
    _tie()
    _take_log()
    faulthandler.enable()
    watch.start(pulse())
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException as error:
        code = code_of(error)
        _leave(code, error if code != DONE else None)
    pulse().beat(phase="end")
    write_ending(_ending(DONE, None))
    watch.stop()
    raise SystemExit(DONE)


if __name__ == "__main__":
    # the pulse and the watchdog must be those of the package, not of a second copy named __main__
    from trainer import edge  # noqa: PLW0406

    edge.run(sys.argv[1], sys.argv[2:])

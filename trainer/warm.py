"""One machine only: a server that has torch, transformers and DeepSpeed imported and forks programs from itself.

Importing them takes some 13 s of CPU, and a run on one machine starts ten programs, most of them on two ranks. The
server imports once, while the data is being prepared; each program is then a fork of it that starts within milliseconds
and shares its pages. A cluster's pods start once a stage and do not use it.

    qwenvl run              starts  python -m trainer.warm SOCKET  and sets QWENVL_WARM=SOCKET for the steps
    start(module, args)     forks a program from the server that QWENVL_WARM names, or starts a plain subprocess

A program lives no longer than whoever asked for it: its connection to the server is its life line. When the asker dies
the connection closes and the server kills the program's process group; when the server dies the kernel kills its forks.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

VARIABLE = "QWENVL_WARM"
# What the trainer's programs import first, as module:function; anything else they import themselves.
PRELOAD = ("trainer.step.imports:import_large", "trainer.observe.tracking:import_client")
_PR_SET_PDEATHSIG = 1


class Program(Protocol):
    """What subprocess.Popen and a fork of the server have in common."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


def start(module: str, args: Sequence[str], *, env: Mapping[str, str], output: int | None = None) -> Program:
    """Start `python -m module args`, in a process group of its own, with exactly this environment.

    `output` is the file descriptor for stdout and stderr; default: this process's. From the warm server when the
    environment variable QWENVL_WARM names one that answers, else as a subprocess that dies with this process.
    """
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            return Forked(path, module, args, env, output)
    command = [sys.executable, "-m", module, *args]
    tied = functools.partial(die_with_parent, os.getpid())
    return subprocess.Popen(
        command,
        env=dict(env),
        process_group=0,
        preexec_fn=tied,  # noqa: PLW1509 - one prctl call, takes no locks
        stdout=output,
        stderr=output,
    )


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent ends (Linux). `parent` is its pid as known before this process began:
    if it died before the kernel was asked, this process ends here."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


class Forked:
    """A program that the server forked; poll, wait and send_signal as subprocess.Popen has them."""

    def __init__(self, path: str, module: str, args: Sequence[str], env: Mapping[str, str], output: int | None):
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._line.connect(path)
        request = {"module": module, "args": list(args), "env": dict(env), "cwd": os.getcwd()}
        streams = [1, 2] if output is None else [output, output]
        payload = json.dumps(request).encode()
        header = len(payload).to_bytes(8, "big")
        self._line.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))])
        self._line.sendall(payload)
        self._reader = self._line.makefile("r")
        answer = self._reader.readline()
        if not answer:
            raise ConnectionError("the warm server closed the connection")
        self.pid = int(answer)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._finish()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0)
            self._finish()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def _finish(self) -> None:
        answer = self._reader.readline()
        # No answer: the server died, and its forks with it.
        self.returncode = int(answer) if answer else -signal.SIGKILL
        self._line.close()


# ---------------------------------------------------------------- server


class Server:
    """Accepts requests, forks, reports exit codes, kills what nobody waits for any more. One thread, no locks."""

    def __init__(self, path: str):
        hidden = f"{path}.{os.getpid()}"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(hidden)
        os.chmod(hidden, 0o600)
        self.listener.listen(64)
        os.rename(hidden, path)  # an asker that sees the path can connect
        self.line_of: dict[int, socket.socket] = {}

    def serve(self) -> NoReturn:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready = select.select([self.listener, wake_read, *self.line_of.values()], [], [])[0]
            for source in ready:
                if source is self.listener:
                    self._accept()
                elif isinstance(source, int):
                    os.read(wake_read, 4096)
                else:
                    self._asker_gone(source)
            self._reap()

    def _accept(self) -> None:
        line, _ = self.listener.accept()
        try:
            request, streams = _receive(line)
        except (OSError, ValueError):
            line.close()
            return
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            for other in (self.listener, *self.line_of.values(), line):
                other.close()
            _become(request, streams, server)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here and in the fork: whoever comes first, the group exists from now on
        for stream in streams:
            os.close(stream)
        self.line_of[pid] = line
        with contextlib.suppress(OSError):
            line.sendall(f"{pid}\n".encode())

    def _asker_gone(self, line: socket.socket) -> None:
        """A life line is readable only when its other end closed: nobody sends after the request."""
        for pid, other in list(self.line_of.items()):
            if other is line:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                del self.line_of[pid]
        line.close()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if line := self.line_of.pop(pid, None):
                with contextlib.suppress(OSError):
                    line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                line.close()


def _receive(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, ancillary, _, _ = line.recvmsg(8, socket.CMSG_SPACE(2 * 4))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data[: len(data) - len(data) % 4])
    length = int.from_bytes(header, "big")
    payload = b""
    while len(payload) < length:
        if not (part := line.recv(length - len(payload))):
            raise ValueError("the request was cut off")
        payload += part
    return json.loads(payload), list(streams)


def _become(request: dict[str, Any], streams: list[int], server: int) -> NoReturn:
    """In the fork: take on the environment, folder, streams and arguments asked for, run the module, exit."""
    code = 1
    try:
        die_with_parent(server)
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for sig in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, stream in ((0, null), (1, streams[0]), (2, streams[1])):
            os.dup2(stream, target)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = [request["module"], *request["args"]]
        _seed_anew()
        sys.modules.pop(request["module"], None)  # runs as __main__ whether or not it was imported, as python -m does
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _seed_anew() -> None:
    """Forks must not share the state of Python's generator: names of temporary files come from it."""
    import random

    random.seed()


def main(args: Sequence[str]) -> NoReturn:
    """python -m trainer.warm SOCKET: import, listen, fork until the parent dies."""
    die_with_parent()
    server = Server(args[0])  # listening before the imports: an early asker waits instead of importing beside us
    began = time.monotonic()
    for entry in PRELOAD:
        module, _, function = entry.partition(":")
        loaded = importlib.import_module(module)
        if function:
            getattr(loaded, function)()
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
    if os.environ.get("QWENVL_WARM_SAY"):
        print(f"warm: imported in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    server.serve()


if __name__ == "__main__":
    # the module that forks import must be this one, not a second copy named __main__
    importlib.import_module("trainer.warm").main(sys.argv[1:])

"""Starting the cluster's programs, waiting for them, and finding all that is left of a cluster, whoever died before.

A program belongs to the cluster because it is in the cluster's cgroup, a mount because it lies below the cluster's
folder, a network namespace because of its name: no process id that may have been given to somebody else is trusted.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.cluster.place import API_SERVICE, CGROUPS, DAEMONS, DNS_SERVICE, GATEWAY, HOME, LOGS, NAME, NETNS, PKI, RUN
from tests.cluster.programs import PATH
from trainer.errors import UsageError

CLONE_NEWNET = 0x40000000
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""What a kubelet changes on its machine."""
SAVED = RUN / "sysctl.json"


# ---------------------------------------------------------------- start, wait


def inside(*command: object) -> list[str]:
    """A command in the cluster's network; mounts and cgroups stay the machine's (`ip netns exec` would hide them)."""
    return ["nsenter", f"--net={NETNS}", *map(str, command)]


def enter() -> None:
    """This process goes into the cluster's network, and what it starts from now on."""
    with NETNS.open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", str(NETNS))


def spawn(name: str, *command: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program of the cluster, its output in log/NAME.log; it goes on when this process ends."""
    DAEMONS.mkdir(parents=True, exist_ok=True)
    script = f'echo $$ > "{DAEMONS}/cgroup.procs" && exec "$@"'
    with (LOGS / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            ["sh", "-c", script, "sh", *inside(*command)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PATH": PATH, **(env or {})},
            cwd=RUN,
        )
    (RUN / "pids" / name).write_text(str(process.pid))
    return process


def wait_for(what: str, ready: Callable[[], bool], *, name: str | None = None, limit_s: float = 60.0) -> None:
    """Poll until `ready`.

    Raises:
        UsageError: it did not come in time; the last lines of NAME's log are in the message.
    """
    end = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(subprocess.SubprocessError, OSError, ValueError):
            if ready():
                return
        if time.monotonic() > end:
            log = LOGS / f"{name}.log"
            lines = log.read_text(errors="replace").splitlines()[-20:] if name and log.exists() else []
            raise UsageError(f"the test cluster: {what} did not come in {limit_s:.0f} s", got="\n".join(lines) or None)
        time.sleep(0.05)


def run(*command: object, text: str | None = None, check: bool = True) -> str:
    """Output of a command on this machine.

    Raises:
        UsageError: it failed; with what it said.
    """
    done = subprocess.run(
        [str(word) for word in command], input=text, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": PATH},
    )  # fmt: skip
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise UsageError("the test cluster: a command failed", where=" ".join(map(str, command))[:300], got=said)
    return done.stdout


def pid_of(name: str) -> int | None:
    """Of a running program of the cluster."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((RUN / "pids" / name).read_text())
        if str(pid) in (DAEMONS / "cgroup.procs").read_text().split():
            return pid
    return None


def stop(name: str, number: int = signal.SIGTERM, *, limit_s: float = 10.0) -> None:
    """End one program; SIGKILL when it does not."""
    for one in (number, signal.SIGKILL):
        pid = pid_of(name)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, one)
        end = time.monotonic() + limit_s
        while pid_of(name) is not None and time.monotonic() < end:
            _reap(pid)
            time.sleep(0.02)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


# ---------------------------------------------------------------- network, settings of the kernel


def network() -> None:
    """A network namespace with a bridge; nothing of it is reachable from outside, and it reaches nothing outside."""
    run("ip", "netns", "add", NAME)
    for words in (
        "link set lo up",
        "link add cni0 type bridge",
        f"addr add {GATEWAY}/16 dev cni0",
        "link set cni0 up",
        f"addr add {API_SERVICE}/32 dev lo",
        f"addr add {DNS_SERVICE}/32 dev lo",
        "route add default dev cni0",
    ):
        run(*inside("ip", *words.split()))
    run(*inside("sysctl", "-qw", "net.ipv4.ip_forward=1"))


def save_sysctls() -> None:
    """As they were before the first cluster: where another one runs, what it found."""
    if others := _saved_by_others():
        SAVED.write_text(others[0].read_text())
    elif not SAVED.exists():
        SAVED.write_text(json.dumps({key: Path("/proc/sys", key).read_text() for key in SYSCTLS}))


def _saved_by_others() -> list[Path]:
    return [path for path in HOME.glob(f"run*/{SAVED.name}") if path != SAVED]


# ---------------------------------------------------------------- leftovers


def leftovers() -> list[str]:
    """What exists of a cluster, in words: processes, mounts, cgroups, network, folder."""
    found = []
    if pids := _members():
        found.append(f"{len(pids)} processes")
    if mounts := _mounts():
        found.append(f"{len(mounts)} mounts")
    if tops := _cgroups():
        found.append(f"cgroups in {len(tops)} hierarchies")
    if NETNS.exists():
        found.append("a network namespace")
    if RUN.exists():
        found.append("a folder")
    return found


def remove_all(names: Iterable[str] = ()) -> None:
    """Everything of the cluster, also after it or its parent was killed. `names` are ended gently, in this order.

    Raises:
        UsageError: something would not go.
    """
    for name in names:
        stop(name)
    end = time.monotonic() + 20
    while (pids := _members()) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid)
        time.sleep(0.02)
    for mount in reversed(_mounts()):
        run("umount", "-l", mount, check=False)
    while _cgroups() and time.monotonic() < end:
        _remove_cgroups()
    if NETNS.exists():
        run("ip", "netns", "del", NAME)
    if SAVED.exists() and not _saved_by_others():  # the last cluster of the machine puts them back
        for key, value in json.loads(SAVED.read_text()).items():
            Path("/proc/sys", key).write_text(value)
    if RUN.exists() and not _mounts():
        shutil.rmtree(RUN)
    if left := leftovers():
        raise UsageError("the test cluster could not be removed", got=", ".join(left), where=str(RUN))


def _members() -> list[int]:
    """Processes in the cluster's cgroups: its programs, their children, its pods."""
    top = CGROUPS / "pids" / NAME
    pids: list[int] = []
    for path in [*top.rglob("cgroup.procs")] if top.exists() else []:
        with contextlib.suppress(OSError):
            pids += [int(word) for word in path.read_text().split()]
    return [pid for pid in pids if not _zombie(pid)]


def _remove_cgroups() -> None:
    """Deepest first. One that holds a dead child of ours is busy until the child is waited for."""
    for top in _cgroups():
        for path in [*sorted(top.rglob("*"), key=lambda one: -len(one.parts)), top]:
            if path.is_dir():
                for word in (path / "cgroup.procs").read_text().split():
                    _reap(int(word))
                with contextlib.suppress(OSError):
                    path.rmdir()
    time.sleep(0.02)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def _mounts() -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1].encode().decode("unicode_escape") for line in lines]
    return [point for point in points if point.startswith(f"{RUN}/")]


def _cgroups() -> list[Path]:
    return [path for path in CGROUPS.glob(f"*/{NAME}") if not path.parent.is_symlink()]


def folders() -> None:
    for path in (RUN, LOGS, PKI, RUN / "pids"):
        path.mkdir(parents=True, exist_ok=True)

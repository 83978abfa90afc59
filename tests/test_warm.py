"""Programs forked from the warm server behave like subprocesses, and none outlives whoever asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import warm

PROGRAM = """
import os, sys, time
os.write(1, f"args {sys.argv[1:]} env {os.environ.get('MARK')} preloaded {'colorsys' in sys.modules}\\n".encode())
if sys.argv[1] == "exit": sys.exit(int(sys.argv[2]))
if sys.argv[1] == "raise": raise ValueError("of the program")
if sys.argv[1] == "sleep": time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "program.py").write_text(PROGRAM)
    path = str(tmp_path / "socket")
    code = f"import trainer.warm as w; w.PRELOAD = ('colorsys',); w.main(['{path}'])"
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: Path(path).exists())
    monkeypatch.setenv(warm.VARIABLE, path)
    monkeypatch.chdir(tmp_path)
    yield process
    process.kill()
    process.wait()


def until(condition, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def env(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path.cwd()), **more}


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "output").open("wb") as file:
        yield file.fileno()


def start(output: int, *args: str) -> warm.Program:
    return warm.start("program", args, env=env(MARK="m"), output=output)


@pytest.mark.parametrize(("args", "want"), [(("exit", "0"), 0), (("exit", "71"), 71), (("raise",), 1), (("end",), 0)])
def test_a_fork_ends_with_the_programs_code(server, output, tmp_path: Path, args: tuple[str, ...], want: int):
    program = start(output, *args)
    assert program.wait(timeout=20) == want
    said = (tmp_path / "output").read_text()
    assert f"args {list(args)} env m preloaded True" in said
    assert ("ValueError: of the program" in said) is (args[0] == "raise")


def test_without_a_server_the_same_call_starts_a_subprocess(output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv(warm.VARIABLE, str(tmp_path / "nobody"))
    monkeypatch.chdir(tmp_path)
    program = start(output, "exit", "64")
    assert program.wait(timeout=20) == 64
    assert "preloaded False" in (tmp_path / "output").read_text()


def test_a_signal_reaches_the_fork_and_its_code_says_so(server, output):
    program = start(output, "sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(timeout=0.2)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=10) == -signal.SIGTERM


def test_a_fork_dies_when_the_server_does(server, output):
    program = start(output, "sleep")
    server.kill()
    until(lambda: not alive(program.pid))
    assert program.wait(timeout=5) == -signal.SIGKILL


def test_a_fork_dies_when_its_asker_does(server, tmp_path: Path):
    code = (
        "import os, time; from trainer import warm;"
        "p = warm.start('program', ['sleep'], env=dict(os.environ)); os.write(1, b'%d\\n' % p.pid); time.sleep(60)"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env())
    assert asker.stdout is not None
    lines = iter(asker.stdout.readline, "")
    pid = next(int(line) for line in lines if line.strip().isdigit())
    assert alive(pid)
    asker.kill()
    asker.wait()
    until(lambda: not alive(pid))
    assert server.poll() is None, "the server goes on"

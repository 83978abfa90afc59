"""One ingest at a time writes into a folder or an address; one that was killed holds nothing for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import lease
from pipelines.cli.main import main
from tests.prepare.builders import write_lines
from tests.state.weed import s3  # noqa: F401  (a fixture)
from trainer import storage
from trainer.data.shards import Source
from trainer.errors import OutputInUse

HOLDER = """
import sys, time
from pipelines import lease
lease.BEAT_S = float(sys.argv[2])
with lease.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["folder", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, seconds in (("BEAT_S", 0.2), ("PATIENCE_S", 2.0), ("LOOK_S", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    if request.param == "folder":
        return str(tmp_path / "shards")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}/shards"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", [{"text": f"Text {number}."} for number in range(3)])


@pytest.fixture
def holder(out: str) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-c", HOLDER, out, "0.2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and b"held" in process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def ingest(rows: Path, out: str) -> int:
    return main(["data", "ingest", str(rows), "--out", out])


def test_an_ingest_where_another_process_writes_names_it_until_that_is_killed(
    holder: subprocess.Popen, rows: Path, out: str, capsys: pytest.CaptureFixture[str]
):
    assert ingest(rows, out) == OutputInUse.code
    told = capsys.readouterr().err
    assert f"process {holder.pid} on {os.uname().nodename}" in told and f"where: {out}" in told
    assert storage.list_dir(out) == []
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert ingest(rows, out) == 0 and Source.open(out).num_samples == 3
    assert ingest(rows, out) == 0, "released"
    if (folder := storage.local_path(out)) is not None:
        assert not [name for name in os.listdir(folder) if name.startswith(storage.TEMPORARY)]


def test_one_of_many_takes_what_a_killed_process_held(holder: subprocess.Popen, out: str):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    inside, most, guard = 0, 0, threading.Lock()

    def take(_: int) -> bool:
        nonlocal inside, most
        try:
            with lease.held(out):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(1.0)  # longer than a look at another's beat
                with guard:
                    inside -= 1
                return True
        except OutputInUse:
            return False

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take, range(4)))
    assert most == 1 and taken.count(True) >= 1 and taken.count(False) >= 1


def test_what_a_failure_leaves_is_a_lock_only_as_long_as_it_is_held(tmp_path: Path, out: str):
    """The folder that nothing was written into goes with its lock."""
    assert ingest(write_lines(tmp_path / "bad.jsonl", [{"nothing": 1}]), out) in (2, 64)
    assert storage.list_dir(out) == [] and not (Path(out).exists() and storage.local_path(out))
    with lease.held(out), pytest.raises(OutputInUse), lease.held(out):
        pass


def test_a_holder_that_stood_still_ends_when_another_took_its_place(holder: subprocess.Popen, out: str):
    if storage.local_path(out) is not None:
        pytest.skip("the kernel's lock does not pass to another")
    holder.send_signal(signal.SIGSTOP)
    with lease.held(out):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(20) == OutputInUse.code
    assert holder.stderr is not None
    told = holder.stderr.read().decode()
    assert "another took its place" in told and f"process {os.getpid()} on" in told

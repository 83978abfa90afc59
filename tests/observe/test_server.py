"""MLflow as a real server over HTTP: what a stage sends arrives, and a stage that ends badly has an end there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import tracking as pipeline_tracking
from tests.observe.test_tracking import a_spec
from trainer.errors import NumericsError
from trainer.observe import tracking
from trainer.observe.tracking import Mirror
from trainer.resolve import load_recipe
from trainer.warm import die_with_parent

HANG_S = 180.0
"""Bounds a hang, and expects nothing: what is waited for ends the wait, and so does the end of the process that it is
waited of. On two cores with a load of 9 the server answered after 88 s (some 10 s of CPU) and took 16 s to end."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` on loopback with SQLite and its own artifacts; it ends with this process at the latest."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    env = {**os.environ, **tracking.LIMITS}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, takes no locks
        )
    uri, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while not answers(uri):
            told = (folder / "log").read_text()[-2000:]
            assert process.poll() is None and time.monotonic() - began < HANG_S, told
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=HANG_S)


def answers(uri: str) -> bool:
    try:
        return urllib.request.urlopen(f"{uri}/health", timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(server)


def test_a_stage_arrives_over_http_with_parameters_metrics_and_its_freeze_table(
    server: str, client: Any, tmp_path: Path
) -> None:
    spec = a_spec(tmp_path, uri=server)
    mirror = Mirror(client, spec)
    mirror.send([{"step": step, "time": 1.0, "values": {"loss": 1 / step}} for step in (1, 2, 3)])
    table = [{"group": "vision", "state": "frozen", "digest_before": "a", "digest_after": "a"}]
    mirror.close({"status": "FINISHED", "freeze_table": table, "params": {"checkpoint.uri": "sft/checkpoints/3"}})
    run = client.get_run(tracking.run_id(spec.stage_uri))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"freeze.vision": "frozen", "world_size": "2", "checkpoint.uri": "sft/checkpoints/3"}
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert run.data.tags["mlflow.parentRunId"] == tracking.run_id(spec.out)
    local = client.download_artifacts(run.info.run_id, "freeze_table.md", str(tmp_path))
    assert "| vision | frozen | a | a |" in Path(local).read_text()


def launched(folder: Path, server: str, how: str) -> subprocess.Popen[str]:
    """A launcher whose one rank has begun to send."""
    (folder / "spec.json").write_text(a_spec(folder, uri=server).model_dump_json())
    words = ["--module", "tests.observe.program", "--stage-uri", str(folder / "sft"), "--nproc-per-node", "1"]
    command = [sys.executable, "-m", "trainer.launch", "--die-with-parent", *words, "--"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, str(folder / "spec.json"), how], stdout=pipe, stderr=pipe, text=True)


def wait_until_running(launcher: subprocess.Popen[str], folder: Path) -> str:
    began = time.monotonic()
    while not (folder / "begun").exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() - began < HANG_S, "the rank did not begin to send"
        time.sleep(0.1)
    run = tracking.run_id(str(folder / "sft"))
    assert run is not None
    return run


def test_a_stage_that_fails_is_failed_in_mlflow_when_its_launcher_ends(
    server: str, client: Any, tmp_path: Path
) -> None:
    launcher = launched(tmp_path, server, "fail")
    _, told = launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == NumericsError.code, told
    run = tracking.run_id(str(tmp_path / "sft"))
    assert client.get_run(run).info.status == "FAILED"


def test_a_stage_that_is_stopped_is_killed_in_mlflow(server: str, client: Any, tmp_path: Path) -> None:
    launcher = launched(tmp_path, server, "wait")
    run = wait_until_running(launcher, tmp_path)
    assert client.get_run(run).info.status == "RUNNING"
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=HANG_S)
    assert client.get_run(run).info.status == "KILLED"


def test_a_launcher_that_was_killed_leaves_it_to_the_top_and_a_finished_stage_stays_finished(
    server: str, client: Any, tmp_path: Path
) -> None:
    finished = Mirror(client, a_spec(tmp_path, uri=server, stage="stage1"))
    finished.close({"status": "FINISHED", "freeze_table": [], "params": {}})
    begun = Mirror(client, a_spec(tmp_path, uri=server))
    recipe = load_recipe("tiny", [f"tracking.uri={server}"])
    pipeline_tracking.start(recipe, str(tmp_path), "FAILED").wait(HANG_S)
    status = {
        name: client.get_run(run).info.status for name, run in (("stage1", finished.run_id), ("sft", begun.run_id))
    }
    assert status == {"stage1": "FINISHED", "sft": "FAILED"}
    assert client.get_run(tracking.run_id(str(tmp_path))).info.status == "FAILED"

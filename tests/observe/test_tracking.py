"""MLflow is a view: what was committed arrives, what was sent is not sent again, and a dead server costs nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer import manifest as manifests
from trainer import storage
from trainer.manifest import Manifest, MetricsPart
from trainer.observe import tracking
from trainer.observe.metrics import Metrics, Row, encode_rows, history
from trainer.observe.tracking import Mirror, Spec
from trainer.resolve import load_recipe


def a_spec(tmp_path: Path, **more: Any) -> Spec:
    facts = {
        "uri": f"sqlite:///{tmp_path}/mlflow/mlflow.db",
        "experiment": "tiny",
        "out": str(tmp_path),
        "stage": "sft",
        "attempt": 1,
        "metrics_path": str(tmp_path / "sft/attempts/0001/metrics.jsonl"),
        "params": {"freeze.vision": "frozen", "world_size": "2"},
    }
    return Spec.model_validate(facts | more)


def a_committed_history(tmp_path: Path, rows: list[Row]) -> None:
    stage, data = str(tmp_path / "sft"), encode_rows(rows)
    storage.create_once(storage.join(stage, "metrics/a.jsonl"), data)
    part = MetricsPart(
        key="metrics/a.jsonl",
        first_step=rows[0].step,
        last_step=rows[-1].step,
        size_bytes=len(data),
        sha256=storage.sha256_bytes(data),
    )
    facts = {
        "stage_digest": "s",
        "plan_digest": "p",
        "base_model_digest": "b",
        "objects": (),
        "num_parameters": 0,
        "optimizer": {},
    }
    manifests.commit(
        stage, Manifest(stage="sft", step=rows[-1].step, attempt=1, nonce="n", world_size=1, metrics=(part,), **facts)
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One SQLite store for the module: making its tables takes seconds."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "mlflow").mkdir()
    return MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db"), folder


def steps_sent(client: Any, run: str, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run, key)]


def test_a_stage_becomes_a_child_run_and_attempts_continue_it(client: tuple[Any, Path], tmp_path: Path) -> None:
    mlflow, store = client
    spec = a_spec(tmp_path, uri=f"sqlite:///{store}/mlflow/mlflow.db")
    first = Mirror(mlflow, spec)
    first.send([{"step": step, "time": 1.0, "values": {"loss": 1 / step}} for step in (1, 2, 3)])
    second = Mirror(
        mlflow, a_spec(tmp_path, uri=spec.uri, attempt=2, params={"freeze.vision": "frozen", "world_size": "4"})
    )
    second.send([{"step": step, "time": 2.0, "values": {"loss": 1 / step}} for step in (2, 3, 4, 5)])
    second.send([{"step": 5, "time": 2.0, "values": {"held_out.loss": 0.5}}])
    second.close(
        {"status": "FINISHED", "params": {"late": "1"}, "freeze_table": [{"group": "vision", "state": "frozen"}]}
    )

    assert second.run_id == first.run_id == tracking.run_id(spec.stage_uri)
    assert steps_sent(mlflow, first.run_id, "loss") == [1, 2, 3, 4, 5]  # nothing twice
    assert steps_sent(mlflow, first.run_id, "held_out.loss") == [5]
    run = mlflow.get_run(first.run_id)
    assert run.data.params == {"freeze.vision": "frozen", "world_size": "2", "late": "1"}
    assert run.data.tags["world_size.attempt2"] == "4"
    assert run.data.tags["mlflow.parentRunId"] == tracking.run_id(str(tmp_path))
    assert run.info.status == "FINISHED"
    assert {item.path for item in mlflow.list_artifacts(first.run_id)} == {"freeze_table.json", "freeze_table.md"}


def test_a_name_first_seen_at_a_step_already_sent_still_arrives(client: tuple[Any, Path], tmp_path: Path) -> None:
    mlflow, store = client
    spec = a_spec(tmp_path, uri=f"sqlite:///{store}/mlflow/mlflow.db")
    Mirror(mlflow, spec).send([{"step": 4, "time": 1.0, "values": {"loss": 1.0}}])
    again = Mirror(mlflow, spec)
    again.send([{"step": 4, "time": 1.0, "values": {"loss": 1.0, "held_out.loss": 2.0}}])
    assert steps_sent(mlflow, again.run_id, "held_out.loss") == [4]
    assert steps_sent(mlflow, again.run_id, "loss") == [4]


HELD = """
import os, pathlib, time
folder = pathlib.Path(os.environ["HELD_IN"])
end = time.monotonic() + float(os.environ["HELD_S"])
while not (folder / "go").exists() and time.monotonic() < end:
    time.sleep(0.01)
(folder / "went").touch()
"""


@contextlib.contextmanager
def a_held_interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float = 60) -> Iterator[None]:
    """Python programs that are started inside the block run nothing, not even an import, until it ends. A block that
    waits for one goes on after the limit, and fails."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HELD)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("HELD_IN", str(folder))
        patch.setenv("HELD_S", str(limit_s))
        yield
    assert not (folder / "went").exists(), "the block waited for what it started"
    (folder / "go").touch()


def test_a_block_that_waits_for_what_it_started_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(AssertionError, match="waited for what it started"),
        a_held_interpreter(tmp_path / "held", monkeypatch, limit_s=0.1),
    ):
        subprocess.run([sys.executable, "-c", "pass"], check=True)


def test_the_sender_process_sends_while_training_and_what_earlier_attempts_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    a_committed_history(tmp_path, [Row(step, 1.0, {"loss": 1.0}) for step in (1, 2)])
    spec = a_spec(tmp_path, attempt=2, from_step=2)
    metrics = Metrics(spec.metrics_path)
    with a_held_interpreter(tmp_path / "held", monkeypatch):
        sender = tracking.start(spec)
        assert sender is not None
        for step in (3, 4):
            metrics.log(step, {"loss": 0.5, "bad": float("nan")})
    assert sender.finish(freeze_table=[{"group": "llm", "state": "trained"}], timeout_s=300)  # bounds a hang
    assert (tmp_path / "held/went").exists(), "it was the sender that was held"
    mlflow = MlflowClient(spec.uri)
    run = tracking.run_id(spec.stage_uri)
    assert run is not None
    assert steps_sent(mlflow, run, "loss") == [1, 2, 3, 4]
    assert "bad" not in mlflow.get_run(run).data.metrics


@contextlib.contextmanager
def a_server_that_never_answers() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        kept: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_a_server_that_does_not_answer_costs_the_training_nothing(tmp_path: Path, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(a_server_that_never_answers()) if kind == "silent" else "http://127.0.0.1:9"
        sender = tracking.start(a_spec(tmp_path, uri=uri))
        assert sender is not None
        began = time.monotonic()
        assert sender.finish(timeout_s=1.0) is False
        assert time.monotonic() - began < 3.0
        assert sender.process.poll() is not None  # no process is left behind
    assert tracking.run_id(str(tmp_path / "sft")) is None


def test_parameters_state_freezing_packing_budgets_digests_and_lineage() -> None:
    params = tracking.params_of(
        load_recipe("tiny"),
        "sft",
        digests={"plan": "abc"},
        world_size=2,
        parent_stage_run="r1",
        checkpoint_uri="out/sft/checkpoints",
    )
    want = {
        "freeze.vision": "frozen",
        "freeze.merger": "trained",
        "freeze.llm": "trained",
        "packing.length": "512",
        "packing.patch_budget": "1024",
        "pixels.image_max": "50176",
        "pixels.max_frames": "8",
        "digest.plan": "abc",
        "world_size": "2",
        "parent.stage_run_id": "r1",
        "checkpoint.uri": "out/sft/checkpoints",
    }
    assert want.items() <= params.items()


@pytest.mark.parametrize(
    ("out", "env", "want"),
    [
        ("/data/out", {}, "sqlite:////data/out/mlflow/mlflow.db"),
        ("s3://b/out", {}, None),
        ("s3://b/out", {"MLFLOW_TRACKING_URI": "http://m:5000"}, "http://m:5000"),
    ],
)
def test_where_to_send_follows_from_output_and_environment(out: str, env: dict[str, str], want: str | None) -> None:
    assert tracking.tracking_uri(load_recipe("tiny"), out, env) == want


# ---------------------------------------------------------------- metrics


def test_committed_metrics_are_read_back_and_a_changed_byte_is_told(tmp_path: Path) -> None:
    from trainer.errors import CheckpointError

    rows = [Row(1, 1.0, {"loss": 2.0}), Row(2, 2.0, {"loss": 1.5})]
    a_committed_history(tmp_path, rows)
    stage = str(tmp_path / "sft")
    assert history(stage, manifests.newest(stage)) == rows
    (tmp_path / "sft/metrics/a.jsonl").write_bytes(encode_rows([Row(1, 1.0, {"loss": 9.0}), rows[1]]))
    with pytest.raises(CheckpointError, match=r"a\.jsonl"):
        history(stage, manifests.newest(stage))


def test_rows_are_drained_once_and_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path / "m.jsonl"))
    metrics.log(1, {"loss": 1.0})
    assert [row.step for row in metrics.drain()] == [1]
    assert metrics.drain() == []
    metrics.close()
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "ti')
    assert [line["step"] for line in tracking.Follow(str(tmp_path / "m.jsonl")).lines()] == [1]

"""MLflow: a run of the pipeline, a child run per stage, metrics while training. A view: storage is the truth.

Rank 0 starts a sender process and goes on; importing MLflow (3.7 s, with the interpreter lock) and talking to its
server happen there only. The sender follows attempts/NNNN/metrics.jsonl, asks MLflow for the last step it has and
sends what lies above, also what earlier attempts committed and could not send. A server that does not answer costs
the training nothing.

    sender = tracking.start(Spec(...))                    # rank 0, after the plan is known
    sender.finish(status="FINISHED", freeze_table=[...])  # waits a few seconds at most
    tracking.run_id(stage_uri)                            # the child run's id, None when the server never answered
    tracking.end_left(run_dir, "FAILED")                  # the launcher, when the ranks ended without closing it

The ids are stored create-once: OUT/mlflow_run_id (pipeline), OUT/STAGE/mlflow_run_id (stage; attempts continue it).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trainer import storage, warm
from trainer.recipe import GROUPS, Recipe

ID_NAME = "mlflow_run_id"
POLL_S = 1.0
BATCH = 500
RETRY_S = (2.0, 5.0, 15.0, 30.0, 60.0)
STEP = "step"
"""Metric that holds the last step sent: one read tells where to go on."""

# The client's defaults are 7 retries of 120 s each.
LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class Spec(BaseModel):
    """What the sender needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    uri: str
    experiment: str
    out: str
    stage: str
    attempt: int
    metrics_path: str
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    parent_run: str | None = None
    """A run that exists already (KFP may give one); default: the pipeline's own, stored in OUT."""
    from_step: int = 0
    """Step that this attempt resumed from: rows of earlier attempts above it were lost."""

    @property
    def stage_uri(self) -> str:
        return storage.join(self.out, self.stage)


def tracking_uri(recipe: Recipe, out: str, env: Mapping[str, str] = os.environ) -> str | None:
    """Where to send: the recipe's server, MLFLOW_TRACKING_URI, or SQLite in a local output; else nowhere."""
    if uri := recipe.tracking.uri or env.get("MLFLOW_TRACKING_URI"):
        return uri
    path = storage.local_path(out)
    return None if path is None else f"sqlite:///{os.path.abspath(path)}/mlflow/mlflow.db"


def params_of(
    recipe: Recipe,
    stage: str,
    *,
    digests: Mapping[str, str],
    world_size: int,
    parent_stage_run: str | None = None,
    **more: object,
) -> dict[str, str]:
    """Parameters of a stage's run: freeze configuration, packing, pixel and frame budgets, digests, world size,
    lineage.

    Args:
        digests: plan, data, stage, base_model ... -> digest.NAME
        more: anything else, under its own name (checkpoint_uri -> checkpoint.uri).
    """
    config = recipe.stages.named()[stage]
    params: dict[str, object] = {
        f"freeze.{group}": "trained" if getattr(config.train, group) else "frozen" for group in GROUPS
    }
    params |= {"packing.length": config.packing.length, "packing.patch_budget": config.packing.patch_budget}
    params |= {f"pixels.{key}": value for key, value in config.pixels.model_dump(mode="json").items()}
    params |= {"optim.lr": config.optim.lr, "schedule.packs_per_step": config.schedule.packs_per_step}
    params |= {f"optim.lr.{group}": rate for group, rate in config.optim.lr_of.items()}
    params |= {f"digest.{name}": value for name, value in digests.items()}
    params |= {"world_size": world_size, "family": recipe.family, "stage": stage, "seed": recipe.seed}
    if parent_stage_run:
        params["parent.stage_run_id"] = parent_stage_run
    params |= {key.replace("_", ".", 1): value for key, value in more.items() if value is not None}
    return {key: str(value)[:6000] for key, value in params.items()}


def run_id(uri: str) -> str | None:
    """The run's id stored below a stage's (or the output's) folder."""
    try:
        return storage.read_bytes(storage.join(uri, ID_NAME)).decode().strip()
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- rank 0


class Sender:
    """The sender process, as rank 0 sees it."""

    def __init__(self, process: warm.Program, folder: str):
        self.process, self.folder = process, folder

    def finish(
        self,
        *,
        status: str = "FINISHED",
        freeze_table: Sequence[Mapping[str, Any]] = (),
        params: Mapping[str, str] | None = None,
        timeout_s: float = 20.0,
    ) -> bool:
        """Say that no more rows come and wait a little; True when all was sent. Never raises, never waits longer.

        A sender that has told that its server does not answer gets 2 s.
        """
        try:
            final = {"status": status, "freeze_table": list(freeze_table), "params": dict(params or {})}
            temporary = Path(self.folder) / "final.tmp"
            temporary.write_text(json.dumps(final, default=str))
            temporary.replace(Path(self.folder) / "final.json")
            if (Path(self.folder) / "unreachable").exists():
                timeout_s = min(timeout_s, 2.0)
            return self.process.wait(timeout=timeout_s) == 0
        except (subprocess.TimeoutExpired, OSError, ValueError):
            return False
        finally:
            self.stop()

    def stop(self) -> None:
        """End the sender now; what it has not sent stays in storage."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=5)


def start(spec: Spec) -> Sender | None:
    """Start the sender. None when it cannot be started, which is told and ends nothing."""
    try:
        folder = tempfile.mkdtemp(prefix="tracking-", dir=os.environ.get("QWENVL_RUN_DIR"))
        (Path(folder) / "spec.json").write_text(spec.model_dump_json())
        dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MLFLOW_RUN_ID")
        env = {key: value for key, value in os.environ.items() if key not in dropped}
        env |= LIMITS | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = warm.start("trainer.observe.tracking", [folder], env=env)  # lives no longer than this rank
        return Sender(process, folder)
    except OSError as error:
        print(f"tracking is off: {error}", file=sys.stderr, flush=True)
        return None


# ---------------------------------------------------------------- the launcher

END_LIMIT_S = 20.0


def end_left(run_dir: str, status: str) -> None:
    """Give the stage's run an end when the ranks of this launcher have not: FAILED, or KILLED when it was stopped. Runs
    that have an end keep it; a server that did not answer the sender is not asked again. Never raises."""
    for folder in sorted(Path(run_dir).glob("tracking-*")):
        if (folder / "unreachable").exists() or not (folder / "spec.json").exists():
            continue
        try:
            env = {**os.environ, **LIMITS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            process = warm.start("trainer.observe.tracking", [str(folder), status], env=env)
        except OSError as error:
            print(f"tracking: the stage's run stays open in MLflow: {error}", file=sys.stderr, flush=True)
            continue
        try:
            process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)


def end_run(client: Any, run: str, status: str) -> None:
    """Set the status of a run that has no end yet."""
    if client.get_run(run).info.status == "RUNNING":
        client.set_terminated(run, status=status)


def _end(folder: str, status: str) -> None:
    spec = Spec.model_validate_json((Path(folder) / "spec.json").read_bytes())
    try:
        if found := run_id(spec.stage_uri):
            end_run(_client(spec), found, status)
    except Exception as error:  # the edge of a process that must never matter
        told = str(error).strip().split("\n")[0][:300]
        print(f"tracking: the stage's run stays open in MLflow: {type(error).__name__}: {told}", file=sys.stderr)


# ---------------------------------------------------------------- the sender


def import_client() -> None:
    """MLflow's client and its SQLite store. trainer/warm.py calls it once for all senders of a local run."""
    os.environ.update(LIMITS)  # MLflow reads some of them at import
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401


class Follow:
    """New whole lines of a file that grows."""

    def __init__(self, path: str):
        self.path, self.at = path, 0

    def lines(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.at)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Mirror:
    """One stage's run in MLflow, and how far it has got."""

    def __init__(self, client: Any, spec: Spec):
        self.client, self.spec = client, spec
        self.run_id = self._own_run()
        run = client.get_run(self.run_id)
        self.sent_to = self.had = int(run.data.metrics.get(STEP, -1))
        self.known = set(run.data.metrics)
        self._say(spec.params, known=run.data.params)
        client.update_run(self.run_id, status="RUNNING")

    def _own_run(self) -> str:
        if found := run_id(self.spec.stage_uri):
            return found
        parent = self._parent_run()
        experiment = self.client.get_run(parent).info.experiment_id
        tags = {"mlflow.parentRunId": parent, "stage": self.spec.stage, **self.spec.tags}
        return self._create(self.spec.stage_uri, experiment, self.spec.stage, tags)

    def _parent_run(self) -> str:
        if found := self.spec.parent_run or run_id(self.spec.out):
            return found
        name = self.spec.experiment
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._create_experiment(name)
        return self._create(
            self.spec.out, experiment, f"{name} {self.spec.out.rstrip('/').rsplit('/', 1)[-1]}", {"out": self.spec.out}
        )

    def _create_experiment(self, name: str) -> str:
        path = storage.local_path(self.spec.out)
        local = path is not None and self.spec.uri.startswith("sqlite")
        location = Path(os.path.abspath(path or ".")).joinpath("mlflow", "artifacts").as_uri() if local else None
        return self.client.create_experiment(name, artifact_location=location)

    def _create(self, uri: str, experiment: str, name: str, tags: dict[str, str]) -> str:
        """Create a run and store its id; when another sender was first, its run is used."""
        made = self.client.create_run(experiment, run_name=name, tags=tags).info.run_id
        try:
            storage.create_once(storage.join(uri, ID_NAME), f"{made}\n".encode())
            return made
        except FileExistsError:
            self.client.delete_run(made)
            found = run_id(uri)
            assert found is not None
            return found

    def _say(self, params: Mapping[str, str], *, known: Mapping[str, str]) -> None:
        """Parameters cannot change in MLflow: one that differs in a later attempt becomes a tag with the attempt."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, value) for key, value in params.items() if key not in known]
        tags = [
            RunTag(f"{key}.attempt{self.spec.attempt}", value)
            for key, value in params.items()
            if known.get(key, value) != value
        ]
        tags.append(RunTag("attempt", str(self.spec.attempt)))
        for at in range(0, len(new), 90):
            self.client.log_batch(self.run_id, params=new[at : at + 90])
        self.client.log_batch(self.run_id, tags=tags)

    def send(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """What lies above the step that MLflow had at the start, and names that it had not seen at all."""
        from mlflow.entities import Metric

        waiting: list[Any] = []
        for row in sorted(rows, key=lambda row: row["step"]):
            new = {
                key: value for key, value in row["values"].items() if row["step"] > self.had or key not in self.known
            }
            stamp = int(row["time"] * 1000)
            waiting += [Metric(key, value, stamp, row["step"]) for key, value in new.items() if value is not None]
            if len(waiting) >= BATCH:
                waiting = self._flush(waiting)
        if waiting:
            self._flush(waiting)

    def _flush(self, waiting: list[Any]) -> list[Any]:
        from mlflow.entities import Metric

        for at in range(0, len(waiting), 900):
            self.client.log_batch(self.run_id, metrics=waiting[at : at + 900])
        self.sent_to = max(self.sent_to, waiting[-1].step)
        self.client.log_batch(self.run_id, metrics=[Metric(STEP, self.sent_to, waiting[-1].timestamp, self.sent_to)])
        return []

    def close(self, final: Mapping[str, Any]) -> None:
        self._say(final["params"], known=self.client.get_run(self.run_id).data.params)
        if final["freeze_table"]:
            table = list(final["freeze_table"])
            columns = {key: [row.get(key) for row in table] for key in table[0]}
            self.client.log_dict(self.run_id, {"rows": table}, "freeze_table.json")
            self.client.log_text(self.run_id, _markdown(columns), "freeze_table.md")
        self.client.set_terminated(self.run_id, status=final["status"])


def _markdown(columns: Mapping[str, Sequence[Any]]) -> str:
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "".join("| " + " | ".join(str(cell) for cell in row) + " |\n" for row in rows)


def committed_rows(stage_uri: str) -> list[dict[str, Any]]:
    """Rows that earlier attempts have committed."""
    from trainer import manifest as manifests
    from trainer.observe.metrics import history

    return [
        {"step": row.step, "time": row.time, "values": row.values}
        for row in history(stage_uri, manifests.newest(stage_uri))
    ]


def follow(folder: str) -> None:
    """The sender's life: connect, follow, finish. Whatever fails is tried again for as long as the rank lives."""
    spec = Spec.model_validate_json((Path(folder) / "spec.json").read_bytes())
    unreachable = Path(folder) / "unreachable"
    live, mirror, failures = Follow(spec.metrics_path), None, 0
    rows: list[dict[str, Any]] = []
    while True:
        closing = (Path(folder) / "final.json").exists()
        rows += live.lines()
        try:
            if mirror is None:
                mirror = Mirror(_client(spec), spec)
                mirror.send(row for row in committed_rows(spec.stage_uri) if row["step"] <= spec.from_step)
            mirror.send(rows)
            rows = []
            if closing:
                mirror.close(json.loads((Path(folder) / "final.json").read_bytes()))
                return
            failures = 0
            unreachable.unlink(missing_ok=True)
            time.sleep(POLL_S)
        except Exception as error:  # the edge of a process that must never matter
            unreachable.touch()
            if failures == 0:
                told = str(error).strip().split("\n")[0][:300]
                print(
                    f"tracking: MLflow at {spec.uri} does not take it: {type(error).__name__}: {told}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)] if not closing else POLL_S)
            failures += 1


def _client(spec: Spec) -> Any:
    if spec.uri.startswith("sqlite:///"):
        Path(spec.uri[len("sqlite:///") :]).parent.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking import MlflowClient

    return MlflowClient(spec.uri)


if __name__ == "__main__":
    os.nice(10)
    if len(sys.argv) > 2:
        _end(*sys.argv[1:3])
    else:
        follow(sys.argv[1])

"""qwenvl job: what a person types, against real S3 (SeaweedFS) and an API over HTTP that a kubeconfig names."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import pytest
import yaml

from k8s import names
from k8s.attempts import NEVER
from k8s.record import Record
from pipelines.cli.main import main
from tests.k8s.bench import a_record
from tests.k8s.memory import MemoryApi
from tests.k8s.operators import Trainer
from tests.k8s.server import ApiServer
from tests.state.weed import s3
from trainer import storage

__all__ = ["s3"]  # the fixture
STEP = "prepare-data"


@dataclass
class World:
    server: ApiServer
    cluster: str
    out: str
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def words(self, verb: str, step: str = STEP, *more: str) -> list[str]:
        return ["job", verb, step, "--cluster", self.cluster, "--out", self.out, *more]

    def run(self, verb: str, step: str = STEP, *more: str) -> int:
        return main(self.words(verb, step, *more))

    def watch(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines.cli.main", *self.words("watch")]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.children.append(child)
        return child

    def jobs(self) -> list[dict]:
        with self.server.lock:
            return [one for (plural, _), one in self.server.memory.objects.items() if plural in ("jobs", "pytorchjobs")]

    def launcher(self) -> str:
        return self.jobs()[0]["metadata"]["annotations"][names.LAUNCHER]


@pytest.fixture
def world(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    server = ApiServer()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "a",
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
        "users": [{"name": "a", "user": {"token": "t"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    text = (resources.files("k8s") / "clusters" / "test.yaml").read_text(encoding="utf-8")
    (tmp_path / "cluster.yaml").write_text(text.replace("0" * 64, "1" * 64))
    made = World(server, str(tmp_path / "cluster.yaml"), f"{s3}/{tmp_path.name}")  # pytest makes it unique
    yield made
    for child in made.children:
        child.kill()
        child.wait()
    server.stop()


def until(true: Callable[[], object], what: str, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.05)


def test_what_is_rendered_is_what_is_created_and_rendering_leaves_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("render", STEP, "--recipe", "tiny") == 0
    config_map, job = yaml.safe_load_all(capsys.readouterr().out)
    assert world.jobs() == [] and world.server.asked == [] and storage.list_dir(world.out) == []

    assert world.run("create", STEP, "--recipe", "tiny") == 0
    (created,) = world.jobs()
    assert created["spec"] == job["spec"] and created["metadata"]["name"] == job["metadata"]["name"]
    assert ("configmaps", config_map["metadata"]["name"]) in world.server.memory.objects
    assert created["metadata"]["annotations"][names.RENEWED] == NEVER
    (record,) = storage.list_dir(f"{world.out}/launches/{STEP}")
    stored = Record.model_validate_json(storage.read_bytes(f"{world.out}/launches/{STEP}/{record}"))
    assert (stored.attempt, stored.uid) == (1, created["metadata"]["uid"])

    assert world.run("create") == 0
    assert "is under way already" in capsys.readouterr().out and len(world.jobs()) == 1


def test_watch_adopts_follows_and_ends_with_the_job(world: World) -> None:
    world.run("create", STEP, "--recipe", "tiny")
    child = world.watch()
    until(lambda: world.launcher() != NEVER, "the take-over")
    world.server.log = "2026-11-22T00:00:00Z rows: 7\n"
    world.server.change(lambda memory: memory.pod(0))
    time.sleep(1)

    def complete(memory: MemoryApi) -> None:
        memory.condition("Complete")

    world.server.change(complete)
    text, _ = child.communicate(timeout=30)
    assert child.returncode == 0, text
    assert "adopted" in text and "rows: 7" in text and "done, attempt 1" in text


@pytest.mark.parametrize(("number", "code", "want"), [(signal.SIGINT, 130, NEVER), (signal.SIGTERM, 143, "launcher")])
def test_a_watch_that_is_stopped_leaves_the_job_and_says_how_to_go_on(
    world: World, number: int, code: int, want: str
) -> None:
    """Ctrl-C: nobody watches, and that is meant. SIGTERM: an eviction, somebody comes back or the reaper does."""
    world.run("create", STEP, "--recipe", "tiny")
    child = world.watch()
    until(lambda: world.launcher() != NEVER, "the take-over")
    world.server.change(lambda memory: memory.pod(0))
    time.sleep(0.5)
    child.send_signal(number)
    text, _ = child.communicate(timeout=120)  # 0.4 s of a processor, most of it Python's own end
    assert child.returncode == code, text
    assert "qwenvl job stop" in text and "Traceback" not in text
    (job,) = world.jobs()
    assert (job["metadata"]["annotations"][names.RENEWED] == NEVER) is (want == NEVER)


def test_stop_removes_the_job_and_says_when_there_is_none(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.run("create", STEP, "--recipe", "tiny")
    assert world.run("stop") == 0 and world.jobs() == []
    assert world.run("stop") == 0
    assert "nothing was under way" in capsys.readouterr().out
    assert main(["job", "stop", "--cluster", world.cluster, "--out", world.out]) == 0  # every step of the output


def test_a_trainjob_is_rendered_created_read_and_stopped_where_the_cluster_file_chooses_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(world.cluster).read_text(encoding="utf-8")
    Path(world.cluster).write_text(f"{text}\njob_kind: TrainJob\n")
    assert world.run("render", "init", "--recipe", "tiny") == 0
    objects = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [one["kind"] for one in objects] == ["ConfigMap", "TrainingRuntime", "TrainJob"]
    assert world.run("create", "init", "--recipe", "tiny") == 0
    made = dict(world.server.memory.objects.keys())
    assert made["trainjobs"] == made["trainingruntimes"] == objects[2]["metadata"]["name"]
    world.server.log = "2026-11-22T00:00:00Z from rank 0\n"
    world.server.change(lambda memory: Trainer(memory).pods(0))
    assert world.run("logs", "init") == 0 and "from rank 0" in capsys.readouterr().out
    assert world.run("stop", "init") == 0
    left = {plural for plural, _ in world.server.memory.objects}
    assert left == {"pods"}, "which the JobSet owned"


def test_logs_come_from_the_pod_and_else_from_storage_which_is_said(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.run("create", STEP, "--recipe", "tiny")
    world.server.log = "2026-11-22T00:00:00Z from the pod\n"
    world.server.change(lambda memory: memory.pod(0))
    assert world.run("logs") == 0
    assert "from the pod" in capsys.readouterr().out
    stage = f"{world.out}/sft/attempts/0002"
    storage.write_bytes(f"{stage}/rank3.log", b"from storage\n")
    storage.write_bytes(f"{stage}/end-w-0.json", a_record(1, rank=3, attempt=2).model_dump_json().encode())
    assert world.run("logs", "sft") == 0
    text = capsys.readouterr().out
    assert "come from storage" in text and "last lines of rank 3, attempt 2" in text and "from storage\n" in text
    assert world.run("logs", "sft", "--attempt", "1") == 2
    assert "neither a pod nor stored lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["create", "sftt", "--recipe", "tiny"], "the recipe has no such step"),
        (["create", STEP, "--set", "seed=1"], "give --recipe as well"),
        (["watch", "sft", "--recipe", "tinny"], "did you mean tiny?"),
    ],
)
def test_wrong_words_are_one_message_and_create_nothing(
    world: World, words: list[str], want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run(words[0], words[1], *words[2:]) == 2
    assert want in capsys.readouterr().err and world.jobs() == []

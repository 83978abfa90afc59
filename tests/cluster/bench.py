"""What a test has of the cluster: a namespace with what the chart installs, an output in S3, launchers.

A launcher runs in a thread of the test with the service account's token, or as a process of its own that can be killed
(launching.py); both run k8s/launcher.py as it is. `Bench` reads and disturbs the cluster as its administrator.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from k8s import names
from k8s.cluster import Cluster
from k8s.tools import tool
from tests.cluster.launching import commits, launch
from trainer import storage

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "qwenvl-train"
SECRET = "qwenvl-train-s3"
Json = dict[str, Any]


@dataclass
class Launching:
    """A launcher at work in a thread: what it said, when, and how it ended."""

    thread: threading.Thread
    said: list[tuple[float, str]] = field(default_factory=list)
    error: BaseException | None = None

    def lines(self) -> list[str]:
        return [line for _, line in self.said]

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    def when(self, text: str) -> float:
        """Monotonic time of the first line with this text."""
        return next(moment for moment, line in self.said if text in line)

    def ended(self, limit_s: float = 180.0) -> BaseException | None:
        """Wait for its end; the error that it raised, None when the step is done."""
        self.thread.join(limit_s)
        assert not self.thread.is_alive(), "the launcher did not end:\n" + "\n".join(self.lines()[-30:])
        return self.error

    def done(self, limit_s: float = 180.0) -> None:
        error = self.ended(limit_s)
        assert error is None, f"{error}\n" + "\n".join(self.lines()[-40:])


@dataclass(frozen=True)
class Bench:
    """One test's namespace."""

    namespace: str
    cluster: Cluster
    out: str
    admin: Path
    launcher: Path
    """Kubeconfigs: the administrator's and the launcher's."""
    launchings: list[Launching] = field(default_factory=list)

    # ------------------------------------------------------------ the administrator

    def kubectl(self, *arguments: object, text: str | None = None, check: bool = True) -> str:
        command = [str(tool("kubectl")), "--kubeconfig", str(self.admin), "-n", self.namespace, *map(str, arguments)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def items(self, kind: str) -> list[Json]:
        return json.loads(self.kubectl("get", kind, "-o", "json"))["items"]

    def apply(self, *objects: Json) -> None:
        self.kubectl("apply", "-f", "-", text=yaml.safe_dump_all(objects))

    def jobs(self) -> list[Json]:
        """PyTorchJobs, oldest attempt first."""
        return sorted(self.items("pytorchjobs"), key=lambda job: int(job["metadata"]["labels"][names.ATTEMPT]))

    def pods(self, attempt: int = 1, step: str = "sft") -> list[Json]:
        labels = f"{names.ATTEMPT}={attempt},{names.STEP}={step}"
        return json.loads(self.kubectl("get", "pods", "-l", labels, "-o", "json"))["items"]

    def until(self, what: str, ready: Callable[[], Any], limit_s: float = 90.0) -> Any:
        """Poll until `ready` gives something true, which is returned; not for long once every launcher has given up."""
        end = time.monotonic() + limit_s
        at_work = any(one.error is None for one in self.launchings)
        while not (found := ready()):
            if at_work and all(one.error is not None for one in self.launchings):
                at_work, end = False, min(end, time.monotonic() + 3)
            assert time.monotonic() < end, f"{what} did not come in {limit_s:.0f} s\n{self.picture()}"
            time.sleep(0.25)
        return found

    def running(self, attempt: int = 1, count: int = 2, step: str = "sft") -> list[Json]:
        """The pods of an attempt, once all of them run."""

        def look() -> list[Json] | None:
            pods = self.pods(attempt, step)
            return pods if sum(pod["status"].get("phase") == "Running" for pod in pods) == count else None

        return self.until(f"{count} running pods of attempt {attempt}", look)

    def picture(self) -> str:
        """For people, when a test fails."""
        told = [line for one in self.launchings for line in [*one.lines()[-20:], repr(one.error)]]
        state = self.kubectl("get", "pytorchjobs,jobs,pods,workloads", "-o", "wide", check=False)
        events = self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)
        return "\n".join(["-- launchers", *told, "-- state", state, "-- events", events])

    # ------------------------------------------------------------ the launcher

    def launch(self, payload: Json, **options: Any) -> Launching:
        """A stage of two workers that runs payload.py; see launching.launch for the options."""
        return self.start(lambda say: launch(self.spec(payload, **options), say))

    def spec(self, payload: Json, **options: Any) -> Json:
        return {
            "cluster": self.cluster.model_dump(mode="json"),
            "out": self.out,
            "kubeconfig": str(self.launcher),
            "payload": payload,
            **options,
        }

    def start(self, work: Callable[[Callable[[str], None]], None]) -> Launching:
        launching: Launching

        def run() -> None:
            try:
                work(lambda line: launching.said.append((time.monotonic(), line)))
            except BaseException as error:
                launching.error = error

        launching = Launching(threading.Thread(target=run, name=f"launcher-{self.namespace}", daemon=True))
        self.launchings.append(launching)
        launching.thread.start()
        return launching

    @contextlib.contextmanager
    def process(self, payload: Json, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """The launcher as a process, to be killed."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as log:
            json.dump(self.spec(payload, **options), file)
            file.flush()
            command = [sys.executable, "-m", "tests.cluster.launching", file.name]
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True, env=dict(os.environ))
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    # ------------------------------------------------------------ the output

    def result(self, stage: str = "sft") -> Json:
        return storage.read_json(storage.join(self.out, stage, "payload", "done.json"))

    def commits(self, stage: str = "sft") -> list[int]:
        return commits(storage.join(self.out, stage))


def chart(namespace: str) -> list[Json]:
    """Role, binding and service accounts as the chart installs them."""
    command = [str(tool("helm")), "template", "qwenvl", str(CHART), "--namespace", namespace]
    command += ["--show-only", "templates/rbac.yaml", "--show-only", "templates/serviceaccounts.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [one for one in yaml.safe_load_all(done.stdout) if one]

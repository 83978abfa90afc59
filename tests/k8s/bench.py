"""A launcher on an API in memory, with a clock that only its waiting moves: what the tests of its loop stand on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from k8s import names
from k8s.cluster import Cluster, load_cluster
from k8s.decide import Progress
from k8s.loop import Launcher
from k8s.names import Run
from k8s.pytorchjob import render_stage
from k8s.tasks import Task
from tests.k8s.memory import MemoryApi, MemoryView, ended
from trainer.heartbeat import Termination
from trainer.resolve import load_recipe

OUT = "s3://bucket/out"
RECIPE = load_recipe("tiny")


class Bench:
    """A launcher with a clock that only its waiting moves, and what it said."""

    def __init__(self, *, run_id: str = "run-1", cluster: Cluster | None = None, api: MemoryApi | None = None):
        self.api = api or MemoryApi()
        self.view = MemoryView(self.api, self.sleep)
        self.done = False
        self.progress: Progress | Exception = Progress()
        self.now = 0.0
        self.said: list[str] = []
        self.run_id, self.cluster = run_id, cluster or load_cluster("test")

    def task(self, **more: Any) -> Task:
        cluster = self.cluster
        fields = {
            "step": "sft",
            "run": Run(out=OUT, id=self.run_id, stage_digest="d"),
            "render": lambda run: render_stage(RECIPE, "sft", cluster, run),
            "finished": lambda: self.done,
            "progress": lambda attempt: self.look(),
        }
        return Task(**(fields | more))

    def look(self) -> Progress:
        if isinstance(self.progress, Exception):
            raise self.progress
        return self.progress

    def launch(self, **more: Any) -> None:
        self.launcher(**more).launch()

    def launcher(self, **more: Any) -> Launcher:
        task = self.task(**more)
        self.view.selected = {names.IDENTITY: task.run.identity, names.STEP: task.step}
        return Launcher(
            self.api,
            self.cluster,
            task,
            say=self.said.append,
            clock=lambda: self.now,
            sleep=self.sleep,
            now=lambda: 1_000_000 + self.now,
            view=self.view,
            follow=False,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.said)

    def finish(self) -> None:
        self.api.condition("Succeeded")
        self.done = True

    def fail(self, code: int = 139, message: str = "") -> None:
        self.api.pod(0, **ended(code, message))
        self.api.condition("Failed")

    def jobs(self) -> list[str]:
        return [name for plural, name in self.api.objects if plural in ("pytorchjobs", "jobs")]

    def created(self) -> int:
        return sum(call.startswith("create PyTorchJob") for call in self.api.calls)


def a_record(code: int, rank: int = 0, **more: Any) -> Termination:
    return Termination(**({"code": code, "decision": "", "rank": rank, "codes": {rank: code}} | more))


def script(bench: Bench, *acts: Callable[[], None]) -> None:
    """One act each time that the launcher waits; the last one again and again."""
    left = list(acts)

    def act() -> None:
        now = left.pop(0) if len(left) > 1 else left[0]
        now()

    bench.view.act = act


def each_look(bench: Bench, act: Callable[[int], None]) -> None:
    """One act each time that the launcher waits, with how often it has."""
    looks = itertools.count(1)
    bench.view.act = lambda: act(next(looks))


def nothing() -> None:
    pass


def another(bench: Bench, run_id: str) -> Bench:
    return Bench(run_id=run_id, cluster=bench.cluster, api=bench.api)


def under_way(**more: Any) -> Bench:
    """A job that a launcher created before it was lost."""
    bench = Bench(**more)
    launcher = bench.launcher()
    launcher.attempts.create(launcher._rendered(1))
    return bench

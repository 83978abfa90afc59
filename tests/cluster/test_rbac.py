"""The chart's Role is exactly what the launcher uses, by the API server's audit log: no 403, no verb too many."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from k8s.cleanup import remove_owned
from k8s.client import VERBS
from k8s.loop import Launcher
from k8s.names import Run
from k8s.tasks import task_of
from tests.cluster.bench import Bench, Json, Launching, chart
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from trainer.resolve import load_recipe

pytestmark = pytest.mark.cluster


def requests_of(bench: Bench) -> Iterator[tuple[str, str, int]]:
    """(resource, verb, status) of all that the launcher's account asked in this namespace."""
    for event in bench.audited():
        what = event.get("objectRef", {})
        resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
        yield f"{what.get('apiGroup', '')}/{resource}", event["verb"], event["responseStatus"]["code"]


def role_of(bench: Bench, *kinds: str) -> Json:
    """The chart's Role; kinds: of its values rbac.kinds."""
    (role,) = [one for one in chart(bench.namespace, *kinds) if one["kind"] == "Role"]
    return role


def granted(role: Json) -> set[tuple[str, str]]:
    return {
        (f"{group}/{resource}", verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_launcher_uses_every_verb_that_it_is_granted_and_no_other(bench: Bench, reached: Reached) -> None:
    if not reached.own:
        pytest.skip("the audit log of KUBECONFIG's API server cannot be read")
    # Two attempts share a ConfigMap; then another run takes the job over; then it is removed.
    payload = {"steps": 1000, "ends": {"1": {"1": [1, "kill"]}}}
    first = bench.launch(payload)
    bench.running(attempt=2)
    bench.until("a line of the log", lambda: first.heard("step 1"))
    second = bench.launch(payload, run_id="run-2")
    bench.until("the adoption", lambda: second.heard("adopted"))
    prepare = _prepare(bench, "run-1")
    bench.until("the Job", lambda: prepare.heard("created"))
    again = _prepare(bench, "run-2")
    bench.until("its adoption", lambda: again.heard("adopted"))
    api = api_of(str(bench.launcher), bench.namespace)
    assert len(remove_owned(api, out=bench.out, owner="run-2")) == 2
    assert all(one.ended(60) is not None for one in (first, second, prepare, again))
    time.sleep(1)  # the audit log is written in batches
    used = {(resource, verb) for resource, verb, _ in requests_of(bench)}
    refused = [entry for entry in requests_of(bench) if entry[2] in (401, 403)]
    assert refused == []
    ours = granted(role_of(bench))
    assert used == ours, "used and not granted, or granted and not used"
    assert {resource for resource, _ in ours} == set(VERBS)


def _prepare(bench: Bench, run_id: str) -> Launching:
    """A data preparation, which is a Job."""
    recipe = load_recipe("tiny_smoke")
    run = Run(out=bench.out, id=run_id)
    task = task_of("prepare-data", recipe, bench.cluster, run)
    api = api_of(str(bench.launcher), bench.namespace)
    return bench.start(lambda say: Launcher(api, bench.cluster, task, say=say).launch())


def test_without_the_role_the_launcher_is_told_what_it_may_not_do(bench: Bench) -> None:
    bench.kubectl("delete", "rolebinding", "qwenvl-train-launcher")
    error = bench.launch({"steps": 1}).ended(60)
    assert error is not None and "403" in str(error) and "service account" in str(error)

"""Stages as TrainJobs of the real Kubeflow Trainer v2, which makes JobSets of them; the real JobSet runs those.

Both operators are built and started by the first of these tests (extras.py), their webhooks as shipped. What a rank
does is payload.py, as in the rows with PyTorchJobs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from k8s import names
from k8s.cleanup import reap, remove_owned
from k8s.client import RUNTIMES, TRAIN_JOBS, Json, Kind
from k8s.kinds import kinds_of
from tests.cluster import extras
from tests.cluster.bench import OF_THE_NAMESPACE, PATIENCE, Bench
from tests.cluster.conftest import Reached
from tests.cluster.launching import api_of
from tests.cluster.test_rbac import granted, requests_of, role_of
from trainer.errors import ClusterError

pytestmark = [pytest.mark.cluster, pytest.mark.full]

ON: dict[str, Any] = {"step_s": 0.5, "commit_every": 2}
"""Until it is told to end."""
GROUP = "trainer.kubeflow.org/"
JOBSETS = Kind("jobset.x-k8s.io/v1alpha2", "jobsets")


@pytest.fixture
def train(bench: Bench, reached: Reached) -> Iterator[Bench]:
    """A namespace whose launcher may create TrainJobs, and where nothing of them is left."""
    if reached.own:
        extras.start(extras.JOBSET, extras.TRAINER)
    elif "trainjobs.trainer.kubeflow.org" not in bench.kubectl("get", "crd", "-o", "name"):
        pytest.skip("KUBECONFIG's cluster has no Kubeflow Trainer v2")
    bench.apply(role_of(bench, "trainjobs"))
    made = bench.with_cluster({"job_kind": "TrainJob"})
    yield made
    for job in trainjobs(made):
        made.api.delete(TRAIN_JOBS, job["metadata"]["name"], uid=job["metadata"]["uid"])
    made.until("the end of all TrainJobs", lambda: not left_of(made))


def trainjobs(train: Bench) -> list[Json]:
    """Oldest attempt first."""
    found = train.api.list(TRAIN_JOBS, {})
    return sorted(found, key=lambda job: int(job["metadata"]["labels"][names.ATTEMPT]))


def left_of(train: Bench) -> list[Json]:
    return [one for kind in (TRAIN_JOBS, RUNTIMES, JOBSETS) for one in train.api.list(kind, {})]


def test_a_trainjob_survives_its_launcher_and_goes_with_all_that_was_made_of_it(train: Bench) -> None:
    before = train.objects()
    with train.process({**ON, "gloo": True}) as process:
        pods = train.running()
        train.until("a commit", train.commits)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2, "one pod a node"
    uid = trainjobs(train)[0]["metadata"]["uid"]
    again = train.launch({**ON, "gloo": True}, run_id="run-2")
    train.until("the adoption", lambda: again.heard("adopted"))
    train.let_end()
    again.done()
    (job,) = trainjobs(train)
    assert job["metadata"]["uid"] == uid and job["metadata"]["annotations"][names.OWNER] == "run-2"
    assert train.result() == {"attempt": "1", "from": 0, "reduced": 3.0}
    assert again.heard("step 1"), "rank 0's log"

    api = api_of(str(train.launcher), train.namespace)
    train.until("its end", lambda: "Complete" in str(trainjobs(train)[0].get("status", {}).get("conditions")))
    looks = [list(reap(api, after=1, keep=1, kinds=kinds_of(train.cluster))) for _ in range(2)]
    assert looks[0] == [] and looks[1][0].endswith("ended 1 looks ago"), looks
    train.until("nothing that is left", lambda: not left_of(train) and not train.objects() - before - OF_THE_NAMESPACE)


def test_a_rank_that_is_killed_costs_an_attempt_which_goes_on_from_the_last_commit(train: Bench) -> None:
    train.launch({"steps": 6, "commit_every": 2, "ends": {"1": {"1": [3, "kill"]}}}).done()
    assert train.result() == {"attempt": "2", "from": 2, "reduced": 3.0}
    assert [job["metadata"]["name"][-3:] for job in trainjobs(train)] == ["-a1", "-a2"]


def test_an_error_of_one_rank_that_trying_again_cannot_mend_ends_the_stage(train: Bench) -> None:
    error = train.launch({"steps": 6, "commit_every": 2, "ends": {"1": {"1": [3, 65]}}}).ended()
    assert isinstance(error, ClusterError) and error.code == 65
    assert "told to end with 65" in str(error) and len(trainjobs(train)) == 1


def test_the_runtime_of_a_dead_launcher_is_replaced_and_a_terminated_run_takes_its_trainjob_with_it(
    train: Bench, reached: Reached
) -> None:
    """All by the chart's Role: every verb that it grants for these kinds is used."""
    before = train.objects()
    with train.process(ON, die="before create") as process:
        assert process.wait(60 * PATIENCE) == -signal.SIGKILL
    assert trainjobs(train) == [] and len(left_of(train)) == 1
    first = train.launch(ON)
    train.running()
    second = train.launch(ON, run_id="run-2")
    train.until("the adoption", lambda: second.heard("adopted"))
    api, kinds = api_of(str(train.launcher), train.namespace), kinds_of(train.cluster)
    assert remove_owned(api, out=train.out, owner="run-1", kinds=kinds) == []
    assert len(remove_owned(api, out=train.out, owner="run-2", kinds=kinds)) == 1
    assert first.ended(60) is not None and "the job is gone" in str(second.ended(60))
    train.until("nothing that is left", lambda: not left_of(train) and not train.objects() - before - OF_THE_NAMESPACE)
    if reached.own:
        asked = list(requests_of(train))
        assert [one for one in asked if one[2] in (401, 403)] == []
        ours = {one for one in granted(role_of(train, "trainjobs")) if one[0].startswith(GROUP)}
        used = {(resource, verb) for resource, verb, _ in asked if resource.startswith(GROUP)}
        assert used == ours, "used and not granted, or granted and not used"

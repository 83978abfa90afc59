"""A step that was given up, or suspended by a person: a pipeline leaves it so, people and other runs do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from k8s import names
from k8s.loop import Launcher
from k8s.record import GIVEN_UP_S, Records
from tests.k8s.bench import Bench, a_record, another, script, under_way
from tests.k8s.test_attempts import remove_jobs
from trainer.errors import ClusterError


def test_a_step_that_was_given_up_may_be_tried_again_under_a_new_number(tmp_path: Path) -> None:
    first = Bench()
    script(first, lambda: first.fail(65, a_record(65).model_dump_json()))
    with pytest.raises(ClusterError):
        first.launch(records=str(tmp_path))
    remove_jobs(first)
    again = another(first, "run-2")
    script(again, again.finish)
    again.launch(records=str(tmp_path))
    assert again.jobs()[0].endswith("-a2")
    stored = Records(str(tmp_path), "sft", first.task().run.identity, say=print).read()
    assert [(one.end and one.end.decision, one.closed, one.run) for one in stored] == [
        ("permanent", True, "run-1"),
        ("done", True, "run-2"),
    ]


def retried(bench: Bench, records: Path) -> Launcher:
    """As a pipeline starts it again after a failure."""
    launcher = bench.launcher(records=str(records))
    launcher.retried = True
    return launcher


@pytest.mark.parametrize("given_up_by", ["its code", "a person who removed the job"])
def test_a_pipeline_s_own_retry_does_not_train_again_what_was_given_up(given_up_by: str, tmp_path: Path) -> None:
    first = Bench()
    code = 65 if given_up_by == "its code" else ClusterError.code
    script(first, lambda: first.fail(65, a_record(65).model_dump_json()) if code == 65 else remove_jobs(first))
    with pytest.raises(ClusterError) as error:
        retried(first, tmp_path).launch()
    assert error.value.code == code
    again = another(first, "run-1")
    again.now = first.now + 60
    with pytest.raises(ClusterError, match="gave the step up a moment ago") as error:
        retried(again, tmp_path).launch()
    assert error.value.code == code and again.created() == 1, "none was created by the retry"
    assert "qwenvl job watch now" in str(error.value)
    later = another(first, "run-1")
    later.now = first.now + GIVEN_UP_S + 1
    remove_jobs(later)
    script(later, later.finish)
    retried(later, tmp_path).launch()
    assert later.created() == 2, "a person's retry, later"


@pytest.mark.parametrize("who", ["another run", "a person, at once"])
def test_others_may_try_at_once_what_a_run_gave_up(who: str, tmp_path: Path) -> None:
    first = Bench()
    script(first, lambda: first.fail(65, a_record(65).model_dump_json()))
    with pytest.raises(ClusterError):
        retried(first, tmp_path).launch()
    remove_jobs(first)
    again = another(first, "run-2" if who == "another run" else "run-1")
    again.now = first.now + 60
    script(again, again.finish)
    launcher = retried(again, tmp_path)
    launcher.retried = who == "another run"
    launcher.launch()
    assert again.created() == 2


def test_a_pipeline_s_own_retry_leaves_what_a_person_suspended(tmp_path: Path) -> None:
    bench = under_way()
    job = bench.api.job()
    job["metadata"]["annotations"][names.SUSPENDED] = "yes"
    job["spec"]["runPolicy"]["suspend"] = True
    with pytest.raises(ClusterError, match="suspended by a person"):
        retried(another(bench, "run-1"), tmp_path).launch()
    assert bench.api.job()["spec"]["runPolicy"]["suspend"] is True
    person = another(bench, "run-1")
    script(person, person.finish)
    person.launch(records=str(tmp_path))
    assert bench.api.job()["spec"]["runPolicy"]["suspend"] is False

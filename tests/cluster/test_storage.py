"""S3 goes away, or its clock and others are wrong: the stage goes on, or says what it waits for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import place, services
from tests.cluster.bench import PATIENCE, Bench
from tests.cluster.between import Relay, relay
from tests.cluster.conftest import Reached
from trainer.errors import StorageError

pytestmark = pytest.mark.cluster

HOUR = 3600.0
ON = {"step_s": 0.5, "commit_every": 2}
"""Until it is told to end."""


@pytest.fixture
def between(reached: Reached) -> Iterator[Relay]:
    """The way of this test's pods and launcher to the S3 server."""
    if not reached.own:
        pytest.skip("the way to TEST_S3_ENDPOINT is not ours to disturb")
    with relay(place.GATEWAY, services.S3_PORT) as made:
        yield made


@pytest.fixture
def relayed(bench: Bench, between: Relay) -> Bench:
    """Everything of this test but the test itself reaches S3 through `between`."""
    return bench.with_cluster({"storage": {"endpoint": f"http://{between.address}"}})


def test_storage_that_is_away_when_a_result_is_verified_is_asked_again(bench: Bench, between: Relay) -> None:
    with bench.process(ON, s3=between.address) as process:
        bench.until("step 2", lambda: bench.heard("step 2\n"))
        between.go_down()
        bench.let_end()
        bench.until("the launcher to wait", lambda: bench.heard("storage does not answer, asked again"), 180)
        assert process.poll() is None and between.broken > 0
        between.down = False
        assert process.wait(120 * PATIENCE) == 0, bench.told.read_text()
    assert bench.result() == {"attempt": "1", "from": 0, "reduced": 3.0}


@pytest.mark.control
def test_storage_that_stays_away_ends_the_launcher_and_the_result_counts_later(bench: Bench, between: Relay) -> None:
    with bench.limited(storage_s=3).process(ON, s3=between.address) as process:
        bench.until("step 2", lambda: bench.heard("step 2\n"))
        between.go_down()
        bench.let_end()
        assert process.wait(240 * PATIENCE) == StorageError.code, bench.told.read_text()
    later = bench.launch(ON, run_id="run-2")
    later.done(60)
    assert later.heard("done already") and len(bench.jobs()) == 1


def test_ranks_that_lose_storage_are_started_again_from_the_last_commit(relayed: Bench, between: Relay) -> None:
    launching = relayed.launch(ON)
    relayed.until("a commit", lambda: 6 in relayed.commits())
    between.go_down()
    relayed.until("the end of the attempt", lambda: launching.heard("attempt 1 ended"), 180)
    between.down = False
    relayed.let_end()
    launching.done()
    result = relayed.result()
    assert int(result["attempt"]) > 1 and result["from"] >= 6


def test_clocks_that_differ_lead_to_no_other_decision(relayed: Bench, between: Relay) -> None:
    """Pods ten minutes ahead of each other, S3 an hour behind, the launcher that takes over in yesterday."""
    between.shift_s = -HOUR
    clocks = {"worker-0": 600.0, "worker-1": 1200.0}
    payload = {**ON, "ends": {"1": {"1": [5, "kill"]}}}
    with relayed.process(payload, clocks=clocks, s3=between.address):
        relayed.until("a commit of the second attempt", lambda: 6 in relayed.commits(), 180)
    with relayed.process(payload, clocks=clocks, s3=between.address, run_id="run-2", ahead_s=-86400) as process:
        relayed.until("the adoption", lambda: relayed.heard("adopted"))
        relayed.let_end()
        assert process.wait(180 * PATIENCE) == 0, relayed.told.read_text()
    assert relayed.result() == {"attempt": "2", "from": 4, "reduced": 3.0}
    assert between.shifted > 0

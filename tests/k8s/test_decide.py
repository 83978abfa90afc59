"""The decisions: what a job's state means, and what to do after an attempt. Tables, no cluster."""

from __future__ import annotations

from typing import Any

import pytest

from k8s import decide
from k8s.cluster import Limits
from k8s.decide import Again, Ended, NodeBeat, Progress, Stop, Trail, Wait
from k8s.seen import Seen, Worker
from trainer.heartbeat import Termination

LIMITS = Limits(
    queue_s=100,
    schedule_s=50,
    start_s=30,
    silence_s=20,
    deadline_s=1000,
    attempts=4,
    without_progress=3,
    backoff_s=10,
    backoff_max_s=35,
)


def a_worker(index: int = 0, **more: Any) -> Worker:
    fields: dict[str, Any] = {"name": f"w-{index}", "uid": f"u-{index}", "node": f"n-{index}", "phase": "Running"}
    return Worker(**(fields | more))


def a_termination(code: int, **more: Any) -> Termination:
    return Termination(**({"code": code, "decision": "", "rank": 0, "codes": {0: code}} | more))


def a_failed(*workers: Worker) -> Seen:
    return Seen(exists=True, outcome="failed", message="job failed", workers=workers, wanted=len(workers))


def an_end(decision: Any = "retry", code: int = 139, committed: int | None = None, **more: Any) -> Ended:
    return Ended(decision, code, more.pop("cause", "x"), committed_step=committed, **more)


NOTHING = Progress()


def judge(seen: Seen, progress: Progress = NOTHING, trail: Trail | None = None, now: float = 0.0) -> Wait | Ended:
    return decide.judge(seen, trail or Trail(started=0.0), progress, LIMITS, now)


# ---------------------------------------------------------------- how an attempt ended


@pytest.mark.parametrize(
    ("workers", "want"),
    [
        # one rank's permanent code wins over every other
        ([a_worker(0, termination=a_termination(65)), a_worker(1, code=144)], ("permanent", 65)),
        ([a_worker(0, code=137), a_worker(1, code=2)], ("permanent", 2)),
        # a lost peer never hides why
        ([a_worker(0, code=144), a_worker(1, code=139)], ("retry", 139)),
        ([a_worker(0, code=144), a_worker(1, code=1)], ("retry-once", 1)),
        ([a_worker(0, code=144), a_worker(1, code=145)], ("retry", 144)),
        # 143 needs proof: a commit of this attempt, or the platform's word
        ([a_worker(0, termination=a_termination(143, committed_step=7))], ("preempted", 143)),
        ([a_worker(0, code=143, disrupted=True)], ("preempted", 143)),
        ([a_worker(0, code=143)], ("retry", 143)),
        # the operator stops the others when one has failed: their 143 is no preemption, whatever they committed before
        ([a_worker(0, code=139), a_worker(1, termination=a_termination(143, committed_step=7))], ("retry", 139)),
        ([a_worker(0, code=1), a_worker(1, termination=a_termination(143, committed_step=7))], ("retry-once", 1)),
        ([a_worker(0, code=139, disrupted=True), a_worker(1, code=143)], ("preempted", 143)),
        # eviction shows as a kill
        ([a_worker(0, code=137, disrupted=True), a_worker(1, code=144)], ("preempted", 137)),
        ([a_worker(0, code=137), a_worker(1, code=144)], ("retry", 137)),
        # a data error stays one, also when a node is drained at the same time
        ([a_worker(0, code=65, disrupted=True)], ("permanent", 65)),
        ([a_worker(0, code=137, oom=True)], ("retry-once", 147)),
        # nothing left to read
        ([a_worker(0, phase="Failed")], ("retry", 1)),
        ([a_worker(0, phase="Failed", disrupted=True)], ("preempted", 143)),
    ],
)  # fmt: skip
def test_the_decision_is_over_all_ranks(workers: list[Worker], want: tuple[str, int]) -> None:
    state = judge(a_failed(*workers))
    assert isinstance(state, Ended)
    assert (state.decision, state.code) == want


def test_pods_that_vanished_at_the_end_are_remembered() -> None:
    trail = Trail(started=0.0)
    judge(Seen(exists=True, workers=(a_worker(0), a_worker(1, code=65, phase="Failed")), wanted=2), trail=trail)
    state = judge(a_failed(), trail=trail)
    assert isinstance(state, Ended) and (state.decision, state.code, state.node) == ("permanent", 65, "n-1")
    assert judge(a_failed()).code == 1  # type: ignore[union-attr]


def test_the_message_of_the_first_cause_is_told() -> None:
    state = judge(
        a_failed(
            a_worker(0, termination=a_termination(65, error="MediaError: cut off", step=12, rank=3, codes={3: 65}))
        )
    )
    assert isinstance(state, Ended)
    assert "rank 3 ended with 65" in state.cause and "MediaError: cut off" in state.cause and state.step == 12


@pytest.mark.parametrize(
    ("code", "want"), [(139, True), (135, True), (-11, True), (137, False), (1, False), (144, False)]
)
def test_only_faults_of_the_hardware_kind_make_a_node_suspect(code: int, want: bool) -> None:
    state = judge(a_failed(a_worker(0, code=code)))
    assert isinstance(state, Ended) and state.suspect is want


def test_a_deleted_job_means_stop() -> None:
    state = judge(Seen(exists=False))
    assert isinstance(state, Ended) and state.decision == "permanent"


def test_a_worker_that_was_replaced_ends_the_attempt() -> None:
    trail = Trail(started=0.0)
    assert isinstance(judge(Seen(exists=True, workers=(a_worker(0),)), trail=trail), Wait)
    state = judge(Seen(exists=True, workers=(a_worker(0, uid="other"),)), trail=trail)
    assert isinstance(state, Ended) and state.decision == "retry" and "replaced" in state.cause
    # the same pod again is not a replacement
    assert isinstance(judge(Seen(exists=True, workers=(a_worker(1),)), trail=trail), Wait)


def test_pods_that_come_back_after_a_suspension_are_no_replacement() -> None:
    trail = Trail(started=0.0)
    judge(Seen(exists=True, workers=(a_worker(0),)), trail=trail)
    assert judge(Seen(exists=True, suspended=True), trail=trail).kind == "queue"  # type: ignore[union-attr]
    assert isinstance(judge(Seen(exists=True, workers=(a_worker(0, uid="other"),)), trail=trail), Wait)


def test_a_resumption_between_two_looks_is_no_replacement_either() -> None:
    """Suspended and resumed while nobody looked: only the time of the condition tells."""
    for suspensions, want in (("12:00", Wait), ("", Ended)):
        trail = Trail(started=0.0)
        judge(Seen(exists=True, workers=(a_worker(0),)), trail=trail)
        again = Seen(exists=True, suspensions=suspensions, workers=(a_worker(0, uid="other"),))
        assert isinstance(judge(again, trail=trail), want)


def test_a_failed_job_waits_a_moment_for_what_the_other_ranks_say() -> None:
    trail = Trail(started=0.0)
    first, running = a_worker(0, code=139, phase="Failed"), a_worker(1)
    state = judge(a_failed(first, running), trail=trail, now=0.0)
    assert isinstance(state, Wait) and state.kind == "end"
    state = judge(a_failed(first, a_worker(1, code=65, phase="Failed")), trail=trail, now=2.0)
    assert isinstance(state, Ended) and state.code == 65
    # one that does not end in time is not waited for
    trail = Trail(started=0.0)
    judge(a_failed(first, running), trail=trail, now=0.0)
    state = judge(a_failed(first, running), trail=trail, now=6.0)
    assert isinstance(state, Ended) and state.code == 139


def test_a_record_in_storage_speaks_for_a_pod_that_went_unread() -> None:
    pod = a_worker(0, started="2026-11-22T10:00:00Z")
    end = a_termination(65, time="2026-11-22T11:00:00Z", error="MediaError: cut off")
    (worker,) = decide.with_records([pod], {"w-0": end})
    assert decide.cause_of_end([worker], "", NOTHING).code == 65
    # of the life before a suspension: not this container's
    (worker,) = decide.with_records([pod], {"w-0": end.model_copy(update={"time": "2026-11-22T09:00:00Z"})})
    assert worker.code is None
    # what the pod itself said comes first
    (worker,) = decide.with_records([a_worker(0, termination=a_termination(139))], {"w-0": end})
    assert decide.cause_of_end([worker], "", NOTHING).code == 139


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    ("seen", "kind", "limit", "want"),
    [
        (Seen(exists=True, suspended=True), "queue", 100, "permanent"),
        (Seen(exists=True, workers=(a_worker(0, node=None, unschedulable="0/9 nodes"),)), "schedule", 50, "permanent"),
        (Seen(exists=True, workers=(a_worker(0),), wanted=2), "schedule", 50, "permanent"),
        (Seen(exists=True, workers=(a_worker(0, phase="Pending", waiting="ContainerCreating"),)), "start", 30, "retry"),
        (Seen(exists=True, workers=(a_worker(0),)), "run", 20, "retry"),
    ],
)
def test_every_kind_of_waiting_has_its_own_time_out(seen: Seen, kind: str, limit: int, want: str) -> None:
    trail = Trail(started=0.0)
    for now in (0.0, limit - 1.0):
        state = judge(seen, trail=trail, now=now)
        assert isinstance(state, Wait) and state.kind == kind
    state = judge(seen, trail=trail, now=limit + 1.0)
    assert isinstance(state, Ended) and state.decision == want


def test_the_scheduler_and_the_kubelet_are_quoted() -> None:
    state = judge(
        Seen(exists=True, workers=(a_worker(0, node=None, unschedulable="0/9 nodes: Insufficient nvidia.com/gpu"),))
    )
    assert isinstance(state, Wait) and "Insufficient nvidia.com/gpu" in state.reason


def test_queue_and_volume_and_quota_are_quoted_from_events() -> None:
    state = judge(Seen(exists=True, suspended=True, queue_note="Pending: insufficient unused quota for gpu"))
    assert isinstance(state, Wait) and "insufficient unused quota" in state.reason
    state = judge(Seen(exists=True, note="FailedCreatePod: exceeded quota: gpus", wanted=2))
    assert isinstance(state, Wait) and "exceeded quota: gpus" in state.reason
    state = judge(Seen(exists=True, workers=(a_worker(0, phase="Pending", note='FailedMount: secret "x" not found'),)))
    assert isinstance(state, Wait) and 'secret "x" not found' in state.reason


@pytest.mark.parametrize("whose", ["a pod beside it", "an attempt before", "another image's", "nobody's"])
def test_an_image_that_another_pod_had_is_tried_again_elsewhere(whose: str) -> None:
    """By the same digest: then it is the node or the registry."""
    trail, image = Trail(started=0.0), "r.example/trainer@sha256:1"
    waits = a_worker(1, phase="Pending", waiting="ImagePullBackOff: i/o timeout", image=image)
    beside = a_worker(0, image=image, pulled=whose == "a pod beside it")
    trail.pulled = {"an attempt before": {image}, "another image's": {"r.example/trainer@sha256:2"}}.get(whose, set())
    state = judge(Seen(exists=True, workers=(beside, waits), wanted=2), trail=trail)
    assert isinstance(state, Ended) and "i/o timeout" in state.cause
    known = whose in ("a pod beside it", "an attempt before")
    assert (state.decision, state.suspect, state.node) == ("retry" if known else "permanent", known, "n-1")


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError", "InvalidImageName"])
def test_what_no_waiting_cures_fails_at_once(reason: str) -> None:
    state = judge(Seen(exists=True, workers=(a_worker(0, phase="Pending", waiting=f"{reason}: told why"),)))
    assert isinstance(state, Ended) and state.decision == "permanent" and "told why" in state.cause


@pytest.mark.parametrize("reason", ["CreateContainerError", "RunContainerError"])
def test_a_node_that_cannot_start_a_container_is_left_out(reason: str) -> None:
    text = f"{reason}: nvidia-container-cli: initialization error"
    state = judge(Seen(exists=True, workers=(a_worker(0, phase="Pending", waiting=text),)))
    assert isinstance(state, Ended) and (state.decision, state.suspect, state.node) == ("retry", True, "n-0")
    assert "nvidia-container-cli" in state.cause


def test_progress_of_any_kind_resets_the_silence() -> None:
    trail, seen = Trail(started=0.0), Seen(exists=True, workers=(a_worker(0),))
    for sequence, now in ((1, 0.0), (2, 15.0), (3, 30.0), (3, 45.0)):
        assert isinstance(judge(seen, Progress(sequence=sequence), trail, now), Wait)
    state = judge(seen, Progress(sequence=3), trail, 51.0)
    assert isinstance(state, Ended) and state.code == 145


def test_a_phase_that_says_its_own_limit_gets_it_and_a_margin() -> None:
    trail, seen, slow = (
        Trail(started=0.0),
        Seen(exists=True, workers=(a_worker(0),)),
        Progress(phase="load", limit_s=500),
    )
    judge(seen, slow, trail, 0.0)
    assert isinstance(judge(seen, slow, trail, 550.0), Wait)
    assert isinstance(judge(seen, slow, trail, 561.0), Ended)


def beats(**nodes: NodeBeat) -> Progress:
    return Progress(sequence=sum(beat.sequence for beat in nodes.values()), nodes=tuple(sorted(nodes.items())))


def two_pods() -> Seen:
    return Seen(exists=True, workers=(a_worker(0, name="a"), a_worker(1, name="b")), wanted=2)


def test_one_silent_node_among_others_is_a_hang_and_is_suspected() -> None:
    trail = Trail(started=0.0)
    for now in range(0, 21, 5):
        moving = beats(a=NodeBeat(now, now, limit_s=500), b=NodeBeat(1, 1, limit_s=500))
        assert isinstance(judge(two_pods(), moving, trail, float(now)), Wait)
    state = judge(two_pods(), beats(a=NodeBeat(99, 99, limit_s=500), b=NodeBeat(1, 1, limit_s=500)), trail, 21.0)
    assert isinstance(state, Ended)
    assert (state.code, state.node, state.suspect) == (145, "n-1", True) and "no heartbeat of b" in state.cause


def test_ranks_that_stand_still_behind_a_living_heartbeat_are_a_hang_after_their_phases_limit() -> None:
    trail = Trail(started=0.0)
    for now in range(0, 161, 5):
        state = judge(two_pods(), beats(a=NodeBeat(now, 7, phase="train", limit_s=100)), trail, float(now))
        assert isinstance(state, Wait)
    state = judge(two_pods(), beats(a=NodeBeat(999, 7, phase="train", limit_s=100)), trail, 161.0)
    assert isinstance(state, Ended) and state.code == 145 and "phase train (limit 160 s)" in state.cause


def test_ranks_that_get_on_within_one_step_are_no_hang() -> None:
    trail = Trail(started=0.0)
    for now in range(0, 2000, 10):
        state = judge(two_pods(), beats(a=NodeBeat(now, now, phase="evaluate", limit_s=100)), trail, float(now))
        assert isinstance(state, Wait)


def test_silence_counts_up_to_when_the_heartbeats_were_read() -> None:
    """A read that takes its time must not look like a node that stands still."""
    trail = Trail(started=0.0)
    still = beats(a=NodeBeat(1, 1, limit_s=500))
    for now in range(0, 600, 15):
        state = decide.judge(two_pods(), trail, still, LIMITS, float(now), heard_at=min(now, 10.0))
        assert isinstance(state, Wait)
    end = decide.judge(two_pods(), trail, still, LIMITS, 602.0, heard_at=31.0)
    assert isinstance(end, Ended) and "for 31 s" in end.cause and end.suspect


def test_the_first_look_that_is_not_there_yet_is_of_now() -> None:
    trail = Trail(started=0.0)
    decide.judge(two_pods(), trail, None, LIMITS, 5000.0, heard_at=0.0)
    old = beats(a=NodeBeat(1, 1, limit_s=500))
    assert isinstance(decide.judge(two_pods(), trail, old, LIMITS, 5005.0, heard_at=5004.0), Wait)


def test_silence_that_nobody_could_have_broken_is_not_counted() -> None:
    trail = Trail(started=0.0)
    still = beats(a=NodeBeat(1, 1, limit_s=500))
    judge(two_pods(), still, trail, 0.0)
    for now in range(15, 600, 15):
        assert isinstance(decide.judge(two_pods(), trail, None, LIMITS, float(now)), Wait)
    assert isinstance(judge(two_pods(), still, trail, 600.0), Wait)
    assert isinstance(judge(two_pods(), still, trail, 621.0), Ended)


# ---------------------------------------------------------------- what next


@pytest.mark.parametrize(
    ("history", "want"),
    [
        ([an_end("permanent", 65)], "would not help"),
        ([an_end(), an_end(), an_end()], "3 attempts in a row committed nothing"),
        ([an_end(committed=n) for n in (1, 2, 3, 4)], "all 4 attempts failed"),
        ([an_end("retry-once", 1, step=5), an_end("retry-once", 1, step=5)], "the same error came back"),
        ([an_end("retry-once", 147, step=5), an_end("retry-once", 147, step=9)], "the same error came back"),
        ([an_end("done", 0), an_end("done", 0)], "the same error came back"),
        ([an_end("preempted", 143)] * 10, "preempted 10 times in a row without a commit"),
        ([an_end("preempted", 143, committed=5)] + [an_end("preempted", 143, committed=5)] * 10, "without a commit"),
    ],
)
def test_a_step_stops_when_trying_again_would_not_help(history: list[Ended], want: str) -> None:
    action = decide.next_action(history, LIMITS, 0.0)
    assert isinstance(action, Stop) and want in str(action.error)


@pytest.mark.parametrize(
    "history",
    [
        [an_end()],
        [an_end(), an_end()],
        [an_end(committed=1), an_end(), an_end()],
        [an_end(committed=n) for n in (1, 2, 3)],
        [an_end("retry-once", 1, step=5)],
        [an_end("retry-once", 1, step=5), an_end("retry-once", 1, step=6)],
        [an_end("preempted", 143)] * 9,
        [an_end("preempted", 143, committed=n) for n in range(50)],
        [an_end(), an_end("preempted", 143), an_end()],
    ],
)
def test_a_step_goes_on_while_it_may_help(history: list[Ended]) -> None:
    assert isinstance(decide.next_action(history, LIMITS, 0.0), Again)


def test_the_error_carries_the_causes_exit_code_and_tells_every_attempt() -> None:
    action = decide.next_action([an_end(cause="first"), an_end("permanent", 65, cause="bad image")], LIMITS, 0.0)
    assert isinstance(action, Stop)
    assert action.error.code == 65
    assert "attempt 1: retry, first" in str(action.error) and "attempt 2: permanent, bad image" in str(action.error)


def test_pauses_double_up_to_a_limit_and_the_first_preemption_has_none() -> None:
    delays = [
        decide.next_action([an_end()] * n, LIMITS.model_copy(update={"attempts": 9, "without_progress": 9}), 0.0)
        for n in (1, 2, 3)
    ]
    assert [one.delay_s for one in delays if isinstance(one, Again)] == [20, 35, 35]
    after = [decide.next_action([an_end("preempted", 143)] * n, LIMITS, 0.0) for n in (1, 2, 3, 4)]
    assert [one.delay_s for one in after if isinstance(one, Again)] == [0, 10, 20, 35]
    moving = [an_end("preempted", 143, committed=n) for n in range(4)]
    action = decide.next_action(moving, LIMITS, 0.0)
    assert isinstance(action, Again) and action.delay_s == 0


def test_the_deadline_covers_all_attempts_together() -> None:
    assert isinstance(decide.next_action([an_end()], LIMITS, 1001.0), Stop)
    assert isinstance(decide.next_action([an_end()], LIMITS, 999.0), Again)


def test_at_most_two_suspected_nodes_are_left_out() -> None:
    history = [an_end(committed=n, node=f"n-{n}", suspect=True) for n in (1, 2, 3)] + [an_end(committed=4, node="fine")]
    action = decide.next_action(history, LIMITS.model_copy(update={"attempts": 9}), 0.0)
    assert isinstance(action, Again) and action.exclude_nodes == ("n-2", "n-3")

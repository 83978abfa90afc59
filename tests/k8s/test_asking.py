"""How long a launcher asks storage that does not answer, and one that refuses; its clock is moved by waiting alone."""

from __future__ import annotations

import itertools
import threading

import pytest

from k8s import asking
from k8s.asking import REFUSED_S, Answers
from k8s.decide import Progress
from tests.k8s.bench import Bench, each_look
from trainer.errors import StorageError
from trainer.storage import Refused

LIMIT_S = 1800.0
AWAY, REFUSED, ANSWER = StorageError("storage did not read"), Refused("storage refused to read"), "answer"


class Asked:
    """Storage that says the same for some seconds each: (until when, what)."""

    def __init__(self, *says: tuple[float, StorageError | str]):
        self.says, self.now, self.said, self.calls = says, 0.0, list[str](), 0
        self.answers = Answers(LIMIT_S, tell=self.said.append, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self) -> str:
        self.calls += 1
        says = next(what for until, what in self.says if self.now < until)
        if isinstance(says, StorageError):
            raise says
        return says


FOR_EVER = float("inf")


def test_storage_that_refuses_what_it_allowed_before_is_asked_for_a_minute_and_one_that_is_away_for_its_limit() -> None:
    for error, at_least, at_most in ((REFUSED, REFUSED_S, 2 * REFUSED_S), (AWAY, LIMIT_S, LIMIT_S + 60)):
        asked = Asked((1, ANSWER), (FOR_EVER, error))
        asked.answers.of(asked.call)
        asked.now = 1
        with pytest.raises(StorageError) as told:
            asked.answers.of(asked.call)
        assert told.value is error and at_least < asked.now - 1 < at_most
        assert len(asked.said) == 1 and error.what in asked.said[0]


def test_storage_that_refuses_from_the_beginning_is_a_mistake_that_is_told_at_once() -> None:
    asked = Asked((FOR_EVER, REFUSED))
    with pytest.raises(Refused):
        asked.answers.of(asked.call)
    assert asked.calls == 1 and asked.said == []


def test_a_refusal_after_a_long_time_away_has_its_minute_too_and_both_are_told() -> None:
    asked = Asked((1, ANSWER), (900, AWAY), (930, REFUSED), (FOR_EVER, ANSWER))
    asked.answers.of(asked.call)
    asked.now = 1
    assert asked.answers.of(asked.call) == ANSWER
    assert [line.partition(",")[0] for line in asked.said] == [
        "storage does not answer",
        "storage refuses what it allowed before",
    ]


def test_refusals_between_which_storage_is_away_are_not_one() -> None:
    asked = Asked((1, ANSWER), *itertools.chain(*[((t + 40, REFUSED), (t + 80, AWAY)) for t in range(0, 800, 80)]))
    asked.says = (*asked.says, (FOR_EVER, ANSWER))
    asked.answers.of(asked.call)
    asked.now = 1
    assert asked.answers.of(asked.call) == ANSWER


def test_looks_that_take_too_long_to_see_a_hang_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "WAIT_S", 0.01)
    bench, may_end = Bench(), threading.Event()

    def act(count: int) -> None:
        bench.api.pod(0)
        if count == 20:
            may_end.set()
            bench.finish()

    each_look(bench, act)
    bench.launch(progress=lambda attempt: Progress(sequence=int(may_end.wait(60))))
    assert sum("hangs are not seen meanwhile" in line for line in bench.said) == 1

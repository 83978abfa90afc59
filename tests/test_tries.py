"""Storage that refuses, hangs or fails for a while is asked by one layer, and no longer than the caller's patience."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from botocore import exceptions

from trainer import storage, tries
from trainer.errors import StorageError

CALLS: list[Callable[[], object]] = [
    lambda: storage.list_dir("s3://b/k"),
    lambda: storage.read_bytes("s3://b/k"),
    lambda: storage.read_bytes("s3://b/k", 0, 4),
    lambda: storage.write_bytes("s3://b/k", b"x"),
    lambda: storage.create_once("s3://b/k", b"x"),
]


class Listener:
    """Takes requests. Answers `answers` one after the other, then none."""

    def __init__(self, answers: list[bytes]):
        self.answers, self.requests = answers, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self.socket.accept()
            except OSError:
                return
            self._kept.append(one)
            self.requests += 1
            if self.answers:
                one.recv(65536)
                one.sendall(self.answers.pop(0))
                one.close()


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    made = Listener([])
    keys = {"AWS_ENDPOINT_URL": made.address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**keys, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tries, "S3_TRIES", 3)
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setitem(tries.S3_OPTIONS["config_kwargs"], "read_timeout", 0.3)
    tries.s3_class().clear_instance_cache()
    yield made
    tries.s3_class().clear_instance_cache()
    made.socket.close()


@pytest.mark.parametrize("call", CALLS)
def test_a_request_without_an_answer_is_tried_so_often_and_by_no_other_layer(
    hanging: Listener, call: Callable[[], object]
) -> None:
    with pytest.raises(StorageError, match="in 3 tries"):
        call()
    assert hanging.requests == 3


def test_with_the_tries_of_botocore_as_well_they_would_multiply(
    hanging: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tries.S3_OPTIONS["config_kwargs"], "retries", {"mode": "standard", "total_max_attempts": 2})
    with pytest.raises(StorageError):
        CALLS[0]()
    assert hanging.requests == 6


@pytest.mark.parametrize("call", [CALLS[0], CALLS[3]])
def test_patience_ends_a_call_that_hangs_also_in_other_threads(
    hanging: Listener, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tries.S3_OPTIONS["config_kwargs"], "read_timeout", 600)
    tries.s3_class()(**tries.S3_OPTIONS).connect()  # which takes its time on a busy machine
    began = time.monotonic()
    with tries.patience(600), tries.patience(1), ThreadPoolExecutor(1) as pool:
        for one in (pool.submit(copy_context().run, call).result, call):
            with pytest.raises(StorageError, match="in 1 try"):
                one()
    assert 1 <= hanging.requests <= 2 and time.monotonic() - began < 60


def test_patience_ends_what_is_refused_with_what_it_was_told(
    hanging: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging.socket.close()
    monkeypatch.setattr(tries, "S3_TRIES", 1_000_000)
    tries.s3_class()(**tries.S3_OPTIONS).connect()
    with tries.patience(1), pytest.raises(StorageError, match="Could not connect to the endpoint"):
        CALLS[0]()


def test_a_server_in_trouble_is_asked_again_and_what_is_refused_or_missing_is_not(hanging: Listener) -> None:
    def answer(status: str) -> bytes:
        return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()

    hanging.answers += [answer("503 Slow Down"), answer("500 Internal Error"), answer("200 OK")]
    storage.write_bytes("s3://b/k", b"x")
    assert hanging.requests == 3
    hanging.answers.append(answer("403 Forbidden"))
    with pytest.raises(StorageError, match="refused to write"):
        storage.write_bytes("s3://b/k", b"x")
    assert hanging.requests == 4
    hanging.answers.append(answer("404 Not Found"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://b/k", 0, 4)
    assert hanging.requests == 5


@pytest.mark.parametrize(
    ("status", "code", "want"),
    [
        (500, "InternalError", True),
        (503, "SlowDown", True),
        (429, "Throttling", True),
        (400, "RequestTimeout", True),
        (501, "NotImplemented", False),
        (412, "PreconditionFailed", False),
        (403, "AccessDenied", False),
        (400, "InvalidRequest", False),
    ],
)
def test_what_passes_is_told_from_what_does_not(status: int, code: str, want: bool) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert tries.passes(exceptions.ClientError(response, "PutObject")) is want  # type: ignore[arg-type]


def of_s3(status: str, code: str = "") -> bytes:
    """An answer with an error of S3; HEAD has no name of it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>" if code else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


def test_a_server_that_asks_for_fewer_requests_has_longer_pauses_than_one_in_trouble(
    hanging: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 100.0)
    monkeypatch.setattr(tries, "MAX_WAIT_S", 0.002)
    monkeypatch.setattr(tries, "MAX_THROTTLED_WAIT_S", 0.02)
    pauses, real = [], tries.pause_s
    monkeypatch.setattr(tries, "pause_s", lambda turn, **more: pauses.append(real(turn, **more)) or pauses[-1])
    for answer, throttled in [
        (of_s3("503 Slow Down", "SlowDown"), True),
        (of_s3("503 Service Unavailable", "ServiceUnavailable"), True),
        (of_s3("503 Slow Down"), True),
        (of_s3("429 Too Many Requests"), True),
        (of_s3("400 Bad Request", "ThrottlingException"), True),
        (of_s3("400 Bad Request", "RequestLimitExceeded"), True),
        (of_s3("500 Internal Error", "InternalError"), False),
        (of_s3("400 Bad Request", "RequestTimeout"), False),
    ]:
        hanging.answers += [answer] * 3
        pauses.clear()
        with pytest.raises(StorageError, match="in 3 tries"):
            storage.write_bytes("s3://b/k", b"x")
        of_requests = pauses[:3]  # the last is of the call, which is not tried again
        assert [0.01 <= pause <= 0.03 for pause in of_requests] == [throttled] * 3, answer
        assert [0.001 <= pause <= 0.003 for pause in of_requests] == [not throttled] * 3, answer


def test_what_no_time_mends_is_told_from_what_is_renewed(hanging: Listener) -> None:
    for answer, refused in [
        (of_s3("403 Forbidden", "AccessDenied"), True),
        (of_s3("403 Forbidden"), True),
        (of_s3("403 Forbidden", "SignatureDoesNotMatch"), True),
        (of_s3("403 Forbidden", "InvalidAccessKeyId"), True),
        (of_s3("404 Not Found", "NoSuchBucket"), True),
        (of_s3("400 Bad Request", "ExpiredToken"), False),
        (of_s3("403 Forbidden", "RequestTimeTooSkewed"), False),
    ]:
        for call in (CALLS[0], CALLS[2], CALLS[3]):
            hanging.answers[:] = [answer] * 5
            with pytest.raises(StorageError) as told:
                call()
            assert isinstance(told.value, storage.Refused) is refused, answer
            assert told.value.where and told.value.got and told.value.do and told.value.code == StorageError.code


@pytest.mark.parametrize(("throttled", "least_s", "most_s"), [(False, 20, 75), (True, 150, 330)])
def test_all_pauses_together_outlast_a_restart_and_minutes_of_a_limit(
    throttled: bool, least_s: float, most_s: float
) -> None:
    waits = sum(tries.pause_s(turn, throttled=throttled) for turn in range(1, tries.S3_TRIES))
    assert least_s < waits < most_s


def test_errors_without_an_answer_pass_and_those_of_the_caller_do_not() -> None:
    assert tries.passes(exceptions.EndpointConnectionError(endpoint_url="http://x"))
    assert tries.passes(exceptions.ReadTimeoutError(endpoint_url="http://x"))
    assert not tries.passes(exceptions.ParamValidationError(report="x"))
    assert not tries.passes(exceptions.NoCredentialsError())

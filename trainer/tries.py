"""How often storage is asked, and how long that may take: one layer that tries again, one limit that a caller may set.

    s3_class()           s3fs' file system, in which a request is tried S3_TRIES times by this file and by nothing below
    with patience(10):   every call of trainer/storage.py inside has ten seconds, all its tries together

Left to themselves botocore tries a request five times, s3fs that five times, and trainer/storage.py tried that five
times: a listing sent 125 requests to a server that took them and never answered, with a minute for each, and a write
waited for ever (2026-11-22). The request is what is worth trying again: of a large object in parts only the part that
failed is sent twice. A large object is read in parts too, but one that breaks off in the middle begins the read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

S3_TRIES = 15
"""Of one request. Ranks must outlast a server that restarts: 15 tries are 40 to 60 s where connections are refused, 4
minutes where the server asks for fewer requests, 6 where packets vanish, a quarter of an hour where requests are taken
and not answered; before that the rank's phase has ended (trainer/heartbeat.py)."""
REQUEST_S = 600.0
"""Of one try: aiohttp has no limit for sending, so 50 MB for a server that stopped reading would never end."""
FIRST_WAIT_S = 0.2
MAX_WAIT_S = 5.0
MAX_THROTTLED_WAIT_S = 30.0
"""Where the server asks for fewer requests. S3 takes a few thousand a second for a prefix and grows with the load in
minutes; a thousand ranks that start together must still be asking then. 14 pauses up to this one are 4 minutes."""

S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # other processes write beside us
    "skip_instance_cache": False,
    "config_kwargs": {
        # Several S3 servers refuse boto3's default trailing checksums; every byte is verified by sha256 here anyway.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "connect_timeout": 20,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    },
}
THROTTLED = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
}
"""Errors of S3 and of servers like it that ask for fewer requests, whatever their status."""
THROTTLED_STATUS = (429, 503)
"""Answers to HEAD have no error's name; Amazon's 503 asks for fewer requests under any name."""
PASSING = {"RequestTimeout", "XAmzContentSHA256Mismatch", *THROTTLED}
"""Errors of S3 that pass, whatever their status."""

_PATIENCE: ContextVar[float] = ContextVar("seconds of a call to storage", default=math.inf)
_UNTIL: ContextVar[float] = ContextVar("end of the call to storage", default=math.inf)
_NUM_TRIES: ContextVar[float] = ContextVar("tries of a call to storage", default=math.inf)


class GivenUp(Exception):
    """A request was tried as often as it may be; the cause is what the last try met."""


# ---------------------------------------------------------------- how long


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Each call to storage inside, in this thread, has so long with all its tries, then StorageError; the smallest of
    several counts. Folders of this machine are not bounded: the kernel decides when they answer."""
    token = _PATIENCE.set(min(seconds, _PATIENCE.get()))
    try:
        yield
    finally:
        _PATIENCE.reset(token)


@contextlib.contextmanager
def at_most(num_tries: int) -> Iterator[None]:
    """Each call to storage inside, in this thread, is tried so often; requests of S3 have their own tries."""
    token = _NUM_TRIES.set(min(num_tries, _NUM_TRIES.get()))
    try:
        yield
    finally:
        _NUM_TRIES.reset(token)


def may_try_again(turn: int) -> bool:
    """Whether `at_most` leaves another try after this one, counted from 1."""
    return turn < _NUM_TRIES.get()


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """From here on the patience of one call runs."""
    token = _UNTIL.set(min(_UNTIL.get(), time.monotonic() + _PATIENCE.get()))
    try:
        yield
    finally:
        _UNTIL.reset(token)


def limit(files: Any) -> dict[str, float]:
    """What a method of fsspec is told about the time that is left, where it can be told."""
    until = _UNTIL.get()
    if math.isinf(until) or not getattr(files, "async_impl", False):
        return {}
    return {"timeout": max(0.1, until - time.monotonic())}


def time_left(seconds: float = 0.0) -> bool:
    """Whether the call may go on after so many seconds more."""
    return time.monotonic() + seconds < _UNTIL.get()


def pause_s(turn: int, *, throttled: bool = False) -> float:
    """After try `turn`, counted from 1."""
    longest = MAX_THROTTLED_WAIT_S if throttled else MAX_WAIT_S
    return min(longest, FIRST_WAIT_S * 2 ** (turn - 1)) * (0.5 + random.random())


# ---------------------------------------------------------------- how often


@functools.cache
def s3_class() -> Any:
    """S3FileSystem whose requests are tried here. The time that is left reaches them: a coroutine that another thread
    starts has a copy of that thread's context."""
    from botocore.handlers import add_expect_header
    from fsspec.asyn import sync_wrapper
    from s3fs import S3FileSystem
    from s3fs.errors import translate_boto_error

    class Requests(S3FileSystem):
        async def _call_s3(self, method: str, *more: Any, **words: Any) -> Any:
            await self.set_session()
            client: Any = await self.get_s3(words.get("Bucket"))
            # aiohttp waits for `100 Continue` without a limit: every write to a server that hangs would never end.
            client.meta.events.unregister("before-call.s3", add_expect_header)
            call = getattr(client, method)
            words = self._get_s3_method_kwargs(call, *more, **words)
            # Tidying up after an upload that failed is not worth another round of tries.
            num_tries = 1 if method == "abort_multipart_upload" else S3_TRIES
            turn = 0
            while True:
                turn += 1
                try:
                    return await asyncio.wait_for(call(**words), REQUEST_S)
                except Exception as error:
                    told = translate_boto_error(error)
                    if not passes(error):
                        raise told from told.__cause__
                    pause = pause_s(turn, throttled=throttles(error))
                    if turn >= num_tries or not time_left(pause):
                        raise GivenUp(turn) from told
                await asyncio.sleep(pause)

        call_s3 = sync_wrapper(_call_s3)

        async def _abort_mpu(self, *place: Any, **words: Any) -> None:
            with contextlib.suppress(Exception):  # what the upload met is worth telling, not this
                await super()._abort_mpu(*place, **words)

    Requests._cache = S3FileSystem._cache  # whoever empties the one empties the other
    return Requests


def passes(error: BaseException) -> bool:
    """Whether an error of botocore may be over at the next try: no connection, no answer, a server in trouble."""
    from botocore import exceptions

    if isinstance(getattr(error, "response", None), dict):
        status = _status(error)
        return status in (408, 429) or (status >= 500 and status != 501) or s3_code(error) in PASSING
    kinds = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, (*kinds, OSError, asyncio.TimeoutError)) or type(error).__name__ == "ResponseParserError"


def throttles(error: BaseException) -> bool:
    """Whether an error of botocore says that there are too many requests."""
    return _status(error) in THROTTLED_STATUS or s3_code(error) in THROTTLED


def _status(error: BaseException) -> int:
    """Of the answer; 0 without one."""
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0


def http_refusal(error: BaseException) -> int | None:
    """The status of a web server's answer that the next try will not change: 401, 403, 410, 451, ...; else None."""
    status = getattr(error, "status", None)  # aiohttp's ClientResponseError
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return status if refused else None


def s3_code(error: BaseException | None) -> str | None:
    """S3's own name of an error, which s3fs keeps as the cause (it has no errno of its own for a failed
    If-None-Match)."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        error = error.__cause__
    return None

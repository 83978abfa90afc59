"""One call of an OpenAI-compatible endpoint: POST URL/chat/completions, tried again where that may help.

Shared by rejection sampling (trainer/after/endpoint.py) and by the judges of data preparation. A call that fails on the
way or is answered with 408, 409, 425, 429 or 5xx is tried again with growing waits, or after what Retry-After says. The
key is read from QWENVL_ENDPOINT_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

NUM_TRIES = 4
TIMEOUT_S = 120.0
MAX_WAIT_S = 60.0
SHOWN_BYTES = 200
"""Of an answer that is none, in a message."""
RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504))

Json = dict[str, Any]


class Refused(OSError):
    """The endpoint answered with a code that trying again does not change."""

    def __init__(self, url: str, code: int, told: str):
        super().__init__(f"{url} answered {code}: {told}")
        self.code = code


class NotAnswered(ValueError):
    """The endpoint answered, but with something else than a completion's JSON; the message shows its beginning."""

    def __init__(self, url: str, answered: bytes):
        shown = answered[:SHOWN_BYTES].decode(errors="replace").strip()
        more = "..." if len(answered) > SHOWN_BYTES else ""
        super().__init__(f"{url} answered no completion: {shown!r}{more}" if shown else f"{url} answered nothing")


def may_pass(error: Exception) -> bool:
    """Whether an error of request() may be gone some minutes later: no answer at all, or one that asks to try again."""
    return isinstance(error, OSError) and (not isinstance(error, Refused) or error.code in RETRIED)


def request(url: str, body: Json, *, timeout_s: float = TIMEOUT_S, sleep: Callable[[float], None] = time.sleep) -> Json:
    """The endpoint's answer to one request; `url` goes up to and with /v1.

    Raises:
        Refused: an answer that trying again does not change, or the last of NUM_TRIES.
        OSError: no answer after all tries.
        NotAnswered: the answer is no completion (a login page, a server of another kind).
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("QWENVL_ENDPOINT_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = url.rstrip("/") + "/chat/completions"
    wait = 0.0
    for turn in range(NUM_TRIES):
        if turn:
            sleep(max(wait, 2.0 ** (turn - 1) * (0.5 + random.random())))
        try:
            sent = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(sent, timeout=timeout_s) as response:
                return _completion(url, response.read())
        except urllib.error.HTTPError as error:
            told = error.read(300).decode(errors="replace")
            if error.code not in RETRIED or turn == NUM_TRIES - 1:
                raise Refused(url, error.code, told) from None
            wait = _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:  # cut in the middle of an answer is the latter
            wait = 0.0
            if turn == NUM_TRIES - 1:
                raise OSError(f"no answer from {url} in {NUM_TRIES} tries: {error}") from None
    raise AssertionError("the loop returns or raises")


def _completion(url: str, answered: bytes) -> Json:
    try:
        found = json.loads(answered)
        found["choices"][0]["message"]["content"]  # what whoever asked looks at
    except (ValueError, RecursionError, LookupError, TypeError):
        raise NotAnswered(url, answered) from None
    return found


def _seconds(stated: str | None) -> float:
    """Retry-After in seconds; a date, or nothing, is 0: then the growing wait counts."""
    try:
        return min(MAX_WAIT_S, max(0.0, float(stated or 0)))
    except ValueError:
        return 0.0

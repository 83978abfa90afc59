"""n answers to each request, from a model behind an OpenAI-compatible endpoint: what every judge shares.

The form of an answer is asked for in the prompt and checked by `parse`; `response_format` is sent only where a probe
found that the endpoint takes it. An answer of another form is asked for again with the next seed. n answers are n
requests. Every answer is recorded before it is used (record.py), also one of another form: a run given its record asks
nothing.

    asking = Asking(judge, Record(uri), parse, seed=1, field="prepare.sources.web.curate.score.judge")
    asking.answers([Request(digest, name, messages), ...])    # of each request its valid answers
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from PIL import Image as Pil
from pydantic import BaseModel

from pipelines.prepare.curate.record import Asked, Given, Record
from pipelines.prepare.engine import blocks
from pipelines.prepare.resumable import Unfinished
from trainer.after import completions
from trainer.after.answers import seed_of
from trainer.after.completions import Refused
from trainer.curation import Judge
from trainer.errors import MediaError

NUM_FORMS = 3
"""Requests for one answer until it has the form that was asked for."""
BLOCK = 64
"""Requests whose answers are written together."""
PAUSES_S = (10.0, 30.0, 60.0)
"""Waits for an endpoint that went away, over a whole run: each time the requests without an answer are made again. A
request is tried completions.NUM_TRIES times before, some seconds apart."""
LOOKED = 64
"""Times that a character of an answer is looked at: objects inside of more than so many that are none are not found."""
T = TypeVar("T")
Form = TypeVar("Form", bound=BaseModel)
Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    digest: str
    """Of all that it says, and of how it is answered: what its answers are recorded under."""
    name: str
    """What it is about, for messages to people."""
    messages: Callable[[], list[Json]]
    """Made when they are sent, once for all answers. Raises MediaError: an image cannot be decoded."""


@dataclass
class Counts:
    """What asking took: for the funnel."""

    asked: int = 0
    recorded: int = 0
    """Answers that were there already."""
    malformed: int = 0
    """Answers of another form, recorded ones included."""
    failed: int = 0
    """Requests without a valid answer."""
    unanswered: int = 0
    """Requests that no answer came to: made again when the answers are needed again."""
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> Json:
        names = ("asked", "recorded", "malformed", "unanswered", "failed")
        return {name: getattr(self, name) for name in names}


class Asking(Generic[T]):
    """One judge on one source. `parse` gives the answer that a text holds, None where it has another form."""

    def __init__(self, judge: Judge, record: Record, parse: Callable[[str], T | None], *, seed: int, field: str):
        self.judge, self.record, self.parse, self.seed, self.field = judge, record, parse, seed, field
        self.model = f"{judge.model}@{judge.revision}" if judge.revision else judge.model
        self.counts = Counts()
        self._formatted: bool | None = None
        self._pauses = list(PAUSES_S)

    def answers(self, requests: Sequence[Request]) -> list[list[T]]:
        """Of each request its valid answers, judge.answers at most.

        Raises:
            Unfinished: the endpoint does not answer at all.
        """
        found: list[list[T]] = []
        with ThreadPoolExecutor(self.judge.concurrency) as pool:
            for block in blocks(requests, BLOCK):
                found += self._block(pool, block)
        self.counts.failed += sum(not valid for valid in found)
        return found

    def _block(self, pool: ThreadPoolExecutor, block: list[Request]) -> list[list[T]]:
        """Forms are tried in rounds, each recorded before it is looked at."""
        valid: list[list[T]] = [[] for _ in block]
        open_ = [(number, answer) for number in range(len(block)) for answer in range(self.judge.answers)]
        unreadable: set[str] = set()
        for form in range(NUM_FORMS):
            wanted = {place: self._asked(block[place[0]].digest, place[1], form) for place in open_}
            missing = {asked: place for place, asked in reversed(wanted.items()) if self.record.get(asked) is None}
            self.counts.recorded += sum(self.record.get(asked) is not None for asked in wanted.values())
            failed = self._ask(pool, block, [(place[0], asked) for asked, place in missing.items()])
            unreadable |= {block[number].digest for number in failed}  # two samples may ask the same
            left = []
            for place in open_:
                given = self.record.get(wanted[place])
                answer = self.parse(given.text) if given is not None else None
                if answer is not None:
                    valid[place[0]].append(answer)
                elif given is not None:
                    self.counts.malformed += 1
                    left.append(place)
                else:
                    self.counts.unanswered += block[place[0]].digest not in unreadable
            open_ = left
        return valid

    def _ask(self, pool: ThreadPoolExecutor, block: list[Request], places: list[tuple[int, Asked]]) -> set[int]:
        """Returns the numbers of requests that cannot be made: an image of theirs cannot be decoded."""
        if not places:
            return set()
        formatted = self._takes_format()
        messages: dict[int, list[Json]] = {}
        unreadable: set[int] = set()
        for number, _ in places:  # images are read once, whatever the number of answers
            if number not in messages and number not in unreadable:
                try:
                    messages[number] = block[number].messages()
                except MediaError as error:
                    unreadable.add(number)
                    self.counts.errors.append(f"{block[number].name}: {error.what}")

        def one(place: tuple[int, Asked]) -> tuple[tuple[int, Asked], Given | Exception]:
            number, asked = place
            try:
                return place, self._call(messages[number], asked.seed, formatted)
            except (OSError, ValueError, LookupError, TypeError) as error:
                return place, error

        left = [place for place in places if place[0] in messages]
        self.counts.asked += len(left)
        while left:
            answered = list(pool.map(one, left))
            self.record.add({asked: given for (_, asked), given in answered if isinstance(given, Given)})
            failed = [(place, given) for place, given in answered if isinstance(given, Exception)]
            left = [place for place, error in failed if self._pauses and completions.may_pass(error)]
            final = [error for place, error in failed if place not in left]
            self.counts.errors += [f"{type(error).__name__}: {error}"[:300] for error in final[:3]]
            if left:
                self._pause(len(left), failed[0][1])
        return unreadable

    def _pause(self, num_left: int, error: Exception) -> None:
        wait = self._pauses.pop(0)
        told = f"{num_left} requests without an answer ({type(error).__name__}: {error})"[:300]
        print(f"{self.field}: {told}, made again in {wait:g} s", flush=True)
        time.sleep(wait)

    def _call(self, messages: list[Json], seed: int, formatted: bool) -> Given:
        body = self._body(messages, seed, formatted)
        found = completions.request(self.judge.url, body, timeout_s=self.judge.timeout_s)
        choice = found["choices"][0]
        return Given(
            choice["message"]["content"] or "", "length" if choice.get("finish_reason") == "length" else "stop"
        )

    def _body(self, messages: list[Json], seed: int, formatted: bool) -> Json:
        body = {
            "model": self.judge.model,
            "messages": messages,
            "temperature": self.judge.temperature,
            "max_tokens": self.judge.max_tokens,
            "seed": seed % 2**31,  # some servers take 32 bits
        }
        return body | ({"response_format": {"type": "json_object"}} if formatted else {})

    def _takes_format(self) -> bool:
        """Whether the endpoint takes response_format: asked once a run, with a few tokens. One that refuses
        it, or takes it and writes something else, is asked without."""
        if self._formatted is None:
            probe = [{"role": "user", "content": 'Answer with the JSON object {"ready": true} and nothing else.'}]
            try:
                self._formatted = "{" in self._call(probe, 0, True).text
            except Refused as error:
                if error.code in (401, 403, 404, 429) or error.code >= 500:
                    raise self._unusable(error) from error
                self._formatted = False
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise self._unusable(error) from error
        return self._formatted

    def _unusable(self, error: Exception) -> Unfinished:
        return Unfinished(
            "the judge does not answer",
            where=f"{self.field}.url: {self.judge.url}",
            expected="an OpenAI-compatible endpoint, its address up to and with /v1",
            got=f"{type(error).__name__}: {error}",
            do="look at the server, judge.model and QWENVL_ENDPOINT_KEY; answers given so far are recorded",
        )

    def _asked(self, request: str, answer: int, form: int) -> Asked:
        return Asked(request, seed_of(self.seed, request, answer * NUM_FORMS + form), self.model)


def check_failed(
    counts: Sequence[Counts], judge: Judge, *, where: str, what: str, failed: int, of: int, missing: int = 0
) -> None:
    """
    Raises:
        Unfinished: `missing` of what was asked about, or more than judge.max_failed of it (`what`: samples, steps), are
        without a valid answer.
    """
    if not missing and failed <= judge.max_failed * of:
        return
    errors = [error for one in counts for error in one.errors[-3:]]
    told = "\n    ".join(dict.fromkeys(errors[-3:])) or "answers of another form than asked for"
    raise Unfinished(
        f"{what} that no answer came for" if missing else f"too many {what} without a valid answer of the judge",
        where=where,
        expected="an answer to every request" if missing else f"at most {judge.max_failed:.2%} of {of}",
        got=f"{missing or failed} so far\n    {told}",
        do="look at the endpoint, raise judge.max_tokens or judge.max_failed; answers are recorded, run again",
    )


def first_of(text: str, form: type[Form]) -> Form | None:
    """The first JSON object in the text that has the form, whatever stands around it; None where there is none. Takes
    time in proportion to the text: one of brackets inside brackets is given up."""
    decoder, room = json.JSONDecoder(), LOOKED * len(text)
    at = text.find("{")
    while at >= 0 and room > 0:
        stop = len(text)
        try:
            found, stop = decoder.raw_decode(text, at)
            return form.model_validate(found)
        except json.JSONDecodeError as error:
            stop = error.pos
        except (ValueError, RecursionError):  # ValidationError is a ValueError
            pass
        room -= max(1, stop - at)
        at = text.find("{", at + 1)
    return None


def judge_facts(asked: Judge) -> Json:
    """What answers depend on: not where the model is or how fast it is asked."""
    return asked.model_dump(mode="json", exclude={"url", "concurrency", "timeout_s", "max_failed"})


def picture_part(picture: Pil.Image, judge: Judge) -> Json:
    """An upright picture as a part of a message, at most judge.image_max_pixels."""
    stream = io.BytesIO()
    # level 1 halves the time (93 for 186 ms of a photograph of 512 x 512) for a ninth more bytes
    smaller(picture, judge.image_max_pixels).save(stream, "PNG", compress_level=1)
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def smaller(picture: Pil.Image, max_pixels: int) -> Pil.Image:
    """The picture, made smaller where it has more pixels."""
    if (pixels := picture.width * picture.height) <= max_pixels:
        return picture
    scale = (max_pixels / pixels) ** 0.5
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Pil.Resampling.BICUBIC)

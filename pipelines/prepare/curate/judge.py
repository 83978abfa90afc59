"""A model behind an OpenAI-compatible endpoint scores interleaved documents by the report's four criteria.

The form of the answer is asked for in the prompt and checked here; `response_format` is sent only where a probe found
that the endpoint takes it. An answer of another form is asked for again with the next seed. n answers are n requests.
Every answer is recorded before it is used (record.py), also one of another form: a run given its record asks nothing.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

from PIL import Image as Pil
from pydantic import BaseModel, ConfigDict, Field

from pipelines.prepare.curate.record import Asked, Given, Record
from pipelines.prepare.engine import blocks
from trainer.after import completions
from trainer.after.answers import seed_of
from trainer.after.completions import Refused
from trainer.curation import Judge
from trainer.data import media as images
from trainer.data.sample import Image, Objects, Sample, Text, parts_of
from trainer.errors import DataError, MediaError
from trainer.resolve import digest

VERSION = 1
"""Of the prompt: part of what answers are recorded under."""
BEST = 5
NUM_FORMS = 3
"""Requests for one answer until it has the form that was asked for."""
BLOCK = 64
"""Samples whose answers are written together."""
MediaOf = Callable[[int], list[bytes]]
"""Number of a sample in a call -> its files."""

PROMPT = f"""You judge one document of text and images for training a vision-language model.
Score four criteria with whole numbers from 0 (worst) to {BEST} (best):
- text_quality: the text alone is fluent, complete, informative, free of boilerplate and repetition.
- image_text_relevance: the images show what the text is about.
- image_text_complementarity: text and images each say something that the other does not; together they say more.
- information_balance: neither text nor images carry nearly all of the information.
A document without images has 0 in the last three.
Answer with one JSON object and nothing else:
{{"text_quality": 0, "image_text_relevance": 0, "image_text_complementarity": 0, "information_balance": 0}}"""

Whole = Annotated[int, Field(ge=0, le=BEST, strict=True)]


class Scores(BaseModel):
    model_config = ConfigDict(extra="ignore")

    text_quality: Whole
    image_text_relevance: Whole
    image_text_complementarity: Whole
    information_balance: Whole


CRITERIA = tuple(Scores.model_fields)


def parse(text: str) -> Scores | None:
    """The first JSON object in the text that has the form, whatever stands around it; None where there is none."""
    at = text.find("{")
    while at >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, at)
            return Scores.model_validate(found)
        except (ValueError, RecursionError):  # ValidationError is a ValueError
            at = text.find("{", at + 1)
    return None


@dataclass
class Counts:
    """What judging took: for the funnel."""

    asked: int = 0
    recorded: int = 0
    """Answers that were there already."""
    malformed: int = 0
    """Answers of another form, recorded ones included."""
    failed: int = 0
    """Samples without a valid answer: kept."""
    unanswered: int = 0
    """Requests that no answer came to: made again when the scores are needed again."""
    errors: list[str] = field(default_factory=list)


class Asking:
    """One judge on one source."""

    def __init__(self, judge: Judge, record: Record, *, seed: int):
        self.judge, self.record, self.seed = judge, record, seed
        self.model = f"{judge.model}@{judge.revision}" if judge.revision else judge.model
        self.counts = Counts()
        self._formatted: bool | None = None

    def score(self, samples: Sequence[Sample], media_of: MediaOf) -> list[dict[str, float] | None]:
        """Of each sample its criteria 0..1, or None. media_of(n) reads the files of the n-th."""
        found: list[dict[str, float] | None] = []
        with ThreadPoolExecutor(self.judge.concurrency) as pool:
            for block in blocks(range(len(samples)), BLOCK):
                texts = self._answers(pool, [(samples[n], n) for n in block], media_of)
                found += [self._combined(samples[n], texts[n]) for n in block]
        return found

    def _answers(
        self, pool: ThreadPoolExecutor, block: list[tuple[Sample, int]], media_of: MediaOf
    ) -> dict[int, list[Scores]]:
        """The valid answers of each sample. Forms are tried in rounds, each recorded before it is looked at."""
        valid: dict[int, list[Scores]] = {number: [] for _, number in block}
        sample_of = {number: sample for sample, number in block}
        requests = {number: request_digest(sample, self.judge) for sample, number in block}
        open_ = [(number, answer) for _, number in block for answer in range(self.judge.answers)]
        unreadable: set[int] = set()
        for form in range(NUM_FORMS):
            wanted = {place: self._asked(requests[place[0]], place[1], form) for place in open_}
            missing = {asked: place for place, asked in reversed(wanted.items()) if self.record.get(asked) is None}
            self.counts.recorded += sum(self.record.get(asked) is not None for asked in wanted.values())
            unreadable |= self._ask(
                pool, [(sample_of[place[0]], place[0], asked) for asked, place in missing.items()], media_of
            )
            left = []
            for place in open_:
                given = self.record.get(wanted[place])
                scores = parse(given.text) if given is not None else None
                if scores is not None:
                    valid[place[0]].append(scores)
                elif given is not None:
                    self.counts.malformed += 1
                    left.append(place)
                else:
                    self.counts.unanswered += place[0] not in unreadable
            open_ = left
        return valid

    def _ask(self, pool: ThreadPoolExecutor, places: list[tuple[Sample, int, Asked]], media_of: MediaOf) -> set[int]:
        """Returns the numbers of samples that cannot be asked about: an image of theirs cannot be decoded."""
        if not places:
            return set()
        formatted = self._takes_format()
        messages: dict[int, Any] = {}
        unreadable: set[int] = set()
        for sample, number, _ in places:  # images are read once, whatever the number of answers
            if number not in messages and number not in unreadable:
                try:
                    messages[number] = messages_of(sample, media_of(number), self.judge)
                except MediaError as error:
                    unreadable.add(number)
                    self.counts.errors.append(f"{sample.id}: {error.what}")

        def one(place: tuple[Sample, int, Asked]) -> tuple[Asked, Given | Exception]:
            _, number, asked = place
            try:
                return asked, self._call(messages[number], asked.seed, formatted)
            except (OSError, ValueError, LookupError, TypeError) as error:
                return asked, error

        answered = list(pool.map(one, [place for place in places if place[1] in messages]))
        self.counts.asked += len(answered)
        self.record.add({asked: given for asked, given in answered if isinstance(given, Given)})
        failed = [given for _, given in answered if isinstance(given, Exception)]
        self.counts.errors += [f"{type(error).__name__}: {error}"[:300] for error in failed[:3]]
        return unreadable

    def _call(self, messages: list, seed: int, formatted: bool) -> Given:
        found = completions.request(
            self.judge.url, self._body(messages, seed, formatted), timeout_s=self.judge.timeout_s
        )
        choice = found["choices"][0]
        return Given(
            choice["message"]["content"] or "", "length" if choice.get("finish_reason") == "length" else "stop"
        )

    def _body(self, messages: list, seed: int, formatted: bool) -> dict[str, Any]:
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

    def _unusable(self, error: Exception) -> DataError:
        return DataError(
            "the judge does not answer",
            where=f"score.judge.url: {self.judge.url}",
            expected="an OpenAI-compatible endpoint, its address up to and with /v1",
            got=f"{type(error).__name__}: {error}",
            do="look at the server, judge.model and QWENVL_ENDPOINT_KEY; answers given so far are recorded",
        )

    def _asked(self, request: str, answer: int, form: int) -> Asked:
        return Asked(request, seed_of(self.seed, request, answer * NUM_FORMS + form), self.model)

    def _combined(self, sample: Sample, valid: list[Scores]) -> dict[str, float] | None:
        if not valid:
            self.counts.failed += 1
            return None
        found = {name: median(getattr(one, name) for one in valid) / BEST for name in CRITERIA}
        if not any(file.kind == "image" for file in sample.media):
            found = {name: value if name == "text_quality" else float("nan") for name, value in found.items()}
        return found


def request_digest(sample: Sample, judge: Judge) -> str:
    """Of all that a request says: the prompt, the document, its images by digest, how they are shown and answered."""
    document = [part.model_dump(mode="json") for part in parts_of(sample)]
    names = ("temperature", "max_tokens", "image_max_pixels", "max_images", "max_characters")
    shown = {name: getattr(judge, name) for name in names}
    media = [file.digest for file in sample.media]
    return digest({"version": VERSION, "prompt": PROMPT, "document": document, "media": media, "shown": shown})


def messages_of(sample: Sample, files: Sequence[bytes], judge: Judge) -> list[dict[str, Any]]:
    """The prompt, then text and images in reading order; what does not fit is cut, and said to be. Raises
    MediaError."""
    content: list[dict[str, Any]] = []
    room, shown = judge.max_characters, 0
    for part in parts_of(sample):
        if isinstance(part, Image):
            if shown < judge.max_images:
                content.append({"type": "image_url", "image_url": {"url": _data_uri(files[part.media], judge)}})
            else:
                content.append({"type": "text", "text": "[another image]"})
            shown += 1
        elif isinstance(part, Text | Objects):
            inside = "\n".join(item.content or item.label for item in part.objects) if isinstance(part, Objects) else ""
            text = part.text if isinstance(part, Text) else inside
            if len(text) > room:
                text = text[:room] + " [the rest is cut]" if room else ""
            room = max(0, room - len(text))
            content += [{"type": "text", "text": text}] if text else []
    return [
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": content or [{"type": "text", "text": "[empty]"}]},
    ]


def _data_uri(data: bytes, judge: Judge) -> str:
    picture = images.upright(data)
    if (pixels := picture.width * picture.height) > judge.image_max_pixels:
        scale = (judge.image_max_pixels / pixels) ** 0.5
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(size, Pil.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()

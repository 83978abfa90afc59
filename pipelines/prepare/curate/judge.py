"""A model behind an OpenAI-compatible endpoint scores interleaved documents by the report's four criteria. How it is
asked, and that its answers are recorded, is asking.py's business; here are the prompt, the form and the median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.prepare.curate.asking import Asking, Counts, Request, first_of, picture_part
from pipelines.prepare.curate.record import Record
from trainer.curation import Judge
from trainer.data import media as images
from trainer.data.sample import Image, Objects, Sample, Text, parts_of
from trainer.resolve import digest

VERSION = 1
"""Of the prompt: part of what answers are recorded under."""
BEST = 5
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
    return first_of(text, Scores)


class Scoring:
    """One judge on one source."""

    def __init__(self, judge: Judge, record: Record, *, seed: int, field: str):
        self.judge = judge
        self.asking = Asking(judge, record, parse, seed=seed, field=field)

    @property
    def counts(self) -> Counts:
        return self.asking.counts

    def score(self, samples: Sequence[Sample], media_of: MediaOf) -> list[dict[str, float] | None]:
        """Of each sample its criteria 0..1, or None. media_of(n) reads the files of the n-th."""
        requests = [self._request(sample, number, media_of) for number, sample in enumerate(samples)]
        answers = self.asking.answers(requests)
        return [combined(sample, valid) for sample, valid in zip(samples, answers, strict=True)]

    def _request(self, sample: Sample, number: int, media_of: MediaOf) -> Request:
        asked = request_digest(sample, self.judge)
        return Request(asked, sample.id, lambda: messages_of(sample, media_of(number), self.judge))


def combined(sample: Sample, valid: Sequence[Scores]) -> dict[str, float] | None:
    """The median of each criterion; NaN where it does not apply, None without a valid answer."""
    if not valid:
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
                content.append(picture_part(images.upright(files[part.media]), judge))
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

"""What a judge is asked about conversations: domain and sub-domain, and six qualities. Prompts and forms; how it is
asked, and that its answers are recorded, is asking.py's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.prepare.curate.asking import Request, first_of
from pipelines.prepare.curate.conversations import media_kinds, shown, turns_of
from trainer.curation import Judge
from trainer.data.sample import Sample
from trainer.domains import sub_domains
from trainer.resolve import digest

VERSION = 1
"""Of the prompts: part of what answers are recorded under."""
BEST = 5
FilesOf = Callable[[], list[bytes]]
Whole = Annotated[int, Field(ge=0, le=BEST, strict=True)]

CRITERIA = ("complexity", "relevance", "correctness", "completeness", "clarity", "use_of_visual_information")
FORM = ", ".join(f'"{name}": 0' for name in CRITERIA)
QUALITY_PROMPT = f"""You judge one conversation that a vision-language model may be trained on.
Score six criteria with whole numbers from 0 (worst) to {BEST} (best):
- complexity: the questions need knowledge, several steps or close looking; 0 is trivial.
- relevance: the questions belong to the pictures or context given, and the answers to the questions.
- correctness: what the answers say is true of the pictures and of the world.
- completeness: the answers answer all that is asked and do not break off.
- clarity: the answers are well ordered, readable, of one language, without repetition.
- use_of_visual_information: the answers rest on what the pictures show; 0 where there is none or it is ignored.
Answer with one JSON object and nothing else:
{{{FORM}}}"""


class Qualities(BaseModel):
    model_config = ConfigDict(extra="ignore")

    complexity: Whole
    relevance: Whole
    correctness: Whole
    completeness: Whole
    clarity: Whole
    use_of_visual_information: Whole


class Label(BaseModel):
    """A sub-domain that exists, and the domain that it belongs to."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    domain: str
    sub_domain: str

    @model_validator(mode="after")
    def _known(self) -> Label:
        if (self.domain, self.sub_domain) not in {(one.domain, one.name) for one in sub_domains()}:
            raise ValueError(f"{self.domain}/{self.sub_domain} is none of trainer/domains.yaml")
        return self


def label_prompt() -> str:
    lines = [f"- {one.domain} / {one.name}: {one.about}" for one in sub_domains()]
    return (
        "You sort one conversation of a user with a vision-language model by what the user asks for. The domains and "
        "their sub-domains:\n" + "\n".join(lines) + "\nTake the one that fits best. Answer with one JSON object and "
        'nothing else, with names as they stand above:\n{"domain": "Coding", "sub_domain": "Code_Debugging"}'
    )


def parse_label(text: str) -> Label | None:
    return first_of(text, Label)


def parse_qualities(text: str) -> Qualities | None:
    return first_of(text, Qualities)


def request(sample: Sample, files: FilesOf, prompt: str, judge: Judge) -> Request:
    document = [message.model_dump(mode="json") for message in turns_of(sample)]
    media = [file.digest for file in sample.media]
    names = ("temperature", "max_tokens", "image_max_pixels", "max_images", "max_characters")
    how = {name: getattr(judge, name) for name in names}
    asked = digest({"version": VERSION, "prompt": prompt, "document": document, "media": media, "shown": how})
    return Request(asked, sample.id, lambda: shown(turns_of(sample), files(), prompt, judge))


def label_of(valid: Sequence[Label]) -> Label | None:
    """What most answers say; of equals the one said first."""
    return max(valid, key=list(valid).count) if valid else None


def scores_of(sample: Sample, valid: Sequence[Qualities]) -> dict[str, float] | None:
    """The median of each criterion, 0..1; None without a valid answer. Whether visual information was used is NaN
    where no image was shown: a judge is sent no videos."""
    if not valid:
        return None
    found = {name: median(getattr(one, name) for one in valid) / BEST for name in CRITERIA}
    return found if "image" in media_kinds(sample) else found | {"use_of_visual_information": float("nan")}

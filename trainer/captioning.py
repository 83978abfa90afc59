"""What a recipe can say about captions of long videos: `prepare.sources.NAME.captioning`, of a source whose `format` is
video_captions and whose `path` is source://OTHER.

    films:     {format: captions, path: ..., kind: video, rendering: chat}
    captioned: {format: video_captions, path: "source://films", kind: video, rendering: chat,
                captioning: {judge: {url: ..., model: ...}}}

A model behind an endpoint captions frames, then segments from their frames, then groups of segments, until one caption
is left: the Qwen2.5-VL report (section 2.1.2) captions videos of over half an hour "by synthesizing multi-frame
captions". It states no numbers beyond the half hour: those here are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from trainer import derived
from trainer.curation import Judge
from trainer.fields import Strict, result

FORMAT = "video_captions"


class Captioning(Strict):
    judge: Judge = result()
    """judge.answers is of no use here: the first valid answer counts. max_failed is the share of requests without one;
    judge.max_characters bounds the captions in one request."""
    min_duration_s: float = result(1800.0, ge=0)
    """Shorter videos are left out, counted."""
    segment_s: float = result(120.0, gt=0)
    """At most; a video has equal segments."""
    frames_per_segment: int = result(8, ge=1)
    combined: int = result(8, ge=2)
    """Captions that one of the next level is made from, at most."""
    max_events: int = result(40, ge=1)
    """The events that a sample lists are those of the finest level that has no more."""

    @model_validator(mode="after")
    def _one_answer(self) -> Captioning:
        if self.judge.answers != 1:
            raise ValueError(f"judge.answers: one caption is used, got {self.judge.answers}")
        return self


def problems_of(sources: Mapping[str, Any]) -> list[str]:
    """What is wrong between the sources of a recipe (recipe.Source by name)."""
    return derived.problems_of(
        sources,
        section="captioning",
        format=FORMAT,
        kind="video",
        about="captions of videos",
        refused=lambda kind: "holds pairs, not videos" if kind == "preference" else None,
    )

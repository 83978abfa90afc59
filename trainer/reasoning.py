"""What a recipe can say about the reasoning of steps that a judge writes: `prepare.sources.NAME.reasoning`, of a source
whose `format` is reasoning and whose `path` is source://OTHER.

    walks:    {format: android_control, path: ..., kind: agent, rendering: chat}
    reasoned: {format: reasoning, path: "source://walks", kind: agent, rendering: chat,
               reasoning: {judge: {url: ..., model: ...}, filtered: bare}}

The judge sees the query, the steps before, and the screenshots before and after with the action's place marked
(Qwen2.5-VL report, section 2.2.2); what it writes passes filters, each with a name that the funnel counts by. Every
threshold is ours: the report names the aim of filtering and no number. The same filters look at what people write
(`qwenvl data annotate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from trainer import derived
from trainer.curation import Judge, Share
from trainer.fields import Strict, result

FORMAT = "reasoning"


class Filters(Strict):
    """Which reasoning is good enough to learn from; a word is one character where words are not separated."""

    min_words: int = result(6, ge=1)
    """`too-short` below."""
    max_words: int = result(150, ge=1)
    """`too-long` above."""
    max_of_query: Share = result(0.6)
    """`copied-query` above: share of its trigrams of words that the query has as well. Where it has fewer than three
    words, whether they follow each other in the query."""
    max_of_step: Share = result(0.6)
    """`copied-step` above: the same with the reasoning of any earlier step of the trajectory."""
    consistent: bool = result(True)
    """`inconsistent`: it speaks of another kind of action, the other direction, another text or button than the
    step's (pipelines/prepare/reasoning/consistent.py has the words; English alone)."""

    @model_validator(mode="after")
    def _ordered(self) -> Filters:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}: nothing would be kept")
        return self


class Reasoning(Strict):
    """One text a step, written before its call. judge.answers are tries: the first that passes every filter stays."""

    judge: Judge = result()
    """max_failed is the share of steps without an answer of the form asked for."""
    existing: Literal["keep", "replace"] = result("keep")
    """Of a step that has words before its call already (AndroidControl's instructions). keep: nothing is asked;
    replace: the judge is told what they say, and they go; only its own words count."""
    filters: Filters = result(default_factory=Filters)
    min_agreement: Share | None = result(None)
    """`disagreement` below: the judge is asked a second time, whether the reasoning leads to this action at this place
    (0..1, the median of its answers). Finds what words alone cannot tell: another button than the marked one."""
    filtered: Literal["bare", "cut", "drop"] = result("bare")
    """A step without any reasoning that passes. bare: it stays without; cut: the trajectory ends before it; drop: the
    whole trajectory is left out. All are counted."""


def problems_of(sources: Mapping[str, Any]) -> list[str]:
    """What is wrong between the sources of a recipe (recipe.Source by name)."""
    return derived.problems_of(
        sources,
        section="reasoning",
        format=FORMAT,
        kind="agent",
        about="trajectories",
        refused=lambda kind: None if kind == "agent" else f"has the kind {kind}; trajectories have the kind agent",
    )

"""Thresholds on stored numbers: which samples each filter of the recipe drops. Pure arithmetic on columns of N rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trainer.curation import Clean, Score

Columns = Mapping[str, np.ndarray]

SIGNAL_OF = {
    **{f"min_{name}": name for name in ("language_probability", "characters", "words", "mean_word_length")},
    **{f"min_{name}": name for name in ("alphabetic_words", "stop_words", "sentences", "terminal_lines", "images")},
    **{f"max_{name}": name for name in ("characters", "words", "mean_word_length", "symbol_ratio", "bullet_lines")},
    **{f"max_{name}": name for name in ("ellipsis_lines", "boilerplate_lines", "placeholder_text", "braces", "images")},
    **{f"max_duplicate_{name}": f"duplicate_{name}" for name in ("lines", "line_characters")},
    **{f"max_duplicate_{name}": f"duplicate_{name}" for name in ("paragraphs", "paragraph_characters")},
    **{f"max_{name}": name for name in ("blocked_words", "blocked_urls", "image_aspect", "repeated_images")},
    **{f"max_{name}": name for name in ("top_ngram", "duplicate_ngram", "documents_of_image")},
    "min_image_side": "image_min_side",
    "max_image_side": "image_max_side",
}
"""Field of trainer.curation.Clean -> column of signals.py. A prefix says which side of the threshold stays."""
NOT_FILTERS = ("languages", "blocked_words", "blocked_urls")
NEEDS_IMAGE = ("min_image_side",)


@dataclass(frozen=True)
class Verdict:
    """What one filter says of N samples, whatever the others say."""

    name: str
    """As the funnel counts it: clean.min_words."""
    dropped: np.ndarray
    """bool[N]"""
    values: np.ndarray
    """[N]: what was compared with the threshold."""
    threshold: str


def signals_asked(clean: Clean) -> list[str]:
    """The columns of signals.py that clean_verdicts reads."""
    found = ["language", "characters"] if clean.languages is not None else []
    for field, _, suffix in _asked(clean):
        found += [f"{SIGNAL_OF[field]}{suffix}", *(["images"] if field in NEEDS_IMAGE else [])]
    return list(dict.fromkeys(found))


def _asked(clean: Clean) -> Iterator[tuple[str, float, str]]:
    """(field, threshold, what its column's name ends with) of each filter that the recipe states, in its order."""
    for field in type(clean).model_fields:
        threshold = getattr(clean, field)
        if threshold is None or field in NOT_FILTERS:
            continue
        cases = threshold.items() if isinstance(threshold, dict) else [(None, threshold)]
        yield from ((field, limit, "" if size is None else f"_{size}") for size, limit in cases)


def clean_verdicts(clean: Clean, columns: Columns) -> Iterator[Verdict]:
    """In the order of the recipe's fields. NaN: the filter does not apply to the sample, which stays."""
    if clean.languages is not None:
        values = columns["language"]
        wanted = ", ".join(clean.languages)
        has_text = columns["characters"] > 0
        yield Verdict("clean.languages", has_text & ~np.isin(values, clean.languages), values, f"one of {wanted}")
    for field, limit, suffix in _asked(clean):
        values = columns[f"{SIGNAL_OF[field]}{suffix}"].astype(np.float64)
        if field in NEEDS_IMAGE:
            values = np.where(columns["images"] > 0, values, np.nan)
        yield _verdict(f"clean.{field}{suffix}", values, limit, at_least=field.startswith("min_"))


def score_verdicts(score: Score, columns: Columns) -> Iterator[Verdict]:
    for criterion, limit in score.min.items():
        yield _verdict(f"score.{criterion}", columns[criterion].astype(np.float64), limit, at_least=True)


def _verdict(name: str, values: np.ndarray, limit: float, *, at_least: bool) -> Verdict:
    with np.errstate(invalid="ignore"):
        dropped = values < limit if at_least else values > limit
    return Verdict(name, dropped, values, f"{'at least' if at_least else 'at most'} {limit:g}")

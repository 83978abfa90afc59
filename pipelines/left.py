"""What an output has already, for the estimate of the time left (progress.py): never what decides whether a step is
skipped, which each step finds out for itself. So it asks storage for names only, and a wrong guess costs nothing.

    found = look(recipe, out)
    found.share["stage2"]    of the step's work, what is still to be done: 0 to 1
    found.took_s["stage1"]   seconds of a stage that one attempt finished: the pace, before this run has shown its own
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer import manifest, storage
from trainer.data.shards import MANIFEST
from trainer.errors import QwenVLError
from trainer.handover import INIT, result_uri
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Left:
    share: dict[str, float] = field(default_factory=dict)
    """By step; one that is not named has all of it to do."""
    took_s: dict[str, float] = field(default_factory=dict)


def look(recipe: Recipe, out: str) -> Left:
    """What is there; nothing where storage does not answer, as the first step will say."""
    try:
        return _look(recipe, out)
    except (QwenVLError, OSError, ValueError, KeyError, TypeError):  # a damaged file is its step's to tell
        return Left()


def _look(recipe: Recipe, out: str) -> Left:
    found = Left()
    found.share["prepare-data"] = _of_data(recipe, out)
    whole = _is_finished(found, INIT, out)
    for name, stage in recipe.stages.named().items():
        if stage.sampling is not None and whole:  # answers of a model that will be made anew are made anew
            folder = f"prepare-{name}"
            found.share[f"{folder}-requests"] = _unless(out, folder, "requests.jsonl")
            for part in ("answers", "select"):
                found.share[f"{folder}-{part}"] = _unless(out, folder, "selection.json")
        found.share[f"prepare-{name}"] = _unless(out, name, "plan", "plan.json")
        whole = whole and _is_finished(found, name, out)
        if not whole:
            found.share[name] = _of_steps(out, name)
    if whole:
        found.share["export"] = _unless(out, "export", "export.json")
        found.share["evaluate"] = _unless(out, "evaluate", "evaluation.json")
    return found


def _unless(out: str, *parts: str) -> float:
    return 0.0 if storage.exists(storage.join(out, *parts)) else 1.0


def _is_finished(found: Left, name: str, out: str) -> bool:
    """Notes a stage (or init) that has a result."""
    try:
        result = storage.read_json(result_uri(out, name))
    except FileNotFoundError:
        return False
    found.share[name] = 0.0
    if name != INIT and result["wall_s"] and result["metrics"].get("resumed_from") is None:
        found.took_s[name] = float(result["wall_s"])
    return True


def _of_data(recipe: Recipe, out: str) -> float:
    """Share of the sources without shards; none once all were counted."""
    if not _unless(out, "data", "funnel.json"):
        return 0.0
    sources = recipe.prepare.sources
    missing = sum(_unless(out, "data", "sources", name, "train", MANIFEST) for name in sources)
    return missing / len(sources)


def _of_steps(out: str, stage: str) -> float:
    """Share of the steps above the last checkpoint."""
    done = max(manifest.steps(storage.join(out, stage)), default=0)
    if not done:
        return 1.0
    total = storage.read_json(storage.join(out, stage, "plan", "plan.json"))["num_steps"]
    return max(0.0, 1 - done / total)

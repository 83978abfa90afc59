"""Step evaluate: held-out losses and task scores before training and at the end, and whether the pictures matter.
`python -m trainer.after.evaluate --recipe ... --out ...`

    OUT/evaluate/evaluation.json    {"evaluation": {KIND: {METRIC: {before, after, n}}},
                                     "media_matter": {STAGE: {KIND: {right, shuffled, n, ci95}}}, ...}
    OUT/evaluate/predictions.jsonl  every task with its question, key and both answers
    OUT/evaluate/pictures/*.png     true (green) and predicted (red) places

`before` is the model of init, `after` the newest StageResult; media_matter is measured for stage1 and the newest.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trainer import handover, storage
from trainer.after import held_out, losses, opening, pictures, tasks
from trainer.after.held_out import Item
from trainer.after.losses import Loss
from trainer.after.scores import overall_scores
from trainer.after.tasks import Task
from trainer.errors import UsageError
from trainer.handover import StageResult
from trainer.models import config as configs
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.resolve import digest

FORMAT = 1
NAME = "evaluation.json"
MAX_PICTURES = 12
BEFORE, AFTER = "before", "after"
FIRST_STAGE = "stage1"


@dataclass
class Seen:
    """What was measured of one model."""

    right: list[Loss] = field(default_factory=list)
    shuffled: dict[int, Loss] = field(default_factory=dict)
    """Index of item -> loss with another's media."""
    answers: list[str] = field(default_factory=list)
    blind_answers: list[str] = field(default_factory=list)


def evaluate(recipe: Recipe, out: str) -> dict[str, Any]:
    """Measure, write and return evaluation.json; what is there already and was made from the same models is returned.

    Raises:
        UsageError: no stage is finished.
    """
    results = _results(recipe, out)
    uri = storage.join(out, "evaluate", NAME)
    key = _key(recipe, results)
    if storage.exists(uri) and (stored := storage.read_json(uri)).get("key") == key:
        print(f"evaluate: {uri} is already there", flush=True)
        return stored
    began = time.monotonic()
    items, dropped = held_out.load_items(recipe, out)
    asked = tasks.tasks_of(items, max_new_tokens=recipe.evaluate.max_new_tokens)
    if not items:
        print("evaluate: nothing is measured: no source has held-out data (prepare.sources.NAME.held_out)", flush=True)
    seen = _measure(recipe, out, results, items, asked) if items else {name: Seen() for name in results}
    names = list(results)
    before, after = seen[names[0]], seen[names[-1]]
    content = {
        "format": FORMAT,
        "key": key,
        "models": {name: result.model.digest for name, result in results.items()},
        "before": names[0],
        "after": names[-1],
        "evaluation": table(items, asked, before, after),
        "media_matter": {name: media_matter(items, one, recipe.seed) for name, one in seen.items() if one.shuffled},
        "samples": _counts(items),
        "dropped": dropped,
        "pictures": _write_predictions(out, asked, before, after),
        "wall_s": round(time.monotonic() - began, 3),
    }
    storage.write_json(uri, content)
    return content


def _results(recipe: Recipe, out: str) -> dict[str, StageResult]:
    """init, stage1 if there is one, the newest: by name, in order."""
    newest = handover.newest_result(out)
    if newest is None or newest.stage == handover.INIT:
        raise UsageError("there is no trained model to evaluate", where=out, do="train at least one stage")
    names = [handover.INIT, FIRST_STAGE, newest.stage]
    return {name: handover.read(out, name) for name in dict.fromkeys(names) if name in handover.order_of(recipe)}


def _key(recipe: Recipe, results: dict[str, StageResult]) -> str:
    settings = recipe.evaluate.model_dump(mode="json")
    return digest([FORMAT, settings, recipe.seed, {name: result.model.digest for name, result in results.items()}])


# ---------------------------------------------------------------- measure


def _measure(
    recipe: Recipe, out: str, results: dict[str, StageResult], items: list[Item], asked: list[Task]
) -> dict[str, Seen]:
    family = configs.family_of(recipe, out)
    other = {
        index: held_out.with_media_of(items[index], items[donor]) for index, donor in _donors(recipe, items).items()
    }
    blind = tasks.blindfolded(asked)
    progress = Progress("evaluate", len(results), "models")
    found: dict[str, Seen] = {}
    for number, (name, result) in enumerate(results.items()):
        model = opening.load_pretrained(opening.result_model(out, result))
        packed = losses.packed_model(model, family)
        one = Seen(right=_losses(packed, recipe, items, [item.encoded for item in items]))
        if name != handover.INIT:
            members = sorted(other)
            swapped = _losses(packed, recipe, items, [other[index] for index in members])
            one.shuffled = dict(zip(members, swapped, strict=True))
        if number in (0, len(results) - 1):
            one.answers = tasks.answer(model, asked, family)
            one.blind_answers = tasks.answer(model, blind, family)
        found[name] = one
        progress.at(number + 1, f"{name}: loss {_mean([loss.nats for loss in one.right]):.3f}")
        del model, packed
    return found


def _donors(recipe: Recipe, items: list[Item]) -> dict[int, int]:
    return held_out.donors(items, recipe.seed)


def _losses(packed: nn.Module, recipe: Recipe, items: list[Item], samples: Sequence[Any]) -> list[Loss]:
    packing = held_out.widest_stage(recipe).packing
    tokenizer, marks = items[0].rules.tokenizer, items[0].rules.family.markers
    return losses.sample_losses(
        packed,  # type: ignore[arg-type]
        samples,
        length=packing.length,
        patch_budget=packing.patch_budget,
        pad_id=tokenizer.id(marks.eos),
    )


# ---------------------------------------------------------------- tables


def table(items: list[Item], asked: list[Task], before: Seen, after: Seen) -> dict[str, dict[str, Any]]:
    """{kind: {metric: {"before", "after", "n"}}}; loss in nats per target token, means over samples."""
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(item.sample.kind for item in items):
        own = [index for index, item in enumerate(items) if item.sample.kind == kind]
        rows = found.setdefault(kind, {})
        rows["loss"] = _pair(*([one.right[index].nats for index in own] for one in (before, after)))
        pairs = [index for index in own if after.right[index].preferred is not None]
        if pairs:
            prefers = [[float((one.right[i].preferred or 0) > 0) for i in pairs] for one in (before, after)]
            rows["chosen_preferred"] = _pair(*prefers)
    for task in dict.fromkeys((task.item.sample.kind, task.key.task) for task in asked):
        own = [index for index, one in enumerate(asked) if (one.item.sample.kind, one.key.task) == task]
        found[task[0]] |= _task_rows(task[1], [asked[i] for i in own], own, before.answers, after.answers)
    blind = tasks.blindfolded(asked)
    for task in dict.fromkeys((task.item.sample.kind, task.key.task) for task in blind):
        own = [index for index, one in enumerate(blind) if (one.item.sample.kind, one.key.task) == task]
        rows = _task_rows(task[1], [blind[i] for i in own], own, before.blind_answers, after.blind_answers)
        found[task[0]] |= {f"{name}_text_only": row for name, row in rows.items() if name.endswith("_accuracy")}
    return found


def _task_rows(
    name: str, members: list[Task], places: list[int], before: list[str], after: list[str]
) -> dict[str, dict[str, Any]]:
    """Rows like colour_accuracy, box_iou; a figure that no answer of a model has (nothing readable) is null."""
    scored = [
        [tasks.score(task, answers[i]) for task, i in zip(members, places, strict=True)] for answers in (before, after)
    ]
    before_all, after_all = map(overall_scores, scored)
    rows = {}
    for figure in sorted({*before_all, *after_all}):
        label = f"{name}_accuracy" if figure == "correct" else f"{name}_{figure}"
        counted = sum(figure in one for one in scored[1])
        rows[label] = {"before": before_all.get(figure), "after": after_all.get(figure), "n": counted}
    return rows


def _pair(before: list[float], after: list[float]) -> dict[str, Any]:
    return {"before": _mean(before), "after": _mean(after), "n": len(after)}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def media_matter(items: list[Item], seen: Seen, seed: int) -> dict[str, Any]:
    """{kind: {"right", "shuffled", "n", "ci95"}} of one model."""
    found = {}
    for kind in dict.fromkeys(items[index].sample.kind for index in seen.shuffled):
        own = [index for index in seen.shuffled if items[index].sample.kind == kind]
        right = [seen.right[index].nats for index in own]
        found[kind] = losses.compare(right, [seen.shuffled[index].nats for index in own], seed=seed)
    return found


def _counts(items: list[Item]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item.sample.source] = counts.get(item.sample.source, 0) + 1
    return counts


# ---------------------------------------------------------------- predictions


def _write_predictions(out: str, asked: list[Task], before: Seen, after: Seen) -> list[dict[str, Any]]:
    """predictions.jsonl and pictures; what the report shows of them."""
    folder = storage.join(out, "evaluate")
    storage.remove_tree(storage.join(folder, "pictures"))
    shown: list[dict[str, Any]] = []
    lines = []
    for task, first, last in zip(asked, before.answers, after.answers, strict=True):
        scored = tasks.score(task, last)
        line = {
            "source": task.item.sample.source,
            "id": task.item.sample.id,
            "kind": task.item.sample.kind,
            "task": task.key.task,
            "question": task.question,
            "key": task.key.value,
            "before": first,
            "after": last,
            "scores_before": tasks.score(task, first),
            "scores_after": scored,
        }
        picture = pictures.draw(task, last) if len(shown) < MAX_PICTURES else None
        if picture is not None:
            line["picture"] = f"pictures/{len(shown):02d}.png"
            storage.write_bytes(storage.join(folder, line["picture"]), picture)
            shown.append({name: line[name] for name in ("picture", "task", "question", "key", "after", "scores_after")})
        lines.append(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    storage.write_bytes(storage.join(folder, "predictions.jsonl"), "".join(lines).encode())
    return shown


def main() -> None:
    recipe, arguments = opening.asked(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    found = evaluate(recipe, arguments.out)
    for kind, rows in found["evaluation"].items():
        loss = rows["loss"]
        print(f"evaluate: {kind}: held-out loss {loss['before']:.3f} -> {loss['after']:.3f} ({loss['n']} samples)")
    print(f"evaluate: {found['wall_s']:.0f} s")


if __name__ == "__main__":
    opening.run_program(main)

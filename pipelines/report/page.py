"""The page of a run: HTML with everything inside, made from Facts. Sections in the order in which a reader asks."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from pipelines.report import charts
from pipelines.report.charts import Box, bar_chart, escape, interval_chart, line_chart, lineage_chart
from pipelines.report.facts import Facts, StageFacts, stage_json, warnings
from trainer.handover import result_digest
from trainer.recipe import STAGES

Cell = str | tuple[str, str]
"""HTML, or (HTML, class)."""


def page(facts: Facts) -> str:
    style = (resources.files("pipelines.report") / "style.css").read_text(encoding="utf-8")
    sections = [
        _section("Lineage", "What each model grew from. Digests are of the stage results.", _lineage(facts)),
        _section("Training", "Loss by step: raw values pale, running mean strong.", _training(facts)),
        _section(
            "Freeze proof",
            "Digests of every module group before and after; the stage fails if they disagree.",
            _freeze(facts),
        ),
        _section("The pictures matter", _MATTER, _matter(facts)),
        _section("Held-out scores", _HELD_OUT, _scores(facts)),
        _section(
            "Predictions", "Held-out pictures: the true place in green, the model's answer in red.", _pictures(facts)
        ),
        _section("Own answers", "Sampled from this run's own models, compared with the answer key.", _sampling(facts)),
        _section("Packing", "Packs of each stage; fill is real tokens over the room of all packs.", _packing(facts)),
        _section("Data", "Rows read from each source's files, and what became of them.", _funnel(facts)),
        _section("Times", "", _times(facts)),
    ]
    title = f"{facts.recipe.name}: report"
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style></head><body><main>"
        f"{_head(facts)}{''.join(sections)}{_foot(facts)}</main></body></html>\n"
    )


_MATTER = (
    "Loss with media exchanged between samples of the same kind, less the loss with the right ones, paired by sample, "
    "with its 95 % interval. Right of zero: the model uses what it sees."
)
_HELD_OUT = "The model before training and the final one, on samples that no stage saw. Loss in nats per target token."


# ---------------------------------------------------------------- frame


def _head(facts: Facts) -> str:
    tokens = sum(stage.result.metrics.get("tokens", 0) for stage in facts.stages)
    tiles = [
        ("stages", str(len(facts.stages))),
        ("steps", str(sum(stage.result.metrics.get("steps", 0) for stage in facts.stages))),
        ("tokens", charts.short(tokens)),
        ("wall time", _time(facts.wall_s)),
        ("frozen unchanged", _yes(all(stage.frozen_unchanged for stage in facts.stages))),
        ("pictures matter", _matter_told(facts)),
    ]
    shown = "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles
    )
    return (
        f"<header><h1>{escape(facts.recipe.name)}</h1><p>{escape(facts.recipe.description)}</p>"
        f"<p class='quiet'>family {escape(facts.recipe.family)}, recipe {_digest(facts.digest)}</p></header>"
        f"<div class='tiles'>{shown}</div>"
    )


def _matter_told(facts: Facts) -> str:
    found = [kind for stage in facts.evaluation.get("media_matter", {}).values() for kind in stage.values()]
    return f"{sum(kind['ci95'][0] > 0 for kind in found)} of {len(found)}" if found else "not measured"


def _section(title: str, told: str, body: str) -> str:
    lead = f"<p class='lead'>{escape(told)}</p>" if told else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body or _nothing()}</section>"


def _nothing() -> str:
    return "<p class='quiet'>Not in this run, or not yet.</p>"


def _foot(facts: Facts) -> str:
    told = "results, plans, committed metrics and evaluation.json; run.json has the same facts"
    return f"<footer>Made from {escape(facts.out)}: {told}.</footer>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, numbers: int = 99) -> str:
    """Columns from `numbers` on are right-aligned."""
    top = "".join(f"<th{_right(at, numbers)}>{escape(name)}</th>" for at, name in enumerate(head))
    body = ""
    for row in rows:
        cells = ""
        for at, cell in enumerate(row):
            text, kind = cell if isinstance(cell, tuple) else (cell, "")
            classes = " ".join(part for part in (kind, "n" if at >= numbers else "") if part)
            cells += f"<td class='{classes}'>{text}</td>" if classes else f"<td>{text}</td>"
        body += f"<tr>{cells}</tr>"
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _right(at: int, numbers: int) -> str:
    return " class='n'" if at >= numbers else ""


def _digest(value: str) -> str:
    return f"<code title='{escape(value)}'>{escape(value[:12])}</code>" if value else "-"


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return _yes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


# ---------------------------------------------------------------- sections


def _lineage(facts: Facts) -> str:
    kept = sum(split["kept"] for source in facts.funnel.values() for split in source.values())
    boxes = [Box("data", (f"{kept:,} samples", f"{len(facts.funnel)} sources"))]
    place: dict[str, int] = {}
    results = ([("init", facts.init)] if facts.init else []) + [(stage.name, stage.result) for stage in facts.stages]
    for name, result in results:
        place[name] = len(boxes)
        boxes.append(Box(name, (result_digest(result)[:10], _time(result.wall_s))))
    if facts.export:
        boxes.append(Box("export", (facts.export["model"][:10], f"{len(facts.export['files'])} files"), strong=True))
    side = []
    for name, found in facts.sampling.items():
        if name in place:
            lines = (f"{found.get('kept', 0)} kept of {found.get('answers', 0)} answers",)
            side.append((place[name] - 1, place[name], Box(f"prepare-{name}", lines)))
    origins = facts.init.init_origin if facts.init else {}
    told = ", ".join(f"{group} from {origin}" for group, origin in sorted(origins.items()))
    return lineage_chart(boxes, side) + (f"<p class='quiet'>First weights: {escape(told)}.</p>" if told else "")


def _training(facts: Facts) -> str:
    return f"<div class='panels'>{''.join(_panel(stage) for stage in facts.stages)}</div>" if facts.stages else ""


def _panel(stage: StageFacts) -> str:
    found = stage_json(stage)
    points = [(row.step, row.values["loss"]) for row in stage.rows if "loss" in row.values]
    chips = "".join(f"<span class='chip {state}'>{group} {state}</span>" for group, state in stage.freeze.items())
    rows = [
        ("loss", f"{_number(found['loss_first'])} → {_number(found['loss_last'])}"),
        ("steps", _number(found["steps"])),
        ("tokens", _number(found["tokens"])),
        ("packing length", _number(found["packing_length"])),
        ("patch budget", _number(found["patch_budget"])),
        ("ranks", _number(found["world_size"])),
    ]
    if "accuracy" in found:
        rows += [("accuracy", _number(found["accuracy"])), ("margin", _number(found["margin"]))]
    held = stage.result.metrics
    if held.get("held_out_before", {}).get("loss") is not None:
        before, after = held["held_out_before"]["loss"], held["held_out_after"].get("loss")
        rows.append(("held-out loss", f"{_number(before)} → {_number(after)}"))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in rows)
    marks = [(found["resumed_from"], "resumed here")] if found["resumed_from"] else []
    return (
        f"<div class='panel'><h3>{escape(stage.name)}</h3><div class='chips'>{chips}</div>"
        f"{line_chart(points, label=f'loss of {stage.name}', marks=marks)}<dl>{listed}</dl></div>"
    )


def _freeze(facts: Facts) -> str:
    rows: list[list[Cell]] = []
    for stage in facts.stages:
        for row in stage.result.freeze_table:
            same = row.digest_before == row.digest_after
            good = same if row.state != "trained" else not same
            rows.append(
                [
                    escape(stage.name),
                    escape(row.group) + (f" <span class='quiet'>({escape(row.reason)})</span>" if row.reason else ""),
                    f"<span class='chip {row.state}'>{row.state}</span>",
                    _number(row.parameters),
                    _digest(row.digest_before),
                    _digest(row.digest_after),
                    ("unchanged" if same else "changed", "good" if good else "bad"),
                ]
            )
    head = ("stage", "group", "state", "parameters", "digest before", "digest after", "bytes")
    return _table(head, rows) if rows else ""


def _matter(facts: Facts) -> str:
    parts = []
    measured = facts.evaluation.get("media_matter", {})
    for stage in sorted(measured, key=STAGES.index):
        kinds = measured[stage]
        rows = [(kind, found["shuffled"] - found["right"], *found["ci95"]) for kind, found in kinds.items()]
        table = _table(
            ("kind", "right media", "other media", "samples"),
            [[escape(k), _number(f["right"]), _number(f["shuffled"]), _number(f["n"])] for k, f in kinds.items()],
            numbers=1,
        )
        chart = interval_chart(rows, label=f"loss with other media less loss with the right ones, after {stage}")
        parts.append(f"<div><h3>after {escape(stage)}</h3>{chart}{table}</div>")
    return f"<div class='two'>{''.join(parts)}</div>" if parts else ""


LOWER_IS_BETTER = ("loss", "error", "distance")


def _scores(facts: Facts) -> str:
    rows: list[list[Cell]] = []
    for kind, metrics in facts.evaluation.get("evaluation", {}).items():
        for name, found in sorted(metrics.items(), key=lambda item: (item[0] != "loss", item[0])):
            before, after = found["before"], found["after"]
            verdict: Cell = "-"
            if before is not None and after is not None:
                better = after < before if any(word in name for word in LOWER_IS_BETTER) else after > before
                verdict = (f"{after - before:+.3f}", "good" if better else "even" if after == before else "bad")
            rows.append(
                [
                    escape(kind),
                    escape(name.replace("_", " ")),
                    _number(before),
                    _number(after),
                    verdict,
                    _number(found["n"]),
                ]
            )
    return _table(("kind", "metric", "before", "after", "change", "n"), rows, numbers=2) if rows else ""


def _pictures(facts: Facts) -> str:
    parts = []
    for entry in facts.evaluation.get("pictures", []):
        data = facts.pictures.get(entry["picture"])
        if data is None:
            continue
        asked = entry["question"] or entry["task"]
        scores = ", ".join(f"{name} {value:.2f}" for name, value in entry["scores_after"].items())
        parts.append(
            f"<figure><img alt='{escape(asked)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
            f"<figcaption><b>{escape(asked)}</b><br><span class='answer'>{escape(entry['after'][:160])}</span><br>"
            f"<span class='quiet'>{escape(scores)}</span></figcaption></figure>"
        )
    return f"<div class='gallery'>{''.join(parts)}</div>" if parts else ""


def _sampling(facts: Facts) -> str:
    names = ("requests", "answers", "correct", "incorrect", "unfinished", "errors", "repeated", "refused", "kept")
    rows = [
        [escape(f"prepare-{stage}"), *(_number(found.get(name)) for name in names)]
        for stage, found in facts.sampling.items()
    ]
    tables = _table(("step", *names), rows, numbers=1) if rows else ""
    for stage, found in facts.sampling.items():
        tasks = found.get("of_task", {})
        columns = sorted({name for counts in tasks.values() for name in counts})
        if refused := found.get("of_check"):
            told = ", ".join(f"{escape(check)} {count:,}" for check, count in refused.items())
            tables += f"<p class='quiet'>prepare-{escape(stage)}: correct answers refused by {told}.</p>"
        if tasks:
            lines = [
                [escape(task), *(_number(counts.get(name, 0)) for name in columns)] for task, counts in tasks.items()
            ]
            tables += f"<h3>prepare-{escape(stage)} by task</h3>" + _table(("task", *columns), lines, numbers=1)
    return tables


def _packing(facts: Facts) -> str:
    rows: list[list[Cell]] = []
    for stage in facts.stages:
        found, known = stage_json(stage), stage.plan.get("statistics", {})
        dropped: dict[str, int] = {}
        for source in stage.plan.get("sources", []):
            for reason, count in source.get("drops", {}).items():
                dropped[reason] = dropped.get(reason, 0) + count
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "0"
        rows.append(
            [
                escape(stage.name),
                _digest(found["plan_digest"]),
                _number(found["packing_length"]),
                _number(stage.result.metrics.get("packs")),
                _number(known.get("samples")),
                _number(found["tokens"]),
                _number(found["target_tokens"]),
                _number(found["padding_tokens"]),
                _share(found["fill"]),
                _share(known.get("patch_fill")),
                escape(told),
            ]
        )
    head = (
        "stage",
        "plan",
        "length",
        "packs",
        "samples",
        "tokens",
        "targets",
        "padding",
        "fill",
        "patch fill",
        "dropped",
    )
    told = "".join(f"<p class='warning'>{escape(field)}: {escape(text)}</p>" for field, text in warnings(facts))
    return told + _table(head, rows, numbers=2) if rows else ""


def _funnel(facts: Facts) -> str:
    rows: list[list[Cell]] = []
    for name, splits in sorted(facts.funnel.items()):
        source = facts.recipe.prepare.sources.get(name)
        for split, found in sorted(splits.items(), reverse=True):
            bad = ", ".join(f"{count} {reason}" for reason, count in sorted(found.get("bad", {}).items())) or "0"
            bad += "".join(f"; kept: {count} {what}" for what, count in sorted(found.get("noted", {}).items()))
            kind, licence = (source.kind, source.licence) if source else ("-", "-")
            cells = (name, kind, split.replace("_", " "), licence)
            rows.append([*map(escape, cells), _number(found["read"]), _number(found["kept"]), escape(bad)])
    table = _table(("source", "kind", "split", "licence", "read", "kept", "refused"), rows, numbers=4) if rows else ""
    return table + _made(facts) + _curated(facts)


def _made(facts: Facts) -> str:
    """What became of the objects and questions of sources that are made from others."""
    rows: list[list[Cell]] = []
    for name, splits in sorted(facts.funnel.items()):
        for split, found in sorted(splits.items(), reverse=True):
            for what, count in found.get("made", {}).items():
                rows.append([escape(name), escape(split.replace("_", " ")), escape(what), _number(count)])
    return "<h3>Made from other sources</h3>" + _table(("source", "split", "what", "count"), rows) if rows else ""


def _curated(facts: Facts) -> str:
    """What each filter of curation dropped, in the order in which they look, with examples."""
    parts = ""
    for name, splits in sorted(facts.funnel.items()):
        found = splits.get("train", {}).get("curated")
        if found is None:
            continue
        left, rows = found["read"], []
        for reason, count in found["dropped"].items():
            left -= count
            shown = [
                f"{escape(str(one['id']))} <span class='quiet'>{escape(str(one['value']))}</span>"
                for one in found["examples"].get(reason, [])
            ]
            limit = next((one["threshold"] for one in found["examples"].get(reason, [])), "")
            rows.append([escape(reason), escape(limit), _number(count), _number(left), ", ".join(shown)])
        kept = ", ".join(escape(one) for one in found.get("kept_examples", []))
        told = f"Kept {found['kept']:,} of {found['read']:,}: {kept}"
        for who in ("judge", "domain_judge", "quality_judge"):
            counts = ", ".join(f"{count} {what}" for what, count in found.get(who, {}).items())
            told += f". {who.replace('_', ' ').capitalize()}: {counts}" if counts else ""
        parts += f"<h3>{escape(name)}, curated</h3>" + _table(("filter", "stays", "dropped", "left", "examples"), rows)
        parts += f"<p class='quiet'>{told}</p>"
        lines: list[list[Cell]] = [
            [escape(domain), escape(sub_domain), _number(counts["read"]), _number(counts["kept"])]
            for domain, section in found.get("domains", {}).items()
            for sub_domain, counts in section.items()
        ]
        parts += _table(("domain", "sub-domain", "read", "kept"), lines, numbers=2) if lines else ""
    return parts


def _times(facts: Facts) -> str:
    known = [("init", facts.init.wall_s)] if facts.init else []
    known += [(stage.name, stage.result.wall_s) for stage in facts.stages]
    if facts.evaluation:
        known.append(("evaluate", facts.evaluation.get("wall_s", 0.0)))
    chart = bar_chart([(name, seconds, _time(seconds)) for name, seconds in known], label="wall time of each program")
    rows: list[list[Cell]] = []
    for stage in facts.stages:
        for event in stage.events:
            told = {
                key: value for key, value in event.items() if key not in ("event", "time", "attempt", "args", "module")
            }
            rows.append(
                [
                    escape(stage.name),
                    _number(event.get("attempt")),
                    escape(event.get("time", "")),
                    escape(event.get("event", "")),
                    f"<span class='quiet'>{escape(json.dumps(told, ensure_ascii=False)[:300])}</span>",
                ]
            )
    table = _table(("stage", "attempt", "time", "event", "facts"), rows)
    events = f"<details><summary>{len(rows)} events of all attempts</summary>{table}</details>"
    return (chart if known else "") + (events if rows else "")

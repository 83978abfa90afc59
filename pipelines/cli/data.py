"""qwenvl data ingest|check|stats|preview|prepare|annotate: files in public formats to shards, and what is in them."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.cli import annotate
from pipelines.cli.changes import add_changes
from trainer.errors import DataError, UsageError

SHOWN = 50
"""Problems that check prints in full."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="qwenvl data", description=__doc__)
    what = made.add_subparsers(dest="what", required=True)
    ingest = what.add_parser("ingest", help="files in a public format to shards")
    ingest.add_argument("sources", nargs="+", metavar="SOURCE", help="annotation file, folder, glob or URI")
    ingest.add_argument("--out", required=True, metavar="URI", help="folder or s3:// address of the shards")
    ingest.add_argument("--format", default="auto", help="a reader's name (pipelines/prepare/README.md); default: auto")
    ingest.add_argument("--media", metavar="URI", help="where relative media paths start; default: beside each SOURCE")
    ingest.add_argument("--kind", help="caption, grounding, instruction, ...; default: what the format mostly is")
    ingest.add_argument("--rendering", choices=("document", "chat"), help="default: what the format mostly is")
    ingest.add_argument("--name", help="name of the source in the samples; default: the last part of --out")
    ingest.add_argument(
        "--split", choices=("train", "held_out"), default="train", help="what the shards are for (default train)"
    )
    ingest.add_argument(
        "--max-bad-fraction", type=float, default=0.0, help="share of rows that may be refused (default 0)"
    )
    ingest.add_argument(
        "--verify-media",
        choices=("decode", "header"),
        default="decode",
        help="decode every picture and video, or trust what their headers say (default decode)",
    )
    ingest.add_argument("--replace", action="store_true", help="replace shards of another input in --out")
    ingest.add_argument("--confined", action="store_true", help="rows with media outside of the media folder are bad")
    ingest.add_argument(
        "--engine", choices=("native", "ray"), default="native", help="this machine, or a Ray cluster (default native)"
    )
    check = what.add_parser("check", help="read every byte: digests and each sample's own rules; exit code 64 if wrong")
    stats = what.add_parser("stats", help="counts, sizes and lengths")
    stats.add_argument("--json", action="store_true", help="JSON instead of text")
    preview = what.add_parser("preview", help="a page that shows samples with what is drawn on them")
    preview.add_argument("--html", required=True, metavar="FILE", help="the page to write")
    preview.add_argument("--samples", type=int, default=24, help="of each source, evenly spaced (default 24)")
    for one in (check, stats, preview):
        one.add_argument("uri", metavar="URI", help="shards, or an output or folder above some")
    prepare = what.add_parser("prepare", help="a recipe's data: corpus, every source, tokenizer; and the funnel")
    prepare.add_argument("recipe", help="shipped name, file or URI")
    prepare.add_argument("--out", required=True, metavar="URI", help="folder or s3:// address of a run's output")
    add_changes(prepare)
    annotate.add_to(what)
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    run = {"ingest": _ingest, "check": _check, "stats": _stats, "preview": _preview, "prepare": _prepare}
    with _stopped_at_once() if asked.what in ("ingest", "prepare") else contextlib.nullcontext():
        return {**run, "annotate": annotate.main}[asked.what](asked)


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Ctrl-C ends the process where it is: Daft takes a KeyboardInterrupt for a block without rows, and its threads
    abort Python's way out. The next one clears or finishes what is half-written, as after a kill."""
    from pipelines import processes

    def stop(*_: object) -> None:
        print("stopped", file=sys.stderr, flush=True)
        processes.end_all_and_leave(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- ingest


def _ingest(asked: argparse.Namespace) -> int:
    from pipelines import lease

    out = asked.out.rstrip("/") or "/"
    with lease.held(out):
        return _ingest_alone(asked, out)


def _ingest_alone(asked: argparse.Namespace, out: str) -> int:
    from pydantic import ValidationError

    from pipelines.prepare.annotations import annotation_files
    from pipelines.prepare.formats import format_of, problems_of_sources, usual
    from pipelines.prepare.ingest import Place, write_source
    from trainer.errors import RecipeError
    from trainer.problems import problems_of
    from trainer.recipe import Prepare, Source

    refuse_other_content(out, asked.sources)
    files = sorted({file for source in asked.sources for file in annotation_files(source, where="SOURCE")})
    found = {file: format_of(asked.format, file) for file in files}
    usually = {usual(name, file) for file, name in found.items() if name in _known()}
    if (asked.kind is None or asked.rendering is None) and len(usually) > 1:
        told = "; ".join(f"{name}: {_files_of(name, found)}" for name in sorted(set(found.values())))
        raise UsageError("files of several kinds", where=told, do="say --kind and --rendering, or ingest one at a time")
    kind, rendering = next(iter(usually), ("instruction", "chat"))
    name = asked.name or _slug(out.rpartition("/")[2])
    stated = {"kind": asked.kind or kind, "rendering": asked.rendering or rendering, "media": asked.media}
    stated |= {"confined": asked.confined}
    try:
        source = Source.model_validate({"format": asked.format, "path": asked.sources[0], **stated})
        prepare = Prepare.model_validate(
            {
                "sources": {name: source.model_dump()},
                "engine": asked.engine,
                "max_bad_fraction": asked.max_bad_fraction,
                "verify_media": asked.verify_media,
            }
        )
    except ValidationError as error:
        raise RecipeError(as_options(problems_of(error, Prepare)), subject="the command") from None
    if problems := problems_of_sources({name: source}):
        raise RecipeError(as_options(problems), subject="the command")
    place = Place(name, asked.split, out, "SOURCE", out, limit="--max-bad-fraction", replace=asked.replace)
    funnel = write_source(prepare, source, place, files, asked.media, [])
    print(funnel_table({name: {asked.split: funnel}}))
    return 0


def _files_of(name: str, found: dict[str, str]) -> str:
    """The files of a format, three of them named."""
    files = [file for file, of in found.items() if of == name]
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def as_options(problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Problems of a recipe's fields, by the options of `qwenvl data ingest` that give them."""
    return [(_option(field.rpartition(".")[2]), told) for field, told in problems]


def _option(field: str) -> str:
    return {"path": "SOURCE", "[key]": "--name"}.get(field, f"--{field.replace('_', '-')}")


def _known() -> tuple[str, ...]:
    from pipelines.prepare.formats import FORMATS

    return FORMATS


def _slug(word: str) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_")[:40].strip("_") or "data"


def refuse_other_content(out: str, sources: list[str]) -> None:
    """Shards are written into a folder of their own, which is emptied when they are whole: never one that holds
    anything else, whatever it is called. What an ingest that was killed has left is finished or cleared by the next."""
    from pipelines.prepare import swap
    from trainer import storage
    from trainer.data.shards import MANIFEST

    inside = [source for source in sources if source.rstrip("/") == out or source.startswith(f"{out}/")]
    names = storage.list_dir(out)
    others = [name for name in names if not is_of_shards(name)]
    if MANIFEST in names:
        others += [MANIFEST] * (not _is_manifest(storage.read_bytes(storage.join(out, MANIFEST))))
    elif not storage.exists(storage.join(swap.beside(out), MANIFEST)):  # swap.take: the old one leaves first
        others = names
    if inside or others:
        got = inside[0] if inside else f"{len(others)} other files: {', '.join(others[:4])}"
        do = "choose another --out"
        raise UsageError("--out is not a folder of its own", where=out, expected="nothing, or shards", got=got, do=do)


def _is_manifest(data: bytes) -> bool:
    try:
        content = json.loads(data)
    except ValueError:
        return False
    return isinstance(content, dict) and {"format", "num_samples", "shards", "digest"} <= content.keys()


def is_of_shards(name: str) -> bool:
    """Whether a file of this name is one that a folder of shards has: NNNNN.tar, NNNNN.COLUMN.parquet and its JSON."""
    import re

    from pipelines.prepare.resumable import LAST
    from trainer.data.kept import CURATION

    return name in (*LAST, CURATION) or re.fullmatch(r"\d{5,}\.(tar|[\w-]+\.parquet)", name) is not None


def funnel_table(funnel: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Rows read, kept and refused of every source and split, with the reasons, and what is told of kept ones."""
    rows = [("source", "split", "read", "kept", "refused")]
    for name, splits in funnel.items():
        for split, part in splits.items():
            told = ", ".join(f"{count:,} {reason}" for reason, count in part.get("bad", {}).items()) or "-"
            rows.append((name, split, f"{part['read']:,}", f"{part['kept']:,}", told))
            if noted := part.get("noted"):
                rows.append(("", "noted", "", "", ", ".join(f"{n:,} {what}" for what, n in noted.items())))
            if dropped := (part.get("curated") or {}).get("dropped"):
                left = f"{part['curated']['kept']:,}"
                rows.append(("", "curated", "", left, ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())))
            if made := part.get("made"):
                rows.append(("", "made", "", "", ", ".join(f"{n:,} {what}" for what, n in made.items())))
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    aligned = []
    for row in rows:
        cells = [
            cell.rjust(width) if at in (2, 3) else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned)


# ---------------------------------------------------------------- what is there


def _check(asked: argparse.Namespace) -> int:
    from pipelines.prepare.stored import as_problem, folders_below, opened, problems

    found: list[str] = []
    count = 0
    for folder in folders_below(asked.uri):
        before = count
        try:
            source = opened(folder)
            size, wrong = f"{source.num_samples} samples in {source.num_shards} shards", problems(source)
        except DataError as error:  # the others are looked at all the same
            size, wrong = "not looked into", iter([as_problem(error)])
        for problem in wrong:
            count += 1
            if len(found) < SHOWN:
                found.append(problem)
        seen = "every byte and every sample is right" if count == before else _problems(count - before)
        print(f"{folder}: {size}; {seen}", flush=True)
    if count:
        more = [f"... and {count - len(found)} more"] if count > len(found) else []
        listed = "\n    ".join([*found, *more])
        do = "prepare or ingest the source again; look at the disk or the transfer"
        raise DataError(f"{_problems(count)} in stored data", where=asked.uri, got=f"\n    {listed}", do=do)
    return 0


def _problems(count: int) -> str:
    return f"{count} problem{'s' if count > 1 else ''}"


def _stats(asked: argparse.Namespace) -> int:
    from pipelines.prepare.stored import sources_below, statistics, statistics_text

    found = [statistics(source) for source in sources_below(asked.uri)]
    print(json.dumps(found, indent=1, ensure_ascii=False) if asked.json else "\n\n".join(map(statistics_text, found)))
    return 0


def _preview(asked: argparse.Namespace) -> int:
    from pipelines.prepare.preview.page import write_preview
    from pipelines.prepare.stored import sources_below

    if asked.samples < 1:
        raise UsageError("not a number of samples", where="--samples", expected="1 or more", got=asked.samples)
    shown = write_preview(sources_below(asked.uri), asked.html, samples=asked.samples)
    print(f"{asked.html}: {shown} samples, {Path(asked.html).stat().st_size / 1e6:.1f} MB")
    return 0


# ---------------------------------------------------------------- prepare


def _prepare(asked: argparse.Namespace) -> int:
    from pipelines import lock
    from pipelines.prepare.ingest import prepare_data
    from pipelines.settle import NAME, asked_recipe, settle
    from trainer import storage

    named = {"recipe": asked.recipe, "overrides": asked.overrides, "base_model": asked.base_model}
    recipe = asked_recipe(**named)
    with lock.held(asked.out):
        if storage.exists(storage.join(asked.out, NAME)):  # data alone settle nothing: a run that comes does
            settle(**named, out=asked.out, accept=asked.accept_changes)
        prepare_data(recipe, asked.out)
    print(funnel_table(storage.read_json(storage.join(asked.out, "data", "funnel.json"))))
    return 0

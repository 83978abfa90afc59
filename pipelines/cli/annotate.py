"""qwenvl data annotate export|import: people write or correct the reasoning of the steps of trajectories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer.errors import UsageError

TRAJECTORIES = 25


def add_to(commands: Any) -> None:
    """The command and its two halves, in the parser of `qwenvl data`."""
    annotate = commands.add_parser("annotate", help="people write or correct the reasoning of steps")
    way = annotate.add_subparsers(dest="way", required=True)
    out = way.add_parser("export", help="steps.jsonl, and a page with screenshots on which words are written")
    out.add_argument("uri", metavar="SHARDS", help="one source's shards")
    out.add_argument("--out", required=True, metavar="FOLDER", help="where the page and steps.jsonl go")
    out.add_argument("--samples", type=int, default=TRAJECTORIES, help=f"trajectories (default {TRAJECTORIES})")
    out.add_argument("--first", type=int, default=0, help="number of the first one, from 0 (default 0)")
    back = way.add_parser("import", help="new shards with the words that people wrote")
    back.add_argument("uri", metavar="SHARDS", help="the shards that were exported")
    back.add_argument("answers", metavar="ANSWERS.jsonl", help="what the page saved, or steps.jsonl as edited")
    back.add_argument("--out", required=True, metavar="SHARDS", help="folder or s3:// address of the new shards")
    back.add_argument("--max-bad-fraction", type=float, default=0.0, help="share of answers that may be refused")
    back.add_argument("--replace", action="store_true", help="replace shards of another input in --out")


def main(asked: argparse.Namespace) -> int:
    return _export(asked) if asked.way == "export" else _import(asked)


def _source(uri: str) -> Any:
    from pipelines.prepare.stored import sources_below

    found = sources_below(uri)
    if len(found) > 1:
        told = "\n    ".join(source.uri for source in found)
        raise UsageError("several sources", where=uri, expected="the shards of one", got=f"\n    {told}")
    return found[0]


def _export(asked: argparse.Namespace) -> int:
    from pipelines.prepare.reasoning.annotate import PAGE, STEPS, export

    if asked.samples < 1 or asked.first < 0:
        raise UsageError("not a range of trajectories", where="--samples, --first", expected="1 or more, 0 or more",
                         got=f"{asked.samples}, {asked.first}")  # fmt: skip
    found = export(_source(asked.uri), asked.out, samples=asked.samples, first=asked.first)
    size = Path(asked.out, PAGE).stat().st_size / 1e6
    told = f"{found['trajectories']} of {found['of']} trajectories, {found['steps']} steps"
    print(f"{asked.out}/{PAGE}, {STEPS}: {told}, {found['without reasoning']} without reasoning; {size:.1f} MB")
    if (left := found["of"] - asked.first - found["trajectories"]) > 0:
        print(f"{left} more follow: --first {asked.first + found['trajectories']} and another --out")
    return 0


def _import(asked: argparse.Namespace) -> int:
    from pipelines.cli.data import refuse_other_content
    from pipelines.prepare.reasoning.annotate import take

    if not 0 <= asked.max_bad_fraction < 1:
        raise UsageError("not a share", where="--max-bad-fraction", expected="0 to 1", got=asked.max_bad_fraction)
    source, out = _source(asked.uri), asked.out.rstrip("/")
    refuse_other_content(out, [source.uri])
    found = take(source, asked.answers, out, replace=asked.replace, max_bad_fraction=asked.max_bad_fraction)
    for name, count in {"answers": found["read"], **found["made"]}.items():
        print(f"{count:>8,} {name}")
    for name, count in found["bad"].items():
        print(f"{count:>8,} answers refused: {name}")
    return 0

"""--set, --base-model, --accept-change: what is changed of a recipe, the same for every command that takes one."""

from __future__ import annotations

import argparse


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="change a field of the recipe, the value in YAML (null removes an optional section); may be repeated",
    )


def add_changes(parser: argparse.ArgumentParser) -> None:
    add_set(parser)
    parser.add_argument("--base-model", default="", metavar="URI", help="a model instead of the recipe's own beginning")
    parser.add_argument(
        "--accept-change",
        dest="accept_changes",
        action="append",
        default=[],
        metavar="FIELD",
        help="a result field that may differ from what a begun stage was made with; may be repeated",
    )

"""--host, --namespace and KFP_TOKEN: where Kubeflow Pipelines answers, for every command that talks to it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.remote import Place


def add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default=os.environ.get("KF_PIPELINES_ENDPOINT"), help="its API; default: KF_PIPELINES_ENDPOINT"
    )
    parser.add_argument(
        "--namespace",
        default=os.environ.get("KFP_NAMESPACE"),
        help="your profile's, where Kubeflow has several users; default: KFP_NAMESPACE, else none",
    )


def place_of(asked: argparse.Namespace) -> Place:
    from pipelines.remote import Place

    host = asked.host.rstrip("/") if asked.host else None
    if host and "://" not in host:
        host = f"https://{host}"  # as kfp itself reads it
    return Place(host, asked.namespace or None, os.environ.get("KFP_TOKEN"))

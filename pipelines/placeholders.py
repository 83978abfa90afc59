"""What a cluster file still has of the example that it was copied from.

unfilled(cluster)    what no cluster can run with: the example's image digests, <...>
reserved(cluster)    host names that are kept for examples, which a network of one's own might still have
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from k8s.cluster import Cluster, example_images

UNFILLED = re.compile(r"<[A-Za-z][\w .-]*>")
RESERVED = re.compile(r"(?:^|[/.@])example(?:\.(?:com|net|org))?(?=[:/]|$)", re.IGNORECASE)
"""RFC 2606: no public server ever has such a name."""


def unfilled(cluster: Cluster) -> list[tuple[str, str]]:
    """(field, what it is and what to do)."""
    digests = [
        (
            f"images.{name}",
            "the example's digest, which no registry has; build the image (images/README.md) and give "
            "REPOSITORY@sha256:...",
        )
        for name in example_images(cluster)
    ]
    return digests + [(at, f"{text} is still to be filled in") for at, text in _texts(cluster) if UNFILLED.search(text)]


def reserved(cluster: Cluster) -> list[tuple[str, str]]:
    """(field, what it is), without images, whose digests tell more."""
    return [
        (at, f"{text} is an example's address (RFC 2606); give your own")
        for at, text in _texts(cluster)
        if RESERVED.search(text) and not at.startswith("images.")
    ]


def _texts(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """(field, value) of every text in the file."""
    return _below(cluster.model_dump(mode="json"), "")


def _below(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield at, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from _below(one, f"{at}.{key}" if at else str(key))

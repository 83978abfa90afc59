"""Pages of scores are named and not carried: PATH#score=N, N from 1. Imports nothing of what draws them."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"^(?P<path>.+)#score=(?P<number>\d+)$")


def address(path: str, number: int) -> str:
    return f"{path}#score={number}"


def is_score_page(uri: str) -> bool:
    return _ADDRESS.match(uri) is not None


def place_of(uri: str) -> tuple[str, int]:
    """(path, number)"""
    found = _ADDRESS.match(uri)
    assert found is not None, uri
    return found["path"], int(found["number"])

"""Domains of conversations: domains.yaml as values. Torch-free."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import yaml


class SubDomain(NamedTuple):
    domain: str
    name: str
    about: str
    """One line, for the judge."""
    published: bool
    """Named by the Qwen2.5-VL report; the others are ours."""
    needs: str
    """image or video: the medium that a question of it is about; else empty."""
    words: tuple[str, ...]
    """What questions of it say, for the rules."""


@lru_cache(maxsize=1)
def sub_domains() -> tuple[SubDomain, ...]:
    """All of them, in the file's order."""
    text = (resources.files("trainer") / "domains.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return tuple(
        SubDomain(
            domain=domain,
            name=name,
            about=facts["about"],
            published=facts["source"] == "published",
            needs=facts.get("needs", ""),
            words=tuple(word.strip() for word in facts["words"].split(",")),
        )
        for domain, section in content.items()
        for name, facts in section["sub_domains"].items()
    )


def names() -> tuple[str, ...]:
    """Of the domains, then of the sub-domains."""
    found = sub_domains()
    return (*dict.fromkeys(one.domain for one in found), *(one.name for one in found))

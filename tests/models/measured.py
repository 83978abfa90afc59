"""What the rules measured, stored: tests/golden/families.json, family -> rule -> figure -> value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "golden" / "families.json"


def stored() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def store(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Added to what is there: a run of some families or rules leaves the others."""
    known = stored()
    for family, rules in found.items():
        for rule, figures in rules.items():
            known.setdefault(family, {}).setdefault(rule, {}).update(figures)
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def told(value: Any) -> str:
    return (
        f"{value:.1e}"
        if isinstance(value, float) and (abs(value) < 1e-2 or abs(value) >= 1e4)
        else (f"{value:.3g}" if isinstance(value, float) else str(value))
    )

"""Is an object one that an API server with fieldValidation=Strict would take? Checked against the committed schemas.

    problems(manifest)  -> ["spec.template.spec.containers[0].imag: unknown field", ...]; empty when it is valid

Custom resources are known as far as their CRDs are committed. What only a server knows (admission, quota, names in use)
is not checked here. jsonschema is a development dependency.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

HERE = Path(__file__).parent


@cache
def _schemas() -> tuple[dict[str, Any], dict[str, Any]]:
    """(kind -> schema, definitions)."""
    kubernetes = json.loads((HERE / "kubernetes.json").read_text(encoding="utf-8"))
    kinds: dict[str, Any] = {kind: {"$ref": f"#/definitions/{name}"} for kind, name in kubernetes["kinds"].items()}
    for path in sorted(HERE.glob("*.json")):
        if path.name not in ("kubernetes.json", "sources.json"):
            kinds |= json.loads(path.read_text(encoding="utf-8"))["kinds"]
    return kinds, kubernetes["definitions"]


@cache
def _validator(kind: str) -> jsonschema.Draft7Validator:
    kinds, definitions = _schemas()
    return jsonschema.Draft7Validator({"allOf": [kinds[kind]], "definitions": definitions})


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """What a strict server would refuse, one line for each field."""
    kind = f"{manifest.get('apiVersion')}/{manifest.get('kind')}"
    if kind not in _schemas()[0]:
        return [f"{kind}: no schema is committed for this kind; add it to KINDS in k8s/schemas/refresh.py"]
    found = []
    if not manifest.get("metadata", {}).get("name"):
        found.append("metadata.name: missing")
    for error in _leaves(_validator(kind).iter_errors(manifest)):
        found.append(f"{_path(error)}: {error.message[:300]}")
    return sorted(found)


def _leaves(errors: Iterable[jsonschema.ValidationError]) -> list[jsonschema.ValidationError]:
    leaves = []
    for error in errors:
        leaves += _leaves(error.context) if error.validator == "allOf" and error.context else [error]
    return leaves


def _path(error: jsonschema.ValidationError) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    return path.lstrip(".") or "(top)"

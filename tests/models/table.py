"""The table of what the rules measured: trainer/models/README.md between two marks, written by `make generated`.

Figures come from tests/golden/families.json, which `pytest tests/models -m 'not long' --write-measured` stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests import tables
from tests.models.measured import stored, told
from trainer.models.family import FAMILIES

README = "trainer/models/README.md"
MARKS = ("<!-- measured: make generated -->", "<!-- measured: end -->")
Figures = Mapping[str, Any]
HEAD = (
    "family",
    "1 whole path equals transformers",
    "2 packed equals unpacked",
    "3 two and three ranks equal one process",
    "4 freeze plan",
    "5 export, loaded",
    "6 chat template, labels",
    "8 attention",
)
TRAPS = ("as it should be", "use_cache unset", "mask of ones", "positions missing", "3 rows", "ours")
CHATS = ("two turns", "system", "tool", "empty answer", "letters")
FAULTS = ("a frozen one asks for gradients", "a trained one asks for none", "forgotten by the optimizer")


def table() -> str:
    found = stored()
    names = [name for name in FAMILIES if name in found]
    rules = [HEAD, *((name, *(_cell(found[name], number, name) for number in (1, 2, 3, 4, 5, 6, 8))) for name in names)]
    traps = [
        ("7: in transformers' attention", *TRAPS[:-1], "in ours"),
        *((name, *(str(found[name].get("7", {}).get(trap, "not measured")) for trap in TRAPS)) for name in names),
    ]
    return "\n\n".join(map(tables.as_markdown, (rules, traps)))


def _cell(rules: Mapping[str, Figures], number: int, name: str) -> str:
    figures = rules.get(str(number))
    if not figures:
        return f"component references: test_{name}.py" if number == 1 else "not measured"
    try:
        return CELLS[number](figures)
    except KeyError as missing:
        return f"not measured: {missing.args[0]}"


def _path(f: Figures) -> str:
    own = f", {f['own_positions']} also with its own ids" if "own_positions" in f else ""
    return f"{told(f['hf_logits_err'])}{own} (other pixels {told(f['control_pixels'])})"


def _packs(f: Figures) -> str:
    gradients = ", ".join(f"{group} {told(f[f'grad_err_{group}'])}" for group in ("vision", "merger", "llm"))
    return f"loss {told(f['loss_err'])}; gradients {gradients} (no isolation {told(f['control'])})"


def _ranks(f: Figures) -> str:
    long = f", {f['long_mixes']} once" if "long_mixes" in f else ""
    return f"loss {told(f['loss_err'])}, weights {told(f['weights_err'])}; {f['mixes']} mixes{long}"


def _freeze(f: Figures) -> str:
    refused = sum(f[fault] == "refused" for fault in (*FAULTS, "a frozen one is written to"))
    return f"{f['parameters']} parameters, {f['constants']} constant; {refused} faults refused"


def _export(f: Figures) -> str:
    return f"{told(f['export_logits_err'])} (1 % of a matrix changed {told(f['control'])})"


def _chat(f: Figures) -> str:
    outcomes: dict[str, list[str]] = {}
    for chat in CHATS:
        outcomes.setdefault(str(f.get(chat, "own test")), []).append(chat)
    return "; ".join(f"{', '.join(chats)}: {outcome}" for outcome, chats in outcomes.items())


def _attention(f: Figures) -> str:
    return f"{f['attention']}, {f['peak_mb_at_32768']} MB at 32,768 tokens"


CELLS = {1: _path, 2: _packs, 3: _ranks, 4: _freeze, 5: _export, 6: _chat, 8: _attention}

"""The process behind latex.py: a line of JSON in (two texts), a line out (are they the same?). Imports nothing of this
project, so that it starts in a second and holds nothing that could be harmed.

Limits are set on itself: memory once, processor time anew before each comparison. The kernel ends it at either.
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.parsing.latex import parse_latex

MAX_DEPTH = 50
"""Brackets inside brackets."""
POINTS = 3
SAME = 1e-9
_UNICODE = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ",
    "≥": r"\geq ", "°": "", "²": "^{2}", "³": "^{3}",
}  # fmt: skip
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])|(?<!\\)\\[,;:!> ]"
    r"|\\q?quad(?![A-Za-z])|~|\^\{?\s*\\circ\s*\}?|\\?%|\\degree(?![A-Za-z])|\$"
)
_NAMED = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"
Form = tuple[str, Any]
"""(kind, content): expression, sequence with its brackets, set, matrix."""


def main() -> None:
    limit = int(sys.argv[1])
    _limit(resource.RLIMIT_AS, limit)
    _limit(resource.RLIMIT_CORE, 0)
    parse_latex("1")  # the grammar is read once, outside of any limit
    _say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + asked["cpu_s"]
        _limit(resource.RLIMIT_CPU, seconds)
        try:
            found = same(asked["one"], asked["other"])
        except MemoryError:
            found = None
        _say({"same": found})


def _limit(what: int, value: int) -> None:
    """Below the hard limit that the process was started with, which nobody may raise."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _say(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def same(one: str, other: str) -> bool:
    left, right = normalised(one), normalised(other)
    if left == right:
        return True
    for first, second in ((left, right), (right, left)):  # x = 3 is the answer 3
        if "=" in first and "=" not in second and (found := re.fullmatch(r"\s*[A-Za-z]\w*\s*=(.*)", first, re.DOTALL)):
            left, right = found.group(1), second
    try:
        return same_forms(form_of(left), form_of(right))
    except MemoryError:
        raise
    except Exception:  # whatever a grammar or a simplification says of hostile text: it is not the same
        return False


def normalised(text: str) -> str:
    """Without what says nothing: spacing, sizes, dollars, units, thousands marks, a full stop at the end."""
    text = text.strip()
    for sign, latex in _UNICODE.items():
        text = text.replace(sign, latex)
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text, flags=re.DOTALL)
    text = _DROPPED.sub(" ", text).replace("{,}", "")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    unnamed = _NAMED.sub(" ", text)
    text = unnamed if unnamed.strip() else _NAMED.sub(r"\1", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))(?<![(\[{]\d,)", "", text) if not re.match(r"\s*[(\[\\]", text) else text
    text = re.sub(r"(?<![\d.])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})", text)  # 1 1/2
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    return " ".join(text.split()).rstrip(".,;: ")


def form_of(text: str, depth: int = 0) -> Form:
    """Lists, sets, tuples, intervals and matrices are taken apart; what is left is an expression.

    Raises:
        ValueError, or whatever the grammar says of what is no LaTeX.
    """
    text = text.strip()
    if depth > MAX_DEPTH or not text:
        raise ValueError("empty, or nested too deeply")
    if found := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in found.group(2).split(r"\\") if row.strip()]
        return "matrix", [[form_of(cell, depth + 1) for cell in row] for row in rows]
    if len(parts := _split(text, r"\cup")) > 1:
        return "set", [form_of(part, depth + 1) for part in parts]
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", [form_of(part, depth + 1) for part in _split(text[2:-2], ",")]
    if text[0] in "([" and text[-1] in ")]" and _closes_last(text) and len(parts := _split(text[1:-1], ",")) > 1:
        return f"sequence {text[0]}{text[-1]}", [form_of(part, depth + 1) for part in parts]
    if len(parts := _split(text, ",")) > 1:
        return "set", [form_of(part, depth + 1) for part in parts]
    return "expression", _constants(parse_latex(text, strict=True, backend="antlr"))


def _split(text: str, mark: str) -> list[str]:
    """At a mark outside of all brackets."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        depth += (text[at] in _OPEN) - (text[at] in _CLOSE)
        if depth == 0 and text.startswith(mark, at):
            parts.append(text[start:at])
            start = at + len(mark)
            at = start
        else:
            at += 1
    return [*parts, text[start:]]


def _closes_last(text: str) -> bool:
    """Whether the first bracket closes at the end: (1,2), not (1)+(2)."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return at == len(text) - 1
    return False


def _constants(found: Any) -> Any:
    """The grammar reads pi, e and i as letters."""
    letters = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
    return found.subs({sympy.Symbol(name): value for name, value in letters.items()})


# ---------------------------------------------------------------- the same


def same_forms(one: Form, other: Form) -> bool:
    (kind, left), (other_kind, right) = one, other
    if kind != other_kind:
        return False
    if kind == "expression":
        return same_expressions(left, right)
    if len(left) != len(right):
        return False
    if kind == "matrix":
        return all(len(a) == len(b) and all(map(same_forms, a, b)) for a, b in zip(left, right, strict=True))
    if kind == "set":
        return _matched(list(left), list(right))
    return all(map(same_forms, left, right))


def _matched(left: list[Form], right: list[Form]) -> bool:
    for item in left:
        found = next((place for place, one in enumerate(right) if same_forms(item, one)), None)
        if found is None:
            return False
        right.pop(found)
    return True


def same_expressions(left: Any, right: Any) -> bool:
    if left == right:
        return True
    if isinstance(left, Relational) or isinstance(right, Relational):
        return isinstance(left, Relational) and isinstance(right, Relational) and _same_relations(left, right)
    difference = left - right
    if _differs_somewhere(difference):
        return False
    difference = sympy.simplify(difference.doit())
    return bool(difference.is_number and abs(complex(difference.evalf(20))) < SAME)


def _same_relations(left: Any, right: Any) -> bool:
    for one in (right, right.reversed):
        if left.func is one.func:
            a, b = left.lhs - left.rhs, one.lhs - one.rhs
            if same_expressions(a, b) or (left.func is sympy.Eq and same_expressions(a, -b)):
                return True
    return False


def _differs_somewhere(difference: Any) -> bool:
    """Whether numbers put in for the letters tell the two apart: cheap, and most wrong answers end here."""
    draw = random.Random(1)
    letters = sorted(difference.free_symbols, key=str)
    for _ in range(POINTS):
        values = {letter: sympy.Rational(draw.randint(101, 999), 97) for letter in letters}
        try:
            found = complex(difference.subs(values).evalf(20))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):  # not a number there
            continue
        size = abs(found)
        if size == size and size != float("inf") and size > 1e-6:
            return True
    return False


if __name__ == "__main__":
    main()

"""What became of the samples of a source that is made from another one: its part of data/funnel.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5
"""Examples of each reason."""
Json = dict[str, Any]


@dataclass
class Tally:
    """`read` and `kept` count samples, `bad` those that are left out; `made` whatever else happened, by its name."""

    read: int = 0
    kept: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def leave_out(self, where: str, reason: str, told: object = "") -> None:
        """A sample that is not made. `told` says more than the reason, where there is more to say."""
        self.bad[reason] += 1
        if told and self.bad[reason] <= SHOWN:
            self.examples.append(f"{where}: {reason}: {told}")

    def refuse(self, where: str, reason: str, told: str, text: str) -> None:
        """An answer that is not used; its sample may be made from another one."""
        self.made[f"answers {reason}"] += 1
        if self.made[f"answers {reason}"] <= SHOWN:
            self.examples.append(f"{where}: {reason}: {told}: {text[:160]!r}")

    def as_json(self) -> Json:
        counts = {"bad": dict(sorted(self.bad.items())), "made": dict(sorted(self.made.items()))}
        return {"read": self.read, "kept": self.kept, **counts, "examples": list(self.examples)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Tally:
        """What as_json wrote; None: the beginning."""
        if content is None:
            return cls()
        return cls(**{**content, "bad": Counter(content["bad"]), "made": Counter(content["made"])})

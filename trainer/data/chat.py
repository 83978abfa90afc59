"""Chat templates: turns of a conversation as pieces, and which of them are targets.

A family names one; its text equals that of the template which the family publishes (tests/models). Targets are what the
assistant says and the token that ends it; which text is whose comes from the turns and is never searched in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trainer.data.pieces import Piece, Turn


class ChatTemplate(Protocol):
    """ValueError: a role, or an order of roles, that the template has no words for."""

    @property
    def name(self) -> str: ...

    @property
    def system(self) -> str | None:
        """What is written where a conversation has no system turn."""
        ...

    def conversation(self, turns: Sequence[Turn], *, open_turn: bool = False) -> list[Piece]:
        """From the first token on; with `open_turn` up to where the assistant begins to speak."""
        ...

    def answer(self, turns: Sequence[Turn]) -> list[Piece]:
        """What follows an open assistant turn: the first of `turns` is the rest of it."""
        ...


@dataclass(frozen=True)
class ChatML:
    """<|im_start|>role, newline, content, <|im_end|>, newline: every Qwen model. Any role has a place."""

    system: str | None = "You are a helpful assistant."
    name: str = "chatml"
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"

    def conversation(self, turns: Sequence[Turn], *, open_turn: bool = False) -> list[Piece]:
        if self.system and (not turns or turns[0].role != "system"):
            turns = [Turn("system", (Piece("text", self.system),)), *turns]
        pieces = [piece for turn in turns for piece in self._turn(turn)]
        if open_turn:
            pieces += [Piece("special", self.start), Piece("text", "assistant\n")]
        return pieces

    def answer(self, turns: Sequence[Turn]) -> list[Piece]:
        first, *rest = turns
        pieces = [*first.content, Piece("special", self.end, first.target)]
        for turn in rest:
            pieces += [Piece("text", "\n"), *self._turn(turn)[:-1]]
        return pieces

    def _turn(self, turn: Turn) -> list[Piece]:
        head = [Piece("special", self.start), Piece("text", f"{turn.role}\n")]
        return [*head, *turn.content, Piece("special", self.end, turn.target), Piece("text", "\n")]

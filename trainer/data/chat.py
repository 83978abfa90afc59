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


@dataclass(frozen=True)
class Vicuna:
    """System words, USER: question ASSISTANT: answer</s>USER: ...: LLaVA-1.5, and LLaVA-1.6 on Vicuna.

    conv_vicuna_v1 of haotian-liu/LLaVA. Pictures come first in their turn, each with a line break after it. The space
    between "ASSISTANT:" and the answer is the answer's: words carry it in front. Tool turns and turns out of order have
    no words.
    """

    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    name: str = "vicuna_v1"
    start: str = "<s>"
    end: str = "</s>"

    def conversation(self, turns: Sequence[Turn], *, open_turn: bool = False) -> list[Piece]:
        head: Sequence[Piece] = (Piece("text", self.system),)
        if turns and turns[0].role == "system":
            head, turns = turns[0].content, turns[1:]
        pieces = [Piece("special", self.start), *head, Piece("text", " ")]
        pieces += [piece for turn in alternating(turns, self.name) for piece in self._turn(turn)]
        return [*pieces, Piece("text", "ASSISTANT:")] if open_turn else pieces

    def answer(self, turns: Sequence[Turn]) -> list[Piece]:
        first, *rest = turns
        return [*self._said(first), *(piece for turn in alternating(rest, self.name) for piece in self._turn(turn))]

    def _turn(self, turn: Turn) -> list[Piece]:
        if turn.role == "user":
            return [Piece("text", "USER: "), *pictures_first(turn.content), Piece("text", " ")]
        return [Piece("text", "ASSISTANT:"), *self._said(turn)]

    def _said(self, turn: Turn) -> list[Piece]:
        return [Piece("text", " ", turn.target), *turn.content, Piece("special", self.end, turn.target)]


@dataclass(frozen=True)
class MistralInstruct:
    """[INST] question [/INST] answer </s>[INST] ...: LLaVA-1.6 on Mistral (mistral_instruct of haotian-liu/LLaVA).

    Pictures as with Vicuna. System and tool turns, and turns out of order, have no words: the released model's system
    text is empty, and its two published templates put another one in different places.
    """

    system: str | None = None
    name: str = "mistral_instruct"
    start: str = "<s>"
    end: str = "</s>"

    def conversation(self, turns: Sequence[Turn], *, open_turn: bool = False) -> list[Piece]:
        turned = (piece for turn in alternating(turns, self.name) for piece in self._turn(turn))
        return [Piece("special", self.start), *turned]  # an open turn begins with the answer's space

    def answer(self, turns: Sequence[Turn]) -> list[Piece]:
        first, *rest = turns
        return [*self._said(first), *(piece for turn in alternating(rest, self.name) for piece in self._turn(turn))]

    def _turn(self, turn: Turn) -> list[Piece]:
        if turn.role == "user":
            return [Piece("text", "[INST] "), *pictures_first(turn.content), Piece("text", " [/INST]")]
        return self._said(turn)

    def _said(self, turn: Turn) -> list[Piece]:
        space = Piece("text", " ", turn.target)
        return [space, *turn.content, space, Piece("special", self.end, turn.target)]


def alternating(turns: Sequence[Turn], template: str) -> Sequence[Turn]:
    """The turns, which are the user's and the assistant's by turns. ValueError: another role or order."""
    for place, turn in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if turn.role not in ("user", "assistant"):
            raise ValueError(f"the template {template} has no words for a turn of {turn.role!r} here")
        if turn.role != expected:
            raise ValueError(f"in the template {template} user and assistant take turns, got two of {turn.role!r}")
    return turns


def pictures_first(content: Sequence[Piece]) -> list[Piece]:
    """Each picture and a line break, then the words in their order (preprocess_multimodal of haotian-liu/LLaVA)."""
    pictures = [piece for piece in content if piece.kind == "image"]
    words = [piece for piece in content if piece.kind != "image"]
    return [*(piece for picture in pictures for piece in (picture, Piece("text", "\n"))), *words]

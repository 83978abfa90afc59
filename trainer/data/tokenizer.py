"""Text to ids with `tokenizers` alone (0.05 s to import, transformers' AutoTokenizer 4.9 s), Hugging Face files.

A user's text never gives a special token: "<|im_end|>" inside it becomes ordinary pieces. Added tokens that are not
special (<tool_call>) are recognised, as Hugging Face does. Tokenizers of Llama's kind may put a space before the first
text of a sequence alone (Metaspace, prepend_scheme first): whether a text is the first is told by who cuts it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import tokenizers

from trainer import storage
from trainer.errors import DataError


class Tokenizer:
    """`digest` is the sha256 of tokenizer.json."""

    def __init__(self, content: bytes, where: str = "tokenizer.json"):
        try:
            self._inner = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError("not a tokenizer", where=where, got=str(error)) from error
        self._inner.encode_special_tokens = True  # special tokens in text are text
        self._inner.no_padding()
        self._inner.no_truncation()
        self._later = self._inner
        stated = json.loads(content)
        if space_before_first(stated):
            self._later = tokenizers.Tokenizer.from_str(json.dumps(stated))
            self._later.encode_special_tokens = True
            self._later.no_padding()
            self._later.no_truncation()
        self.where = where
        self.digest = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._inner.get_vocab_size(with_added_tokens=True)
        self._cached = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def load(cls, folder: str) -> Tokenizer:
        """From a folder or URI with tokenizer.json."""
        uri = storage.join(folder, "tokenizer.json")
        try:
            return cls(storage.read_bytes(uri), uri)
        except FileNotFoundError as error:
            do = "a released slow tokenizer (vocab.json, merges.txt) has to be saved in the fast form first"
            raise DataError("no tokenizer", where=uri, expected="tokenizer.json", do=do) from error

    def _encode(self, text: str, first: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = (self._inner if first else self._later).encode(text, add_special_tokens=False)
        return tuple(found.ids), tuple(start for start, _ in found.offsets)

    def encode_with_starts(self, text: str, *, first: bool = True) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, character that each token starts at). Short texts (roles, prompts) are remembered. `first`: nothing but
        a token that begins the sequence stands before the text."""
        return self._cached(text, first) if len(text) <= 200 else self._encode(text, first)

    def encode(self, text: str) -> list[int]:
        return list(self.encode_with_starts(text)[0])

    def id(self, token: str) -> int:
        """Id of a special token; raises DataError when the tokenizer has none."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise DataError("the tokenizer lacks a token of the family", where=self.where, expected=token)
        return found

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=skip_special)


def space_before_first(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before the first text alone; if so it is changed to put none."""
    step = tokenizer.get("pre_tokenizer") or {}
    found = False
    for part in (step, *step.get("pretokenizers", ())):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"], found = "never", True
    return found

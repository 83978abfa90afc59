"""Text to ids with `tokenizers` alone (0.05 s to import, transformers' AutoTokenizer 4.9 s), Hugging Face files.

A user's text never gives a special token: "<|im_end|>" inside it becomes ordinary pieces. Added tokens that are not
special (<tool_call>) are recognised, as Hugging Face does. Tokenizers of Llama's kind put a space before the first text
of a sequence alone (Metaspace, prepend_scheme first) or before each between special tokens (a normalizer Prepend;
prepend_scheme always), and none inside a text: who cuts a text tells what stands before it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import lru_cache
from typing import Any, Literal

import tokenizers

from trainer import storage
from trainer.errors import DataError

Behind = Literal["nothing", "token", "text"]
"""What a text follows: at most a token that begins the sequence; another special token or a medium; text that another
segment ends with, which it continues."""


class Tokenizer:
    """`digest` is the sha256 of tokenizer.json."""

    def __init__(self, content: bytes, where: str = "tokenizer.json"):
        try:
            self._inner = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError("not a tokenizer", where=where, got=str(error)) from error
        stated = json.loads(content)
        self._behind: dict[Behind, tokenizers.Tokenizer] = {"nothing": self._inner}
        for behind in ("token", "text"):
            changed = without_space(stated, behind)
            self._behind[behind] = (
                self._inner if changed == stated else tokenizers.Tokenizer.from_str(json.dumps(changed))
            )
        for inner in self._behind.values():
            inner.encode_special_tokens = True  # special tokens in text are text
            inner.no_padding()
            inner.no_truncation()
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

    def _encode(self, text: str, behind: Behind) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = self._behind[behind].encode(text, add_special_tokens=False)
        return tuple(found.ids), tuple(start for start, _ in found.offsets)

    def encode_with_starts(self, text: str, *, behind: Behind = "nothing") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, character that each token starts at). Short texts (roles, prompts) are remembered."""
        return self._cached(text, behind) if len(text) <= 200 else self._encode(text, behind)

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


def without_space(tokenizer: dict[str, Any], behind: Behind) -> dict[str, Any]:
    """A copy of a tokenizer.json without the space that it would put before a text behind a token, or behind text."""
    found = copy.deepcopy(tokenizer)
    schemes = ("first",) if behind == "token" else ("first", "always")
    step = found.get("pre_tokenizer") or {}
    for part in (step, *step.get("pretokenizers", ())):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") in schemes:
            part["prepend_scheme"] = "never"
    normalizer = found.get("normalizer") or {}
    if behind == "text" and normalizer.get("type") == "Prepend":
        found["normalizer"] = None
    elif behind == "text" and normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part.get("type") != "Prepend"]
    return found

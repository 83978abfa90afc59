"""A published tiktoken vocabulary as tokenizer.json: the first Qwen's tokenizer comes as base64 tokens with ranks.

tiktoken joins, of all neighbours whose concatenation is a token, those whose token has the lowest rank. As merges of
byte-level BPE this is every way of cutting a token into two tokens, in order of the token's rank; a word that is a
token as a whole is taken at once (ignore_merges), as there.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from trainer.errors import DataError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How every Qwen's text is cut before merging (tokenization_qwen.py, Qwen2's tokenizer.json)."""


def ranks_of(data: bytes, where: object = None) -> dict[bytes, int]:
    """Token -> rank.

    Raises:
        DataError: a line that is no base64 token and rank, a rank missing or given twice, a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            expected, got = "a token in base64, a space, its rank", repr(line[:60])
            raise DataError(
                "not a tiktoken vocabulary", where=f"{where}, line {number}", expected=expected, got=got
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        expected = f"ranks 0 to {len(ranks) - 1}, each once"
        raise DataError("a tiktoken vocabulary with holes", where=where, expected=expected)
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError("a tiktoken vocabulary that cannot write every byte", where=where, got=f"no byte {absent[0]}")
    return ranks


def tokenizer_of(ranks: dict[bytes, int], special_tokens: Sequence[str]) -> Tokenizer:
    """Gives every text the ids that tiktoken gives it; `special_tokens` follow the ranks in this order."""
    letters = _letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written[left], written[right]) for left, right in pairs]
    made = Tokenizer(BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=True))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special_tokens))
    return made


def _letters() -> list[str]:
    """The printable letter that byte-level BPE (GPT-2) writes for each byte: its own, or the next free one."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(free)) for byte in range(256)]

"""What the built-in corpus has, without importing what builds it."""

from __future__ import annotations

from difflib import get_close_matches

from trainer import storage
from trainer.data.sample import FORMAT

SCHEME = "corpus://"
SMALL = "small"
SMALL_SCALE = 0.1
DONE = "sources.json"
"""Written last: marks a finished corpus."""
FILES = {
    "captions": "json",
    "grounding": "json",
    "instructions": "jsonl",
    "preferences": "jsonl",
    "videos": "json",
    "text": "jsonl",
    "descriptions": "jsonl",
    "documents": "jsonl",
    "interleaved": "jsonl",
    "agents": "jsonl",
}
"""Kind of data -> how its annotation files NAME.SUFFIX and NAME.held_out.SUFFIX end."""
SYNTHETIC = "synthetic"
SYNTHETIC_FILES = {"pages": "jsonl"}
"""The same below SYNTHETIC/: a corpus of its own, made where a recipe names it (synthetic_pages.py)."""


def corpus_problem(path: str | None) -> str | None:
    """What is wrong with a corpus:// path, None when nothing is (or when it is another path)."""
    if path is None or not path.startswith(SCHEME):
        return None
    asked = path.removeprefix(SCHEME).removeprefix(f"{SMALL}/")
    listed = {**FILES, **{f"{SYNTHETIC}/{name}": suffix for name, suffix in SYNTHETIC_FILES.items()}}
    known = [f"{name}{split}.{suffix}" for name, suffix in listed.items() for split in ("", ".held_out")]
    if asked in known:
        return None
    close = get_close_matches(asked, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(sorted(known))}"
    return f"the built-in corpus has no {asked!r}; {hint}"


def facts_of(seed: int, scale: float) -> dict[str, float]:
    """What sources.json says of a corpus that was made so."""
    return {"format": FORMAT, "seed": seed, "scale": scale}


def is_there(uri: str, *, seed: int, scale: float) -> bool:
    """Whether a finished corpus of that seed and scale lies at `uri`."""
    done, wanted = storage.join(uri, DONE), facts_of(seed, scale)
    return storage.exists(done) and {key: storage.read_json(done).get(key) for key in wanted} == wanted

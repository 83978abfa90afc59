"""Builds the corpus in a local folder and, where the output is not one, uploads it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.prepare.corpus import clips, pages, pictures, screens, sources, texts
from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.names import DONE, facts_of, is_there
from pipelines.prepare.corpus.sources import SPLITS, SourceFile, Split
from trainer import storage

Writer = Callable[[Folder, Split, Ingredients], None]
WRITERS: dict[str, Writer] = {
    "captions": pictures.write_captions,
    "grounding": pictures.write_grounding,
    "instructions": pictures.write_instructions,
    "preferences": pictures.write_preferences,
    "videos": clips.write_videos,
    "text": texts.write_texts,
    "descriptions": texts.write_descriptions,
    "documents": pages.write_documents,
    "interleaved": pages.write_interleaved,
    "agents": screens.write_agents,
}


def build_corpus(uri: str, *, seed: int, scale: float = 1.0, synthetic: bool = False) -> None:
    """Write the corpus, or the one of synthetic pages, to a folder or URI; sources.json is written last and marks a
    finished corpus.

    Deterministic in (seed, scale, package versions). Raises DataError when a package of the extra `prepare` is missing.
    """
    if is_there(uri, seed=seed, scale=scale):
        print(f"corpus: {uri} is already there", flush=True)
        return
    wanted = facts_of(seed, scale)
    storage.remove_tree(uri)
    local = storage.local_path(uri)
    write = _write_synthetic if synthetic else _write
    if local is not None:
        write(Path(local), wanted)
        return
    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        write(Path(scratch), wanted)
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file() and path.name != DONE)
        with ThreadPoolExecutor(16) as pool:
            targets = [storage.join(uri, *path.relative_to(scratch).parts) for path in files]
            list(pool.map(storage.upload_file, map(str, files), targets))
        storage.upload_file(str(Path(scratch) / DONE), storage.join(uri, DONE))


def _write(root: Path, wanted: dict) -> None:
    started = time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    folder = Folder(root, wanted["seed"], wanted["scale"])
    found = ingredients(folder.seed)
    write_kinds(folder, found)
    print(f"corpus: done ({time.monotonic() - started:.0f} s)", flush=True)
    listed = [item.file for items in (found.photos, found.icons, found.clips, found.texts) for item in items]
    listed += pages.table_files(folder.seed) + screens.screenshot_files(folder.seed)
    text = json.dumps({**wanted, **summary(listed)}, indent=1, sort_keys=True)
    (root / DONE).write_text(text + "\n")


def _write_synthetic(root: Path, wanted: dict) -> None:
    from pipelines.prepare.corpus import synthetic_pages  # typst, verovio, RDKit: only where they are asked for

    started = time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    folder = Folder(root, wanted["seed"], wanted["scale"])
    texts = sources.texts(folder.seed)
    for split in SPLITS:
        synthetic_pages.write_synthetic(folder, split, Ingredients([], [], [], texts).of(split))
    listed = [*(item.file for item in texts), *pages.table_files(folder.seed), *synthetic_pages.font_files()]
    (root / DONE).write_text(json.dumps({**wanted, **summary(listed)}, indent=1, sort_keys=True) + "\n")
    print(f"corpus: synthetic pages written ({time.monotonic() - started:.0f} s)", flush=True)


def write_kinds(folder: Folder, found: Ingredients) -> None:
    """Every kind of data, both splits, from what was found in the packages."""
    for number, (name, write) in enumerate(WRITERS.items(), 1):
        for split in SPLITS:
            write(folder, split, found.of(split))
        print(f"corpus: {name} written ({number} of {len(WRITERS)} kinds)", flush=True)


def ingredients(seed: int) -> Ingredients:
    """All source files, read from the installed packages."""
    return Ingredients(sources.photos(seed), sources.icons(seed), sources.clips(), sources.texts(seed))


def summary(files: list[SourceFile]) -> dict:
    """Count, licences and split by kind, and every file with its sha256."""
    kinds: dict[str, dict] = {}
    for file in files:
        kind = kinds.setdefault(file.kind, {"count": 0, "train": 0, "held_out": 0, "licences": {}})
        kind["count"] += 1
        kind[file.split] += 1
        kind["licences"][file.licence] = kind["licences"].get(file.licence, 0) + 1
    return {"kinds": kinds, "files": [vars(file) for file in files]}

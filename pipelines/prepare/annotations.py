"""Which files a source's path names. Of a folder, its annotation files: what else lies beside the data (README.md, a
licence, what a hub writes, sub-folders) is never rows; what is left out is said."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable

from pipelines.prepare.formats.peek import IMAGES, PICKLES, VIDEOS, ending_of
from trainer import storage
from trainer.data.shards import MANIFEST
from trainer.errors import DataError

ANNOTATIONS = (
    ".json",
    ".jsonl",
    ".txt",
    ".md",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".parquet",
    ".xml",
    ".hocr",
    ".pdf",
    ".musicxml",
    ".mxl",
    *PICKLES,
)
"""Endings, in small or capital letters."""
BESIDE = {"dataset_info.json", "instances.json"}
"""Read by the reader of another file; instances.json is one itself where there are no refs."""
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing)([-_. ].*)?\.(md|txt)"
    r"|dataset_infos\.json|dataset_dict\.json|croissant\.json|\..*",
    re.IGNORECASE,
)
"""Files about the data, as every download of a hub has, and hidden ones."""
SHOWN = 4


def annotation_files(path: str, *, where: str) -> list[str]:
    """The annotation files of a path, folder or glob, sorted. Prints what of a folder is left out.

    Raises:
        DataError: there is none.
    """
    local = storage.local_path(path)
    if local is not None and os.path.exists(local) and not os.path.isdir(local):
        return [local]
    if glob.has_magic(path) and not (local is not None and os.path.isdir(local)):
        found = glob.glob(local, recursive=True) if local is not None else storage.matching(path)
        return sorted(found) if found else _none(path, where, "nothing there")
    names = storage.list_dir(path)
    if not names and local is None:  # one object
        return [path]
    if local is not None and not os.path.isdir(local):
        return _none(path, where, "nothing there")
    folders = _folders(local, names)
    files = [name for name in names if name not in folders]
    taken = annotations_among(files, alone=not folders)
    if not taken:
        got = f"a folder without a file that ends in {', '.join(ANNOTATIONS)}"
        return _none(path, where, got + (f"; it has the folders {_listed(folders)}" if folders else ""), folders)
    _say_left_out(path, files, taken, folders)
    return [os.path.join(local, name) if local is not None else storage.join(path, name) for name in taken]


def _folders(local: str | None, names: Collection[str]) -> list[str]:
    """Of an object store, which lists names alone, those without a dot that are no LICENSE."""
    if local is not None:
        return [name for name in names if os.path.isdir(os.path.join(local, name))]
    return [name for name in names if "." not in name and not ABOUT.fullmatch(f"{name}.md")]


def annotations_among(names: Iterable[str], *, alone: bool = True) -> list[str]:
    """The annotation files of a folder with these files. Of this project's shards only the tars are; what is about the
    data only where the folder has nothing else (`alone`: no folders either)."""
    names = set(names)
    if MANIFEST in names:
        return sorted(name for name in names if name.endswith(".tar"))
    ours = {name for name in names if name.lower().endswith(ANNOTATIONS) and not name.startswith(".")}
    found = {name for name in ours if name not in BESIDE and not ABOUT.fullmatch(name)}
    return sorted(found or ours & {"instances.json"} or (ours - BESIDE if alone else ()))


def _say_left_out(path: str, files: Iterable[str], taken: Collection[str], folders: Collection[str]) -> None:
    """Pictures and videos are media of the rows, and files of BESIDE are read with another."""
    if MANIFEST in files:
        return
    known = {*taken, *BESIDE}
    rest = [name for name in files if name not in known and ending_of(name) not in (*IMAGES, *VIDEOS)]
    if rest:
        what = f"{len(rest)} file{'s' if len(rest) > 1 else ''} ({_listed(rest)})"
        print(f"ingest: {path}: left out: {what}; a file is read where it is named", flush=True)
    if folders:
        what = f"{len(folders)} folder{'s' if len(folders) > 1 else ''} ({_listed(folders)})"
        do = f"annotations in there are read where they are named, such as {storage.join(path, '*/*.jsonl')}"
        print(f"ingest: {path}: not looked into: {what}; {do}", flush=True)


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _none(path: str, where: str, got: str, folders: Collection[str] = ()) -> list[str]:
    do = "check the path; relative paths start from the folder the command runs in"
    if folders:
        do = f"name the folder, or a glob: {storage.join(path, min(folders))}, {storage.join(path, '**/*.parquet')}"
    expected = f"a file, folder or glob: {path}"
    raise DataError("no annotation file", where=where, expected=expected, got=got, do=do)

"""Media that a row of a `confined` source may name: below the media folder, in the annotation file, in the row."""

from __future__ import annotations

import os
from urllib.parse import unquote

from pipelines.prepare import embedded, pdf_pages
from pipelines.prepare.formats.rows import Bad, Draft, Row
from pipelines.prepare.scores.address import is_score_page
from trainer import storage


def confined(row: Row, root: str, file: str) -> Row:
    """The row, or the Bad that says which of its media lies outside of `root`. `file`: where the row stands."""
    for ref in row.media if isinstance(row, Draft) else ():
        inner = embedded.is_embedded(ref.uri) or pdf_pages.is_page(ref.uri) or is_score_page(ref.uri)
        name = ref.uri.rpartition("#")[0] if inner else ref.uri
        if not (name.startswith("data:") or _path(name) == _path(file) or _is_below(_path(name), _path(root))):
            return Bad(row.where, f"media below {root}", name[:200], "outside-media-folder")
    return row


def _path(uri: str) -> str:
    return storage.local_path(uri) or uri


def _is_below(name: str, folder: str) -> bool:
    """By the words alone: links inside of the folder are its owner's, steps up out of it may be a stranger's."""
    if "://" in name or "://" in folder:
        return name.startswith(f"{folder.rstrip('/')}/") and ".." not in unquote(name).split("/")
    if name.split("/").count("..") > folder.split("/").count(".."):
        return False
    return os.path.abspath(name).startswith(f"{os.path.abspath(folder).rstrip('/')}/")

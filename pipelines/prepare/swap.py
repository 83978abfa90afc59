"""New files beside those of a folder, which take their place when they are whole: a failure on the way leaves what was
there, and a process that was killed leaves something that the next one clears or finishes.

    beside(folder)           where the new ones are written: FOLDER/.tmp-new
    take(folder, last=...)   the new ones become the folder's, file by file, the named ones last
    settle(folder, last=...) finishes a `take` that was killed; discard(folder) removes what is half-written

A store of objects cannot rename a folder, so files move one by one. The folder is without its last files (a manifest)
meanwhile: nobody takes it for finished. They are written last beside it too, and leave last: new files that have them
are whole.
"""

from __future__ import annotations

import contextlib
import os

from trainer import storage

NEW = f"{storage.TEMPORARY}new"
CLEARED = "cleared"
"""Beside the new files: the old ones are gone."""


def beside(folder: str) -> str:
    return storage.join(folder, NEW)


def discard(folder: str) -> None:
    """Remove new files that are not whole, and the folder where it holds nothing else, not even its holder's lock."""
    storage.remove_tree(beside(folder))
    if (local := storage.local_path(folder)) is not None:
        with contextlib.suppress(OSError):
            os.rmdir(local)


def settle(folder: str, *, last: tuple[str, ...]) -> None:
    """Finish what `take` began in a process that was killed; nothing where there is nothing whole."""
    if storage.exists(storage.join(beside(folder), last[-1])):
        take(folder, last=last)


def take(folder: str, *, last: tuple[str, ...]) -> None:
    """Replace the folder's files by the new ones. May be called again after it was killed.

    Raises:
        StorageError
    """
    new = beside(folder)
    cleared = storage.join(new, CLEARED)
    if not storage.exists(cleared):  # with it, what lies in the folder are new files already
        names = storage.list_dir(folder)
        for name in [*reversed(last), *(name for name in names if name not in last)]:
            storage.remove_tree(storage.join(folder, name))
            storage.remove(storage.join(folder, name))
        storage.write_bytes(cleared, b"")
    names = storage.list_dir(new)
    for name in [*(name for name in names if name not in last), *(name for name in last if name in names)]:
        if name != CLEARED:
            storage.move(storage.join(new, name), storage.join(folder, name))
    storage.remove_tree(new)

"""OUT/runs/NAME.json: how long each attempt of `qwenvl run` has worked on an output; their sum is the run's wall time.

The top writes its record when it begins, every EVERY_S seconds and when it ends, so a killed attempt counts up to its
last writing. Time between attempts counts for nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from trainer import storage
from trainer.errors import QwenVLError

FOLDER = "runs"
EVERY_S = 10.0

Clock = Callable[[], float]


@contextlib.contextmanager
def recorded(out: str, name: str, *, every_s: float = EVERY_S, clock: Clock = time.time) -> Iterator[None]:
    """Keep the record of the attempt `name` while the body runs."""
    began, ended = clock(), threading.Event()

    def write(state: str) -> None:
        with contextlib.suppress(QwenVLError):  # the next writing may get through; a run never ends for this
            record = {"began": began, "wall_s": round(clock() - began, 3), "state": state}
            storage.write_json(_uri(out, name), record)

    def keep() -> None:
        while not ended.wait(every_s):
            write("running")

    write("running")
    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        write("ended")


def total_s(out: str, current: str | None = None, *, clock: Clock = time.time) -> float | None:
    """Seconds of all attempts; of the `current` one, which is still running, until now. None: none was recorded, as on
    a cluster, where steps run side by side and there is no top."""
    names = [name for name in storage.list_dir(storage.join(out, FOLDER)) if name.endswith(".json")]
    found: dict[str, dict[str, Any]] = {
        name.removesuffix(".json"): storage.read_json(storage.join(out, FOLDER, name)) for name in names
    }
    if not found:
        return None
    return round(sum(clock() - one["began"] if name == current else one["wall_s"] for name, one in found.items()), 3)


def _uri(out: str, name: str) -> str:
    return storage.join(out, FOLDER, f"{name}.json")

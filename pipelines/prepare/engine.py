"""Row functions over blocks of rows on Daft: the embedded runner on one machine, the same code on Ray.

A block is a few hundred rows: bounded memory however large a source is. On Ray it is cut into as many partitions as the
cluster has processors. Results come back in the order of the rows, whatever order they were computed in, so that
outputs depend neither on the runner nor on partitions and workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TypeVar

from trainer.data.shards import ShardReader

T = TypeVar("T")

# An answer travels as JSON text and a list of files, so that a row function has one simple signature.
Answer = tuple[str, list[bytes]]


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of up to `size` items."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


@lru_cache(maxsize=8)
def reader_of(uri: str, _digest: str) -> ShardReader:
    """For row functions that read shards: one a source and process; another content is another reader."""
    return ShardReader(uri)


class Engine:
    """Runs `function(text) -> (text, files)` over rows of text.

    Daft is imported here and not at the top: it takes a second, and done-markers need none of it.
    """

    def __init__(self, kind: Literal["native", "ray"]):
        os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # ours shows
        import daft

        self.daft = daft
        self.partitions = 1
        """Parts of a block that may be computed on different workers; the embedded runner has no use for more."""
        if kind == "ray":
            daft.set_runner_ray(noop_if_initialized=True)
            self.partitions = _num_workers()

    def map(self, function: Callable[[str], Answer], rows: list[str]) -> list[Answer]:
        """One answer a row, in order. An exception inside `function` ends the run: it must return what is expected."""
        daft = self.daft
        kinds = {"text": daft.DataType.string(), "files": daft.DataType.list(daft.DataType.binary())}

        @daft.func(return_dtype=daft.DataType.struct(kinds))
        def answer(row: str) -> dict[str, Any]:
            text, files = function(row)
            return {"text": text, "files": files}

        frame = daft.from_pydict({"number": list(range(len(rows))), "row": rows})
        if self.partitions > 1:
            frame = frame.into_partitions(min(self.partitions, len(rows)))
        answered: Any = answer(frame["row"])  # an expression
        found = frame.select(frame["number"], answered.alias("answer")).to_pydict()
        by_number = sorted(zip(found["number"], found["answer"], strict=True), key=lambda pair: pair[0])
        return [(item["text"], item["files"] or []) for _, item in by_number]


def _num_workers() -> int:
    """Processors of the Ray cluster that Daft runs on."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1))) if ray.is_initialized() else 1

"""Media that lie elsewhere, behind https:// or in an object store: several are read at a time, and a host that is gone
costs little.

    with read_ahead(uris, read) as read: ...     `read` gives what was fetched meanwhile
    with host_of(uri): storage.read_bytes(uri)   after FAILURES without an answer in a row, one try a medium
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from pipelines.prepare import embedded, pdf_pages
from pipelines.prepare.scores.address import is_score_page
from trainer import storage, tries
from trainer.errors import StorageError

AT_ONCE = 16
"""Media that a process reads at the same time."""
FAILURES = 3

_FAILED: Counter[str] = Counter()
"""Of each host, calls without an answer since the last answer, in this process."""
_LOCK = threading.Lock()


def is_remote(uri: str) -> bool:
    """Whether reading it waits for a network. Pages that are drawn, and cells of tables, whose row group is read once
    for all of its rows, are not read ahead."""
    if uri.startswith("data:") or pdf_pages.is_page(uri) or is_score_page(uri):
        return False
    if embedded.is_embedded(uri):
        return embedded.member_bytes(uri) is not None and storage.local_path(uri) is None
    return storage.local_path(uri) is None


@contextlib.contextmanager
def read_ahead(uris: Iterable[str], read: Callable[[str], bytes]) -> Iterator[Callable[[str], bytes]]:
    """`read`, for these addresses already under way, AT_ONCE of them; it raises what reading did. All their bytes are
    in memory: the caller bounds how many there are."""
    remote = [uri for uri in dict.fromkeys(uris) if is_remote(uri)]
    if len(remote) < 2:
        yield read
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(remote)), thread_name_prefix="media") as pool:
        under_way = {uri: pool.submit(read, uri) for uri in remote}
        yield lambda uri: under_way[uri].result() if uri in under_way else read(uri)


@contextlib.contextmanager
def host_of(uri: str) -> Iterator[None]:
    """Around a call of storage. A host of web addresses that did not answer so often in a row is asked once a medium,
    not five times; that is said once. One answer, whatever it is, and it is tried as before."""
    host = urlsplit(uri).netloc if uri.startswith(("http://", "https://")) else ""
    if not host:
        yield
        return
    try:
        with tries.at_most(1) if _FAILED[host] >= FAILURES else contextlib.nullcontext():
            yield
    except StorageError as error:
        if getattr(error.__cause__, "status", None) is not None:  # 403, 500; 429 asks for patience
            _answered(host)
            raise
        with _LOCK:
            _FAILED[host] += 1
            said = _FAILED[host] == FAILURES
        if said:
            told = f"{host} did not answer {FAILURES} times in a row: asked once for each medium"
            print(f"{told} ({error.got})", flush=True)
        raise
    except FileNotFoundError:
        _answered(host)
        raise
    _answered(host)


def _answered(host: str) -> None:
    with _LOCK:
        _FAILED[host] = 0

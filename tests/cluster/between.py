"""A connection between two parts that a test can disturb without disturbing other tests: a relay on the bridge.

    with relay(host, port) as between:        between.address is what one side is told instead of HOST:PORT
        between.down = True                   connections break off, new ones too
        between.delay_s = 1.5                 every part of an answer comes so much later
        between.shift_s = 3600                dates of an S3 server's answers are an hour late

Bytes go through as they are, TLS too; dates keep their length, so lengths and signatures of the content stay true.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from tests.cluster.place import GATEWAY

HTTP_DATE, XML_DATE = "%a, %d %b %Y %H:%M:%S GMT", "%Y-%m-%dT%H:%M:%S"
DATES = re.compile(
    rb"(?:(?<=\nDate: )|(?<=\nLast-Modified: ))[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} [\d:]{8} GMT"
    rb"|(?<=<LastModified>)(?P<xml>\d{4}-\d\d-\d\dT[\d:]{8})"
)


class Relay:
    """Accepts until closed; two threads a connection."""

    def __init__(self, host: str, port: int):
        self.target = host, port
        self.down = False
        self.delay_s = 0.0
        self.shift_s = 0.0
        self.broken = 0
        """Connections that were refused or broken off."""
        self.shifted = 0
        """Dates that were changed."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server((GATEWAY, 0))
        self.address = f"{GATEWAY}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def break_off(self) -> None:
        """All that is open."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _close(end)

    def go_down(self) -> None:
        self.down = True
        self.break_off()

    def close(self) -> None:
        self._listener.close()
        self.break_off()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.down:
                    self.broken += 1
                    _close(near)
                    continue
                try:
                    far = socket.create_connection(self.target)
                except OSError:
                    self.broken += 1
                    _close(near)
                    continue
                with self._lock:
                    self._open |= {near, far}
                for source, sink, answer in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pass, args=(source, sink, answer), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answer and self.delay_s:
                    time.sleep(self.delay_s)
                if answer and self.shift_s:
                    data = DATES.sub(self._shift, data)
                sink.sendall(data)
        for end in (source, sink):
            with self._lock:
                self._open.discard(end)
            _close(end)

    def _shift(self, found: re.Match[bytes]) -> bytes:
        self.shifted += 1
        form = XML_DATE if found["xml"] else HTTP_DATE
        moment = datetime.strptime(found[0].decode(), form).replace(tzinfo=UTC)
        return (moment + timedelta(seconds=self.shift_s)).strftime(form).encode()


@contextlib.contextmanager
def relay(host: str, port: int) -> Iterator[Relay]:
    made = Relay(host, port)
    try:
        yield made
    finally:
        made.close()


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()

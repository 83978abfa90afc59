"""What every test process starts with."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts `make test &` so; programs that tests send a Ctrl-C would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

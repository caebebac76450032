"""Signals whose handlers raise: KeyboardInterrupt, or SystemExit with 128 + the signal."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SOON = 0.05
"""Seconds, by which a callback that a signal fell into is over."""


def insist() -> None:
    """Have a signal come again whose exception was passed over, as Python does with what callbacks raise.

    Those of weak references and of the garbage collector: the program would go on as if nobody had asked it to end.
    """

    def passed_over(unraisable: Any) -> None:  # noqa: ANN401 (its type is not public)
        error, signum = unraisable.exc_value, 0
        if isinstance(error, KeyboardInterrupt):
            signum = signal.SIGINT
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            signum = error.code - 128
        if signum not in signal.valid_signals():
            before(unraisable)
            return
        main = threading.main_thread().ident
        assert main is not None
        again = threading.Timer(SOON, signal.pthread_kill, (main, signum))
        again.daemon = True
        again.start()

    before = sys.unraisablehook
    sys.unraisablehook = passed_over


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside, a signal that ends the program ends it also in the midst of a wait in C, which hears no handler."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    taken = [signum for signum, handler in handlers.items() if callable(handler)]  # the others are ignored, or default
    for signum in taken:
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum in taken:
            signal.signal(signum, handlers[signum])

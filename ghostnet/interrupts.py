"""Signals whose handlers raise: KeyboardInterrupt, or SystemExit with 128 + the signal."""

import signal
import sys
import threading
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

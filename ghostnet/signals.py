"""Ctrl-C and its like ask a run to end: all of its ranks, before the same step. A second Ctrl-C ends it at once."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from ghostnet.distributed import ALONE, STOP, Ranks
from ghostnet.errors import PeerFailed
from ghostnet.watchdog import is_ready


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The user or the system asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(
            {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP (the terminal was closed)"}.get(
                signal.Signals(signum), signal.Signals(signum).name
            )
        )
        self.signum = signum


class StopSignal:
    """Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 only ask; check() then raises Interrupted on all ranks."""

    FAILED = 1 << 16
    """In the place of a signal: a rank can't go on."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks, self.signum = ranks, 0
        self.signals = [STOP, signal.SIGTERM]
        if ranks.starter != "launch":
            self.signals += [signal.SIGINT, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.SIGHUP in self.signals:
            self.signals.remove(signal.SIGHUP)  # by nohup
        if signal.getsignal(signal.SIGUSR2) not in (signal.SIG_DFL, None):
            self.signals.append(signal.SIGUSR2)  # submitit warns by it of a time limit
        self.previous: dict[int, Any] = {}
        self.twice = Twice()

    def check(self, error: Exception | None = None) -> None:
        """Raise Interrupted if a rank was asked to end; the error, and PeerFailed on the other ranks. All call it."""
        is_ready()
        code = self.ranks.largest(self.FAILED if error else self.signum, "the other ranks, before the next batch")
        if error:
            raise error
        if code:
            raise PeerFailed if code == self.FAILED else Interrupted(code)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def __enter__(self) -> "StopSignal":
        for signum in self.signals:
            self.previous[signum] = signal.signal(signum, self._ask)
        self.twice.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.twice.stop()
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


class Twice:
    """A thread that ends the process at a second Ctrl-C, whatever its main thread is at: a save, a wait in C."""

    ECHO = 1.0
    """Seconds within which a second Ctrl-C is the first one again: torchrun passes on what the terminal sent to all."""

    def start(self) -> None:
        """Have every signal noted in a pipe that the thread reads."""
        reads, self.writes = os.pipe()
        os.set_blocking(self.writes, False)
        self.previous = signal.set_wakeup_fd(self.writes, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reads,), name="second Ctrl-C", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self.previous)
        os.close(self.writes)

    def _read(self, reads: int) -> None:
        first: float | None = None
        while signums := os.read(reads, 1):
            if signums[0] == signal.SIGINT and first is None:
                first = time.monotonic()
            elif signums[0] == signal.SIGINT and first is not None and time.monotonic() - first > self.ECHO:
                _end_at_once()
        os.close(reads)


def _end_at_once() -> NoReturn:
    """No save is waited for: what it writes takes the place of the last checkpoint only once it is whole."""
    shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # the cursor, which a display hides
    message = f"{shown}stopped at once, as asked. The last checkpoint is whole; resume=auto goes on from it.\n"
    os.write(2, message.encode())
    os._exit(128 + signal.SIGINT)

"""Ctrl-C and its like ask a run to end: all of its ranks, before the same step."""

import signal
import time
from types import FrameType
from typing import Any

from ghostnet.distributed import ALONE, STOP, Ranks
from ghostnet.errors import PeerFailed


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The user or the system asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__("Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Ctrl-C, SIGTERM, SIGUSR1 only ask; check() then raises Interrupted on all ranks. A second Ctrl-C: at once."""

    ECHO = 1.0
    """Seconds within which a second Ctrl-C is the first one again: torchrun passes on what the terminal sent to all."""
    FAILED = 1 << 16
    """In the place of a signal: a rank can't go on."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.signum, self.at = 0, 0.0
        self.signals = [STOP, signal.SIGTERM] if ranks.starter == "launch" else [signal.SIGINT, signal.SIGTERM, STOP]
        if signal.getsignal(signal.SIGUSR2) not in (signal.SIG_DFL, None):
            self.signals.append(signal.SIGUSR2)  # submitit warns by it of a time limit
        self.previous: dict[int, Any] = {}

    def check(self, error: Exception | None = None) -> None:
        """Raise Interrupted if a rank was asked to end; the error, and PeerFailed on the other ranks. All call it."""
        code = self.ranks.largest(self.FAILED if error else self.signum)
        if error:
            raise error
        if code:
            raise PeerFailed if code == self.FAILED else Interrupted(code)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT and time.monotonic() - self.at > self.ECHO:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self.at = signum, time.monotonic()

    def __enter__(self) -> "StopSignal":
        for signum in self.signals:
            self.previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

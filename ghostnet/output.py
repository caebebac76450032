"""Standard output and error that may go away: a reader that has enough, a closed terminal, a full disk."""

import atexit
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

log = logging.getLogger("ghostnet")
Gone = Callable[[str, OSError], None]
"""What to do where a stream can't be written: (its name, why)."""


class Stream:
    """A text stream that says once that it can't be written, and from then on takes everything in silence."""

    def __init__(self, stream: TextIO, name: str, gone: Gone) -> None:
        self.stream, self.name, self.gone = stream, name, gone

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401 (the stream's own)
        return getattr(self.stream, attribute)

    def write(self, text: str) -> int:
        """As that of any text stream."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        """As that of any text stream."""
        self.write("".join(lines))

    def flush(self) -> None:
        """As that of any text stream."""
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # Whoever else writes there, such as a library in C, meets no error either.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        self.gone(self.name, error)


def outlast(rest: str = "") -> None:
    """For what leaves its results in files: it goes on without its streams, and says so where that is still read.

    rest: a sentence on where what it says is to be found.
    """

    def gone(name: str, error: OSError) -> None:
        text = f"{name} can't be written any more: {error.strerror}. It goes on. {rest}".rstrip()
        log.info(text)
        if name == "stdout" and not isinstance(error, BrokenPipeError):  # of a reader such as head, which has enough
            print(text, file=sys.stderr, flush=True)

    _watch(gone)


def end_with_reader() -> None:
    """For what leaves nothing but its output: a reader that has enough ends it silently; else one message."""

    def gone(name: str, error: OSError) -> None:
        if name == "stdout" and not isinstance(error, BrokenPipeError):
            print(f"error: standard output can't be written: {error.strerror}.", file=sys.stderr, flush=True)
            raise SystemExit(1)
        raise SystemExit(0)

    def last_flush() -> None:
        try:
            sys.stdout.flush()
        except SystemExit as end:
            os._exit(int(str(end.code)))

    _watch(gone)
    atexit.register(last_flush)


def show_any_text() -> None:
    """Have what a stream's encoding lacks shown as its number: a locale may lack a letter, a name be any bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where it is closed
            stream.reconfigure(errors="backslashreplace")


def _watch(gone: Gone) -> None:
    show_any_text()
    for number in range(3):
        # Else the next file that is opened would take the place of a stream that was closed, and its output.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = io.TextIOWrapper(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115, PTH123 (for the process's life)
        setattr(sys, name, cast(TextIO, Stream(stream, name, gone)))

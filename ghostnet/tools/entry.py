"""How a tool starts and ends: its help, its exit code, one message for what a user can mend."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from ghostnet import interrupts, output
from ghostnet.door.typed import check_line_ends
from ghostnet.errors import explain

Say = Callable[[str], None]


def on_stderr(text: str) -> None:
    """Print it there."""
    print(text, file=sys.stderr, flush=True)


def ended(run: Callable[[list[str]], int | None], doc: str | None, typed: list[str], say: Say = on_stderr) -> int:
    """Run a tool with what was typed -> the exit code: 0 or its own, 1 with one message, 130 after a Ctrl-C."""
    if {"-h", "--help"} & set(typed):
        print((doc or "").strip())
        return 0
    try:
        check_line_ends(typed)
        return run(typed) or 0
    except KeyboardInterrupt:
        say("stopped, as asked.")
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        say(f"error: {message}")
        return 1


def start(main: Callable[[list[str]], int], say: Say = on_stderr) -> NoReturn:
    """Be the program: SIGTERM ends it and what it has started, a reader that has enough ends it in silence."""

    def terminated(signum: int, frame: FrameType | None) -> NoReturn:
        say(f"{signal.Signals(signum).name}: stopped.")
        raise SystemExit(128 + signum)

    interrupts.insist()
    signal.signal(signal.SIGTERM, terminated)
    output.end_with_reader()
    sys.exit(main(sys.argv[1:]))

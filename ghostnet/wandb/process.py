"""The process that records a run at Weights & Biases, as seen from the one that started it."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostnet.wandb.recorder import Request

REPOSITORY = Path(__file__).parent.parent.parent


class Recorder:
    """The process that records one run, as seen from here."""

    SLOW = 3.0
    """Seconds of waiting for its end before that is said."""
    LATE = 25.0
    """Seconds beyond the time limit, which it keeps itself, after which it is killed."""

    def __init__(self, wanted: Request) -> None:
        """OSError where no process can be started."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        # A service of its own, whatever wandb does in this process.
        own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ghostnet.wandb.recorder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=own | {"PYTHONPATH": path, "WANDB_SILENT": "true"},
            start_new_session=True,  # Ctrl-C is for the training, which then ends this one
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout, self.buffer = self.process.stdin, self.process.stdout, b""
        self.told = self.closed = False
        os.set_blocking(self.stdout.fileno(), False)
        self._send(dataclasses.asdict(wanted))

    def _send(self, content: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # what it died of is in its messages
            self.stdin.write((json.dumps(content) + "\n").encode())
            self.stdin.flush()

    def news(self) -> Iterator[dict[str, Any]]:
        """Its messages since the last call, without waiting; an end that it didn't explain is one of them."""
        while not self.closed and (content := self.stdout.read()) is not None:
            self.closed = content == b""
            self.buffer += content
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.told |= message["event"] in ("done", "failed")
            yield message
        if self.closed and not self.told:
            self.told = True
            yield {"event": "failed", "why": f"its process ended ({self._code()})"}

    def end(self, result: dict[str, Any] | None) -> None:
        """Tell it that there are no more rows."""
        self._send({"result": result})
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()

    def rest(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Its messages until it has ended; one that takes too long is killed."""
        started, said = time.monotonic(), False
        while not self.told:
            for message in self.news():
                started = time.monotonic()
                yield message
            waited = time.monotonic() - started
            if not said and waited > self.SLOW and not self.told:
                said = True
                yield {"event": "waiting"}
            if waited > timeout + self.LATE and not self.told:
                self.told = True
                self.kill()
                yield {"event": "failed", "why": "it did not end in time"}
            time.sleep(0.02)
        self._code()
        self.stdout.close()

    def _code(self) -> int | None:
        """Its exit code, once it has closed its output; where it doesn't come to one it is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(self.LATE)
        self.kill()
        return self.process.poll()

    def kill(self) -> None:
        """End the process at once; the service that it started ends by itself."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel ends with that
            self.process.wait(self.LATE)
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

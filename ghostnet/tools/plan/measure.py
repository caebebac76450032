"""A measured minute: train.py itself, on the real device and data, in a temporary place that is gone afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostnet.config import Config
from ghostnet.errors import UserError

PROGRAM = Path(__file__).parents[3] / "train.py"
LOG_EVERY = 5
"""Steps between two readings of the clock; the first of them is the warm-up that no speed counts."""
GRACE = 60.0
"""Seconds to finish a step and save."""


@dataclass(frozen=True)
class Measured:
    """What a part of a run was seen to do."""

    fps: float
    eval_fps: float | None
    """None where no evaluation came within the time."""
    steps: int
    seconds: float
    """Of training steps alone."""


def measure(words: list[str], cfg: Config, seconds: float, tell: Callable[[str], None]) -> Measured:
    """Train with the words of one job for so long after its first step; UserError where that can't be.

    tell: is given a line about what is going on, now and then.
    """
    with tempfile.TemporaryDirectory(prefix="ghostnet-plan") as name:
        folder = Path(name) / "run"
        own = [f"hydra.run.dir={folder}", "logger=default", "resume=null", "baseline=null", "save_every=null"]
        own += ["hydra.mode=RUN"]
        own += [f"log_every={LOG_EVERY}"]
        own += ["data.cache_val=false"] if cfg["data"].get("cache_val") else []
        kept = [word for word in words if not word.startswith(("logger", "hydra.run.dir", "sweep=", "rerun="))]
        command = [sys.executable, str(PROGRAM), *kept, *own]
        with (
            (Path(name) / "said").open("w+", encoding="utf-8", errors="replace") as said,
            _process(command, said) as process,
        ):
            started = time.monotonic()
            while process.poll() is None:
                rows = _rows(folder)
                trained = [row for row in rows if "train/fps" in row]
                if not trained:
                    started = time.monotonic()
                passed = time.monotonic() - started
                tell(f"measuring: {passed:.0f} of {seconds:.0f} s" if trained else "measuring: starting …")
                if passed >= seconds and any(row["step"] > LOG_EVERY for row in trained):
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.25)
            code = process.poll()
            if code:
                said.seek(0)
                raise UserError(f"the measured run failed: {_last_words(said.read())}")
            rows, result = _rows(folder), folder / "result.json"
            if code == 0 and not any(row["step"] > LOG_EVERY for row in rows if "train/fps" in row):
                found = json.loads(result.read_text(encoding="utf-8"))
                return Measured(found["fps"], found["eval_fps"], found["steps"], found["seconds"])
    return _sum(rows, cfg)


def _sum(rows: list[dict[str, Any]], cfg: Config) -> Measured:
    """The speed over all rows past the warm-up."""
    images = cfg["data"]["batch_size"] * cfg["device"]["count"] * cfg["accumulate"]
    count, seconds, before = 0, 0.0, LOG_EVERY
    for row in rows:
        if "train/fps" in row and row["step"] > LOG_EVERY and row["train/fps"]:
            count += row["step"] - before
            seconds += (row["step"] - before) * images / row["train/fps"]
            before = row["step"]
    speeds = [row["eval/fps"] for row in rows if "eval/fps" in row]
    return Measured(
        count * images / seconds, len(speeds) / sum(1 / fps for fps in speeds) if speeds else None, count, seconds
    )


@contextlib.contextmanager
def _process(command: list[str], said: Any) -> "Iterator[subprocess.Popen[bytes]]":  # noqa: ANN401 (a file)
    """A process with all that it starts, ended on the way out."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left of its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel ends with that
            process.wait(GRACE)


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that is being written
                rows.append(json.loads(line))
    return rows


def _last_words(text: str) -> str:
    """Why the run failed, as far as it said so."""
    lines = text.strip().splitlines()
    faults = [line for line in lines if line.startswith("error: ")]
    return faults[-1].removeprefix("error: ") if faults else lines[-1] if lines else "it ended without a word."

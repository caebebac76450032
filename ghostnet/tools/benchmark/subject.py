"""A subject of a benchmark, ours or a peer: a command in a process of its own, and how it is run and measured."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostnet.errors import UserError
from ghostnet.tools.benchmark import processes

REPOSITORY = Path(__file__).parent.parent.parent.parent
Metrics = dict[str, Any]
"""speed (images/s) or seconds, cpu_seconds (per 1,000 images, or of all), memory (bytes), and what else there is."""

INTERVAL = 0.25
"""Seconds between two looks at the memory of a subject, at least; a look takes no more than a twentieth of the time."""
POLL = 0.01
GRACE = 10.0
"""Seconds in which a subject that is stopped may end by itself."""
GIB = 2**30


class Failed(UserError):  # noqa: N818 (it is the subject's)
    """A subject that could not be measured, in its own words."""


@dataclass(frozen=True)
class Finished:
    """What is known of a command that ended."""

    folder: Path
    """Its own, with its stdout and stderr."""
    seconds: float
    cpu_seconds: float
    """Of all CPUs, by the command and all that it started and waited for."""
    memory: int
    """The most bytes at one time, of the command and all that it started (PSS, by samples)."""

    def text(self, name: str) -> str:
        """What it wrote to a file of its folder."""
        return (self.folder / name).read_text(errors="replace", encoding="utf-8")


@dataclass(frozen=True)
class Subject:
    """What is measured in turn with others."""

    name: str
    command: Callable[[Path], list[str]]
    """The command, given a folder of its own."""
    read: Callable[[Finished], Metrics]
    peer: str | None = None
    """The package that it is of; None: ours."""
    against: str | None = None
    """The subject of ours that a peer is compared with; None: the first."""
    spec: Any = None
    """JSON that it is told on stdin."""
    until: Callable[[Path], bool] | None = None
    """Given its folder, whether it has come as far as it is measured; it is stopped there."""
    may_fail: bool = False
    """Whether its exit code says nothing."""
    sentence: Callable[[Metrics], str] | None = None
    """In place of a row of the table: what it found out, in words."""
    once: bool = False
    """Measured in the first round only: it gives the same every time."""


def child(name: str, function: str, spec: Any, **more: Any) -> Subject:  # noqa: ANN401 (JSON; fields of Subject)
    """A subject that is a function of this package, module.function(spec) -> Metrics, in a Python of its own."""

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-m", "ghostnet.tools.benchmark.child", function, str(folder / "metrics.json")]

    def read(finished: Finished) -> Metrics:
        metrics: Metrics = json.loads(finished.text("metrics.json"))
        return {"memory": finished.memory} | metrics

    return Subject(name, command, read, spec=spec, **more)


def program(name: str, *words: str) -> list[str]:
    """A command of train.py or evaluate.py."""
    return [sys.executable, str(REPOSITORY / name), *words]


def measure(subject: Subject, folder: Path) -> Metrics:
    """Run it once; Failed in its own words where it fails. Ends all of its processes, whatever happens."""
    folder.mkdir(parents=True)
    (folder / "stdin").write_text(json.dumps(subject.spec), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    before, peak, next_look = _reaped(), 0, 0.0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / name).open(mode, encoding="utf-8")) for name, mode in STREAMS]
        start = time.perf_counter()
        process = subprocess.Popen(
            subject.command(folder),
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )
        stack.callback(_end, process)
        arrived = False
        while not arrived and process.poll() is None:
            arrived = subject.until is not None and subject.until(folder)
            if (now := time.perf_counter()) >= next_look:
                peak = max(peak, processes.memory(process.pid))
                next_look = time.perf_counter() + max(INTERVAL, 20 * (time.perf_counter() - now))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
        seconds = time.perf_counter() - start
    finished = Finished(folder, seconds, _reaped() - before, peak)
    if not arrived and ((process.returncode and not subject.may_fail) or subject.until):
        raise Failed(f"{subject.name}: {_last_words(finished)}")
    return subject.read(finished)


STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def _reaped() -> float:
    """CPU seconds of all processes that this one and theirs have waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command that still runs, and what it started."""
    if process.poll() is not None:
        return
    family = processes.tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel ends with that
        process.wait(GRACE)


def _last_words(finished: Finished) -> str:
    """Why a command failed, as far as it said so."""
    lines = finished.text("stderr").strip().splitlines() or finished.text("stdout").strip().splitlines()
    faults = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if faults:
        return "\n".join(lines[faults[-1] :]).removeprefix("error: ")
    return lines[-1] if lines else "it ended without a word."

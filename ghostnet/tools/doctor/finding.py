"""What a check finds, the case it looks at, and what several checks ask."""

from __future__ import annotations  # so that an old Python comes as far as being told so

import contextlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    status: str
    what: str
    way_out: str = ""
    name: str = ""


@dataclass
class Case:
    """What is examined, and what the checks so far found out about it."""

    cfg: dict[str, Any]
    place: Callable[[], Any]
    """Settles the run folder that training would make; ConfigError where it would refuse to."""
    images: int | None
    """How many to decode; None: all."""
    kind: str = ""
    """cpu, cuda or npu, once it is known that it can be used."""
    train: Any = None
    """The training split, once it could be read."""
    val: Any = None
    readable: bool = True
    """Whether no image failed to be read."""
    parameters: int = 0

    @property
    def ranks(self) -> int:
        """How many devices train together."""
        return int(self.cfg["device"]["count"])

    @property
    def on_npu(self) -> bool:
        """Whether an NPU is asked for or was chosen."""
        return "npu" in (self.kind, self.cfg["device"]["kind"])


Findings = Iterator[Finding]


def needed(condition: bool) -> str:
    """FAIL where training needs what is missing, else WARN."""
    return FAIL if condition else WARN


def fresh_python(code: str, seconds: float, environment: dict[str, str]) -> str | None:
    """The last line of what a fresh Python says of code that fails there, None where it works."""
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} seconds"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def first_line(error: Exception) -> str:
    """What an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

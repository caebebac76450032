"""Checkpoints: written whole or not at all, read without running code."""

import contextlib
import io
import os
from pathlib import Path
from typing import IO, Any

import torch

from ghostnet.errors import UserError
from ghostnet.models.weights import read_file

FORMAT = "ghostnet-torch"
LAST, BEST = "last.pt", "best.pt"


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: to a temporary file in the same folder, flushed to disk, then renamed.

    UserError where the disk is full or the folder can't be written; the file that was there before stays as it was.
    """
    # By way of memory: torch's zip writer turns a failed write into an error of its own.
    content = io.BytesIO()
    _write(state, content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left_by_killed in path.parent.glob(f".{path.name}.*.tmp"):
            left_by_killed.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror}. "
            f"{f'The {path.name} of before is kept. ' if path.exists() else ''}"
            "Free some space, or choose another folder with hydra.run.dir=…"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def size(state: dict[str, Any]) -> int:
    """How many bytes save() would write, nothing written."""
    counter = _Counter()
    _write(state, counter)
    return counter.count


class _Counter(io.BytesIO):
    """A file that counts what is written to it, and keeps nothing."""

    count = 0

    def write(self, content: Any) -> int:  # noqa: ANN401 (anything with a buffer)
        """Count it."""
        self.count += memoryview(content).nbytes
        return memoryview(content).nbytes


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Read one of this project's checkpoints to the CPU; UserError for anything else. Never runs code from the file."""
    state = read_file(path)
    if not is_own(state):
        raise UserError(
            f"{path} is no checkpoint of this project, so a run can't go on from it. "
            "To start from its weights: model.weights=PATH"
        )
    return dict(state)


def is_own(state: object) -> bool:
    """Whether what read_file() gave is one of this project's checkpoints."""
    return isinstance(state, dict) and state.get("format") == FORMAT


def find(path: str | Path, name: str) -> Path:
    """The checkpoint meant by a file or by a run folder that holds `name`; UserError where there is none."""
    found = Path(path).expanduser()
    if found.is_dir():
        if not (found / name).is_file():
            there = ", ".join(sorted(p.name for p in found.glob("*.pt"))) or "no checkpoint"
            raise UserError(f"{found} holds no {name} (it holds {there}).")
        found = found / name
    if not found.is_file():
        raise UserError(f"{found} does not exist: give a checkpoint file or a run folder.")
    return found

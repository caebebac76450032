"""Checkpoints: written whole or not at all, read without running code."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ghostnet.disk import refused
from ghostnet.errors import UserError
from ghostnet.models.weights import is_plain, read_file
from ghostnet.seal import Sealing

FORMAT = "ghostnet-torch"
LAST, BEST = "last.pt", "best.pt"
REWIND = "rewind.pt"
"""What a run with on_nan=rewind is taken back to: its last save that was due by the config."""
PREVIOUS = "previous-{}.pt"
KINDS: dict[str, Any] = {
    "config": dict,
    "classes": list,
    "images": int,
    "num_classes": int,
    "global_batch_size": int,
    "step": int,
    "model": dict,
    "ema": dict | None,
    "seconds": int | float,
}
"""What a program reads of a checkpoint by itself."""
MOST_VALUES, DEEPEST = 10_000, 20
"""Of a checkpoint's config: ours have about 100 values, three deep."""


def copied(state: Any) -> Any:  # noqa: ANN401 (whatever a checkpoint holds)
    """A copy of all tensors in the host's memory, and of the dicts and lists that hold them: the state of now."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copied(value) for value in state]
    return state


def save(state: dict[str, Any], path: Path, keep: int = 1) -> int:
    """Write a checkpoint: to a temporary file in the same folder, flushed to disk, then renamed -> its bytes.

    keep: of how many writings the files are kept, this one and those before it, as previous-1.pt (the newest) and so
    on. StorageError where the disk is full or the folder can't be written; the file of before then stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left_by_killed in path.parent.glob(f".{path.name}.*.tmp"):
            left_by_killed.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
        if keep > 1:
            _make_room(path, keep)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        kept = f"The {path.name} of before is kept, and whole." if path.exists() else ""
        raise refused(path, error, kept, size(state)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return written


def _make_room(path: Path, keep: int) -> None:
    """Make the file that is about to be replaced the first of the previous ones; at no moment there is none."""
    for number, older in reversed(list(enumerate(previous(path.parent), start=1))):
        if number + 1 < keep and path.exists():
            older.replace(path.with_name(PREVIOUS.format(number + 1)))
        elif number >= keep or path.exists():
            older.unlink()
    if path.exists():
        try:
            path.with_name(PREVIOUS.format(1)).hardlink_to(path)
        except OSError:  # a file system without hard links
            path.replace(path.with_name(PREVIOUS.format(1)))


def previous(folder: Path) -> list[Path]:
    """The files of a run folder that were its last.pt before, the newest first."""
    numbers = [re.fullmatch(r"previous-(\d+)\.pt", path.name) for path in folder.glob("previous-*.pt")]
    return [folder / found[0] for found in sorted(filter(None, numbers), key=lambda found: int(found[1]))]


def size(state: dict[str, Any]) -> int:
    """How many bytes save() would write, nothing written."""
    counter = _Counter()
    _write(copied(state), counter)
    return counter.count


class _Counter(io.BytesIO):
    """A file that counts what is written to it, and keeps nothing."""

    count = 0

    def write(self, content: Any) -> int:  # noqa: ANN401 (anything with a buffer)
        """Count it."""
        self.count += memoryview(content).nbytes
        return memoryview(content).nbytes


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    sealing = Sealing(file)
    torch.save({"format": FORMAT, "sealed": True, **state}, cast("IO[bytes]", sealing))
    sealing.finish()


def load(path: Path) -> dict[str, Any]:
    """Read one of this project's checkpoints to the CPU; UserError for anything else. Never runs code from the file."""
    state = read_file(path)
    if not is_own(state):
        raise UserError(
            f"{path} is no checkpoint of this project, so a run can't go on from it. "
            "To start from its weights: model.weights=PATH"
        )
    return dict(state)


def check(state: dict[str, Any], path: Path) -> None:
    """UserError where one of this project's checkpoints lacks what it must hold, or its config is no plain config."""
    try:
        good = all(isinstance(state[key], kind) for key, kind in KINDS.items())
        good = (
            good and all(map(is_plain, state["model"].values())) and all(map(is_plain, (state["ema"] or {}).values()))
        )
        good = good and all(isinstance(name, str) for name in state["classes"]) and _is_plain_config(state["config"])
    except KeyError as error:
        raise UserError(f"{path} is a damaged checkpoint: it has no {error.args[0]}. Take an earlier one.") from None
    if not good:
        raise UserError(f"{path} is a damaged checkpoint: what it holds is not of its kind. Take an earlier one.")


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What a checkpoint's content leads to while it is loaded, such as moments of another shape, is a UserError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fault = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit this run ({type(error).__name__}: {fault}). Take an earlier one."
        ) from error


def _is_plain_config(config: object) -> bool:
    """Whether it is nested groups of plain values, of no more nodes and depth than a config has."""
    left, nodes = MOST_VALUES, [(config, 0)]
    while nodes and left:
        left -= 1
        node, depth = nodes.pop()
        if isinstance(node, dict) and not all(isinstance(key, str) for key in node):
            return False
        if isinstance(node, dict | list):
            inner = node.values() if isinstance(node, dict) else node
            if (
                depth > DEEPEST
                or len(node) > left
                or (isinstance(node, dict) and not all(isinstance(k, str) for k in node))
            ):
                return False
            nodes += [(value, depth + 1) for value in inner]
        elif not isinstance(node, str | int | float | None):
            return False
    return not nodes


@dataclass(frozen=True)
class Newest:
    """What resume=auto goes on from."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]
    """The files that were passed over, and why."""


def newest(folder: Path) -> Newest | None:
    """The newest whole checkpoint of a run folder; None where it holds none. UserError where all are damaged."""
    found: Newest | None = None
    damaged: dict[Path, str] = {}
    for path in [folder / LAST, *previous(folder), folder / BEST]:
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            damaged[path] = str(error)
            continue
        if found is None or state["step"] > found.state["step"]:
            found = Newest(path, state, damaged)
        if path.name == LAST:
            break
    if damaged and not found:
        raise UserError(
            f"{folder} holds no whole checkpoint: {'; '.join(damaged.values())}. To start anew, give another "
            "hydra.run.dir, or remove these files."
        )
    return found


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

"""Run folders as they lie on disk: found, and read fast; a damaged one is told, and stops nothing."""

import contextlib
import functools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ghostnet.config import flat
from ghostnet.experiments.folders import yaml_loader
from ghostnet.experiments.record import is_locked

FILES = {"config.yaml", "run.json", "result.json"}
"""A folder with one of these is a run's."""
METRICS = {"top1": "top1", "top5": "top5", "loss": "loss", "fps": "fps", "time": "seconds"}
"""The numbers of a run, and their keys in result.json."""
LARGEST = 1e300
"""What is no less, or not a number at all, counts as none."""


class Damaged(Exception):  # noqa: N818 (of a file)
    """A file of a run that can't be read; the message names it."""


@dataclass
class Run:
    """One run folder. What can't be read is left empty, and told in fault."""

    folder: Path
    name: str = ""
    """The folder as it is told apart from those of other runs: below what they have in common."""
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted keys with their values, lists as tuples; group names with the chosen option."""
    overrides: list[str] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(METRICS))
    """top1 and top5 in per cent, loss, fps in images/s, time in seconds; None: there is none."""
    status: str = "cut off"
    """completed, failed, pruned, running, cut off, or damaged."""
    error: str | None = None
    """Why it failed."""
    fault: str | None = None
    """What of it can't be read."""
    rerun: str | None = None
    """The command of this run alone."""
    started: float | None = None
    """Unix time."""

    @property
    def seed(self) -> Any:  # noqa: ANN401 (a number, where nobody meddled)
        """What its seed was."""
        return self.config.get("seed")


def find(root: Path) -> Iterator[Path]:
    """All run folders at and below a folder, in the order of their names; what runs keep for others is passed over."""
    try:
        with os.scandir(root) as entries:
            found = sorted(entries, key=lambda entry: _natural(entry.name))
            names = {entry.name for entry in found}
            folders = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    if names & FILES:
        yield root
    for path in map(Path, folders):
        if path.name != "wandb" and not path.name.startswith("."):
            yield from find(path)


def _natural(name: str) -> list[tuple[float, str]]:
    """Job 10 comes after job 9."""
    return [(float(part), "") if part.isdecimal() else (math.inf, part) for part in re.split(r"(\d+)", name)]


def read(folder: Path) -> Run:
    """A run by its files; none of them has to be there, or whole."""
    run, faults = Run(folder), []
    for part in (_read_config, _read_record, _read_result):
        try:
            part(run)
        except Damaged as fault:
            faults.append(str(fault))
    if faults:
        run.status, run.fault = "damaged", "; ".join(faults)
    return run


def _read_config(run: Run) -> None:
    text = _text(run.folder / "config.yaml")
    if text is None:
        return
    try:
        run.config = _leaves_of(text)
    except (yaml.YAMLError, TypeError, ValueError):
        raise Damaged("config.yaml is no config") from None
    hydra = _text(run.folder / ".hydra" / "hydra.yaml") or ""
    chosen = re.search(r"^    choices:\n((?: {6}.*\n)+)", hydra, re.MULTILINE)
    with contextlib.suppress(yaml.YAMLError, TypeError, ValueError):
        choices = dict(_leaves(chosen[1])) if chosen else _targets(run.config)
        run.config |= {key: value for key, value in choices.items() if "/" not in key and key != "local"}


def _targets(config: dict[str, Any]) -> dict[str, str]:
    """What stands for the options of groups where nobody wrote them down: the names of their constructors."""
    names = {key.removesuffix("._target_"): str(value) for key, value in config.items() if key.endswith("._target_")}
    return {key: value.rpartition(".")[2] for key, value in names.items() if "." not in key}


def _leaves_of(text: str) -> dict[str, Any]:
    """A config's dotted keys and values. Its top-level blocks, most of which runs have in common, are parsed once."""
    blocks = [block for block in re.split(r"^(?=[^\s#-])", text, flags=re.MULTILINE) if block.strip()]
    try:
        return {key: value for block in blocks for key, value in _leaves(block)}
    except (yaml.YAMLError, TypeError):  # written by hand, with anchors or the like
        return dict(_leaves(text))


@functools.lru_cache(maxsize=1 << 14)
def _leaves(block: str) -> tuple[tuple[str, Any], ...]:
    """Dotted keys and values of a YAML mapping; TypeError where it is none."""
    node = yaml.load(block, yaml_loader(block))
    if not isinstance(node, dict):
        raise TypeError
    return tuple((key, _hashable(value)) for key, value in flat(node))


def _hashable(value: Any) -> Any:  # noqa: ANN401 (any leaf)
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return str(value) if isinstance(value, dict) or not value.__hash__ else value


def _read_record(run: Run) -> None:
    """run.json; of older runs, Hydra's list of overrides."""
    try:
        record = _json(run.folder / "run.json")
    except Damaged:
        _read_overrides(run)
        raise
    if record is None:
        _read_overrides(run)
        return
    words, command, started = record.get("overrides"), record.get("rerun"), record.get("started")
    if isinstance(words, list):
        run.overrides = [str(word) for word in words]
        run.rerun = _command(run.overrides)
    run.rerun = command if isinstance(command, str) else run.rerun
    run.started = started if isinstance(started, int | float) else None


def _read_overrides(run: Run) -> None:
    text = _text(run.folder / ".hydra" / "overrides.yaml")
    if text is not None:
        with contextlib.suppress(yaml.YAMLError):
            words = yaml.load(text, yaml_loader(text))
            run.overrides = [str(word) for word in words] if isinstance(words, list) else []
        run.rerun = _command(run.overrides)


def _command(overrides: list[str]) -> str:
    return shlex.join(["python", "train.py", *overrides])


def _read_result(run: Run) -> None:
    if is_locked(run.folder):  # what lies there is of an earlier attempt
        run.status = "running"
        return
    result = _json(run.folder / "result.json")
    if result is None:
        return
    run.status, error = str(result.get("status", "completed")), result.get("error")
    run.error = None if error is None else str(error)
    for name, key in METRICS.items():
        value = result.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise Damaged(f"result.json: {key} is no number")
        run.metrics[name] = value if value is not None and abs(value) < LARGEST else None


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file."""
    text = _text(path)
    if text is None:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    raise Damaged(f"{path.name} is {'empty' if not text.strip() else 'cut short or no JSON'}")


def _text(path: Path) -> str | None:
    """A file's text, None where there is none."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise Damaged(f"{path.name} can't be read: {reason}") from None

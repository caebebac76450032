"""A run folder as it is read here, of this version or of an earlier one."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Config, resolved
from ghostnet.errors import UserError
from ghostnet.experiments import record
from ghostnet.experiments.rerun import own_words


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    config: Config
    """Every value, resolved."""
    words: list[str] | None
    """The overrides of its command; None where it has not kept them."""
    record: dict[str, Any]
    """run.json; {} of earlier versions."""
    result: dict[str, Any]
    """result.json; {} where the run has none."""
    rows: list[dict[str, Any]]
    """metrics.jsonl."""
    patch: str
    """code.diff: what was not committed."""
    status: str
    """completed, failed, pruned, running or cut off."""


def read(path: str) -> Run:
    """The run of a folder; UserError where it is none."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a run's folder.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the run's folder.")
    if not (folder / "config.yaml").is_file():
        jobs = sorted(found.parent.name for found in folder.glob("*/config.yaml") if found.parent.name != ".hydra")
        some = f" It is a sweep: give one of its jobs, {folder / jobs[0]}." if jobs else ""
        raise UserError(f"{folder} is no run's folder: it has no config.yaml.{some}")
    provenance = _json(folder / record.FILE)
    return Run(
        path=folder,
        config=_config(folder / "config.yaml"),
        words=_words(folder, provenance),
        record=provenance,
        result=_json(folder / "result.json"),
        rows=_rows(folder / "metrics.jsonl"),
        patch=_text(folder / record.DIFF),
        status=record.status(folder),
    )


def _config(path: Path) -> Config:
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} can't be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(loaded, DictConfig) or "data" not in loaded:
        raise UserError(f"{path} is no config of a run.")
    return resolved(loaded)


def _words(folder: Path, provenance: dict[str, Any]) -> list[str] | None:
    if isinstance(provenance.get("overrides"), list):
        return own_words([str(word) for word in provenance["overrides"]])
    with contextlib.suppress(OSError, yaml.YAMLError):
        words = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        return own_words([str(word) for word in words or []])
    return None


def _json(path: Path) -> dict[str, Any]:
    """The object of a JSON file, {} where there is no such file; UserError where it is no JSON."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object.")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in _text(path).splitlines():
        with contextlib.suppress(ValueError):  # a line cut short by a kill is not a row
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""

"""Folders of runs and sweeps: settled before anything is made, claimed, never overwritten."""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Config, check_same_run, same_experiment, unresolved
from ghostnet.errors import ConfigError
from ghostnet.overrides import Checked

made: list[Path] = []
"""The folders that this process made for its run, innermost last."""


@dataclass(frozen=True)
class Place:
    """Where a run or a sweep is to leave its files."""

    key: str
    """hydra.run.dir or hydra.sweep.dir."""
    folder: Path
    given: bool
    """By the command, or by the run that it goes on with; else a new one is made."""


def settle(checked: Checked, words: Sequence[str]) -> Place:
    """The place of a command: the given one, else that of the run to go on with, else a new one. Nothing is made.

    ConfigError where a new run would overwrite another, or the run that is there can't go on with these settings.
    """
    multirun = checked.multirun
    if name := checked.jobs[0]["sweep"]:
        return _sweep(checked, words, name)
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    folder = Path(checked.hydra.sweep.dir if multirun else checked.hydra.run.dir)
    given = any(word.lstrip("+").startswith(f"{key}=") for word in words)
    resume = checked.jobs[0]["resume"]
    if not str(checked.hydra.sweep.dir if multirun else checked.hydra.run.dir):
        raise ConfigError(f"{key} is empty: give a folder.")
    if multirun and any(word.startswith("hydra.run.dir=") for word in words):
        raise ConfigError("hydra.run.dir is the folder of a single run; that of a sweep is hydra.sweep.dir.")
    if resume == "auto" and not given:
        raise ConfigError(f"resume=auto goes on in a folder: give it, {key}=…")
    if given and resume is None and any(folder.glob("*/*.pt" if multirun else "*.pt")):
        raise ConfigError(
            f"{folder} holds a run already. resume=auto goes on with it; for a new one give another {key}."
        )
    if not multirun and resume not in (None, "auto"):
        path = Path(resume).expanduser()
        if not path.exists():
            raise ConfigError(f"resume={resume}: {resume} does not exist. Give a checkpoint file or a run folder.")
        home = path if path.is_dir() else path.parent
        folder = folder if given else home
        newer = home / "last.pt"
        if path.is_file() and path.name != newer.name and newer.exists() and folder.resolve() == home.resolve():
            raise ConfigError(
                f"resume={path}: going on from there would overwrite the later {newer}. Resume that one, or "
                "give the run another hydra.run.dir."
            )
        given = True
    for name, job in zip(checked.names, checked.jobs, strict=True):
        if name or not multirun:
            check_resume(folder / name, job)
    return Place(key, folder, given)


def _sweep(checked: Checked, words: Sequence[str], name: str) -> Place:
    """The folder of a sweep with a name, which is there already where the command is repeated."""
    if not checked.multirun:
        raise ConfigError(
            f"sweep={name}: one job is no sweep. Give -m and several values, or an experiment that sweeps."
        )
    if len({job["sweep"] for job in checked.jobs}) > 1:
        raise ConfigError("sweep: one name for all jobs.")
    if not re.fullmatch(r"[\w][\w.-]*", name, re.ASCII):
        raise ConfigError(f"sweep={name}: a name is made of letters, digits and . _ -")
    if given := [word for word in words if word.lstrip("+").startswith(("hydra.sweep.dir=", "resume="))]:
        raise ConfigError(f"{given[0]}: with sweep={name} the folder is multirun/{name}, and it goes on by itself.")
    folder = Path("multirun") / name
    wrong = []
    for job_name, job in zip(checked.names, checked.jobs, strict=True):
        if job_name and (saved := saved_config(folder / job_name)):
            wrong += [f"{job_name}: {line}" for line in same_experiment(saved, job)]
    if wrong:
        raise ConfigError(
            f"sweep={name}: {folder} holds these jobs with other settings: {'; '.join(wrong[:4])}"
            f"{'; …' if len(wrong) > 4 else ''}. Give the settings again, or another name."
        )
    return Place("hydra.sweep.dir", folder, given=True)


def claim(place: Place) -> Path:
    """Make the folder of a place -> the folder, which has -2, -3 … behind its name where a new one is taken."""
    try:
        return _make(place.folder, its_own=not place.given)
    except OSError as error:
        raise ConfigError(
            f"{place.folder} can't be made: {error.strerror}. Choose another folder with {place.key}=…"
        ) from None


def _make(folder: Path, its_own: bool) -> Path:
    """Make a folder and its parents; its_own: one that was not there, with -2, -3 … behind its name if need be."""
    made.extend(path for path in reversed(folder.absolute().parents) if not path.exists())
    folder.parent.mkdir(parents=True, exist_ok=True)
    candidates = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for candidate in itertools.chain([folder], candidates):
        if candidate.is_dir() and not its_own:
            return candidate
        try:
            candidate.mkdir()
        except FileExistsError:
            if not its_own:
                raise
        else:
            made.append(candidate.absolute())
            return candidate
    raise AssertionError


def leave_no_empty_run(folder: Path) -> None:
    """Remove a folder that this process made, and those above it, where nothing of a run was begun in it."""
    if folder in made and not [*folder.glob("metrics.jsonl"), *folder.glob("*.pt")]:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in reversed(made[:-1]):
                path.rmdir()


def check_resume(folder: Path, cfg: Config) -> None:
    """ConfigError where the folder's run can't go on with these settings, before a file of it is touched."""
    if cfg["resume"] is not None and (saved := saved_config(folder)):
        check_same_run(saved, cfg)


def saved_config(folder: Path) -> Config:
    """The config.yaml of a run folder; empty where there is none."""
    file = folder / "config.yaml"
    return unresolved(DictConfig(OmegaConf.load(file))) if file.exists() else {}


def baseline(path: str) -> dict[str, Any]:
    """The result.json of a finished run, or of its folder; ConfigError where there is none."""
    file = Path(path).expanduser()
    file = file / "result.json" if file.is_dir() else file
    try:
        result = json.loads(file.read_text())
        if result["fps"] > 0 and result["world_size"] >= 1:
            return dict(result)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"baseline={path}: {file} is no result.json of a finished run; give a run's folder.")

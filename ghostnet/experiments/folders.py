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

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghostnet.config import Config, check_same_run, flat, same_experiment, unresolved
from ghostnet.disk import check_writable
from ghostnet.door.overrides import Checked
from ghostnet.errors import ConfigError, StorageError

LARGEST = 1 << 20
"""Bytes of a run's config."""
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
    for job in checked.jobs:
        if job["baseline"]:
            baseline(job["baseline"])
    if multirun and given:
        _check_settings(checked, folder, key)
    if not multirun:
        check_resume(folder, checked.jobs[0])
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
    _check_settings(checked, folder, f"sweep={name}")
    return Place("hydra.sweep.dir", folder, given=True)


def _check_settings(checked: Checked, folder: Path, what: str) -> None:
    """ConfigError where a sweep's folder holds jobs of it that were trained with other settings."""
    wrong = []
    for name, job in zip(checked.names, checked.jobs, strict=True):
        if name and (saved := saved_config(folder / name)):
            wrong += [f"{name}: {line}" for line in same_experiment(saved, job)]
    if not any(checked.names):  # a search: any trial, but for what is searched
        leaves = [dict(flat(job)) for job in checked.jobs]
        searched = {key for key in leaves[0] if len({repr(each.get(key)) for each in leaves}) > 1}
        for trial in sorted(folder.glob("*/config.yaml"))[:1]:
            lines = same_experiment(saved_config(trial.parent), checked.jobs[0])
            wrong += [f"{trial.parent.name}: {line}" for line in lines if line.partition(" was ")[0] not in searched]
    if wrong:
        raise ConfigError(
            f"{what}: {folder} holds jobs with other settings: {'; '.join(wrong[:4])}"
            f"{'; …' if len(wrong) > 4 else ''}. Give the settings again, or another name."
        )


def claim(place: Place) -> Path:
    """Make the folder of a place -> the folder, which has -2, -3 … behind its name where a new one is taken."""
    try:
        folder = _make(place.folder, its_own=not place.given)
        try:
            check_writable(folder)
        except StorageError as error:
            leave_no_empty_run(folder.absolute())
            raise ConfigError(str(error)) from None
        return folder
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
    """The config.yaml of a run folder; empty where there is none, ConfigError where it is no plain config."""
    file = folder / "config.yaml"
    if not file.exists():
        return {}
    content = read_yaml(file)
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file} is no config of a run.")
    return unresolved(content)


def yaml_loader(text: str) -> Any:  # noqa: ANN401 (a class of PyYAML's)
    """Return the loader for a text: the one in C is ten times as fast, but refuses names of bytes that are no UTF-8."""
    return yaml.SafeLoader if "\\uDC" in text else getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(file: Path) -> Any:  # noqa: ANN401 (a group or a list)
    """A YAML file of a run folder; ConfigError where it can't be read, or holds what this program never writes.

    An alias, which repeats a part of the file, can make a few lines billions of values.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(f"{file} is too large: config files have some kB.")
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml_loader(text))):
            raise ConfigError(f"{file} holds an alias, as no run writes it.")
        return OmegaConf.create(text)
    except (OSError, ValueError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} can't be read: {' '.join(str(error).split())[:200]}.") from None


def baseline(path: str) -> dict[str, Any]:
    """The result.json of a finished run, or of its folder; ConfigError where there is none."""
    file = Path(path).expanduser()
    file = file / "result.json" if file.is_dir() else file
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["fps"] > 0 and result["world_size"] >= 1:
            return dict(result)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"baseline={path}: {file} is no result.json of a finished run; give a run's folder.")


def efficiency(result: dict[str, Any], place: str) -> dict[str, Any]:
    """The speed of a device here as a share of that in another run, and what else differs between the two."""
    other = baseline(place)
    share = result["fps"] / result["world_size"] / (other["fps"] / other["world_size"])
    same = ("amp", "device_name", "batch_size", "image_size", "params")
    differs = [f"{key} {other.get(key)} → {result[key]}" for key in same if other.get(key) != result[key]]
    fps = other["fps"] / other["world_size"]
    return {"baseline": place, "baseline_fps": fps, "scaling_efficiency": share, "baseline_differs": differs}

"""The words of a plan: its own, and those of train.py, one job or several."""

import math
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from ghostnet.config import Config, TrainConfig, flat
from ghostnet.door.groups import CONF, groups
from ghostnet.door.manual import settings
from ghostnet.door.overrides import Checked
from ghostnet.door.typed import without_dashes
from ghostnet.errors import ConfigError
from ghostnet.experiments.grid import jobs_at_the_door, words_of
from ghostnet.schema import did_you_mean, fields

OWN = ("fps", "measure", "plot", "json")
MINUTE = 60.0


@dataclass
class Own:
    """The words that are the plan's."""

    fps: float | None = None
    measure: float | None = None
    """Seconds."""
    plot: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Planned:
    """One job before anything is known of it."""

    name: str
    """What it has of its own."""
    words: list[str]
    """Its overrides, as a command of its own."""
    folder: str = ""
    """In that of the sweep, where it is known already."""


def split(typed: list[str]) -> tuple[Own, list[str], bool]:
    """(own words, those of train.py, whether it is a sweep); ConfigError that lists what is wrong with its own."""
    own, words, faults = Own(), [], []
    multirun = bool({"-m", "--multirun"} & set(typed))
    for word in (word for word in typed if word not in ("-m", "--multirun")):
        key, _, value = word.partition("=")
        try:
            if word.startswith("-"):
                hint = without_dashes(word, [*OWN, *settings("train")])
                raise ConfigError(f"{word}: the plan takes the words of train.py, -m, and no other flag.{hint}")
            if key in OWN:
                setattr(own, key, _value(key, value))
            else:
                _check_near(key)
                words.append(word)
        except ConfigError as fault:
            faults.append(str(fault))
    if own.fps and own.measure:
        faults.append("fps=… and measure=… both say how fast it is: give one of them.")
    if faults:
        raise ConfigError("\n       ".join(faults))
    return own, words, multirun


def _check_near(key: str) -> None:
    """ConfigError for what is nearer to a word of the plan than to any key or group of train.py."""
    known = [*fields(TrainConfig), *groups()]
    near = did_you_mean(key, [*known, *OWN])
    if "." not in key and key not in known and near.removeprefix(" Did you mean ").rstrip("?") in OWN:
        raise ConfigError(f"{key}: no such word.{near}")


def _value(key: str, value: str) -> object:
    if key == "json":
        if value not in ("true", "false"):
            raise ConfigError(f"json={value}: must be true or false.")
        return value == "true"
    if key == "plot":
        path = Path(value).expanduser()
        if path.suffix.lower() != ".png" or not path.parent.is_dir():
            raise ConfigError(f"plot={value}: must be a file that ends in .png, in a folder that is there.")
        return path
    if key == "measure" and value in ("true", "false"):
        return MINUTE if value == "true" else None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        also = "true, or seconds, a number > 0" if key == "measure" else "images per second, a number > 0"
        raise ConfigError(f"{key}={value}: must be {also}.")
    return number


def jobs(words: list[str], checked: Checked) -> list[Planned]:
    """The jobs of a command that passed the door; of a search, those at the corners of its space."""
    if not checked.multirun:
        return [Planned("", words)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides([*words_of(checked.hydra.sweeper.get("params")), *words])
        found = jobs_at_the_door(parsed, checked.hydra)
    described = _described(checked.jobs)
    return [
        Planned(name or text, [*job.words, "hydra.mode=RUN"], name)
        for job, name, text in zip(found, checked.names, described, strict=True)
    ]


def _described(jobs: list[Config]) -> list[str]:
    """What each of several jobs has of its own: 'optim.lr=0.2,seed=1'."""
    all_values = [dict(flat(cfg)) for cfg in jobs]
    keys = dict.fromkeys(key for values in all_values for key in values)
    differ = [key for key in keys if any(v.get(key) != all_values[0].get(key) for v in all_values)]
    return [",".join(f"{key}={values[key]}" for key in differ if key in values) for values in all_values]

"""The door: a command's overrides become checked configs, or one message that lists every fault with its way out."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghostnet.config import OWN_SCHEMAS, Config, check, flat, resolved, unresolved
from ghostnet.errors import ConfigError
from ghostnet.schema import did_you_mean
from ghostnet.sweeps import CONF, SweepJob, check_plugins, jobs_at_the_door, register, words_of


@dataclass(frozen=True)
class Checked:
    """A command that passed the door."""

    jobs: list[Config]
    """The resolved config of each job, one unless it is a sweep; of a search, those at the corners of its space."""
    hydra: DictConfig
    """Hydra's own config."""
    names: list[str] = field(default_factory=lambda: [""])
    """The folder of each job in the sweep's; empty where that is not known yet."""
    multirun: bool = False
    """By -m, or by an experiment that is a sweep."""


def check_command(name: str, overrides: Sequence[str], multirun: bool) -> Checked:
    """Compose every job of a command and check it; one ConfigError lists all that is wrong, each with its way out."""
    with _hydra(), _yaml_errors():
        parsed = [_parse(name, word) for word in overrides]
        hydra = _hydra_config(name, parsed)
        multirun = multirun or (hydra is not None and hydra.mode == RunMode.MULTIRUN)
        if swept := [] if multirun else [o.input_line for o in parsed if o.is_sweep_override()]:
            words = " ".join(word.replace("hydra.run.dir=", "hydra.sweep.dir=") for word in overrides)
            sweep = (
                f"; to try each value in a job of its own:\n  python train.py -m {words}" if name == "train" else "."
            )
            raise ConfigError(
                f"{swept[0]}: several values. A list is written [a,b], a value with a comma is quoted{sweep}"
            )
        jobs = [SweepJob("", list(overrides))]
        if multirun:
            swept_by_config = words_of(hydra.sweeper.get("params")) if hydra is not None else []
            jobs = jobs_at_the_door([*(_parse(name, word) for word in swept_by_config), *parsed], hydra)
        if not jobs:
            raise ConfigError("this sweep has no job: one of its keys has no value.")
        found: dict[str, None] = {}
        configs = []
        for job in jobs:
            config, wrong = _check_job(name, job.words)
            found |= dict.fromkeys(wrong)
            configs.append(config)
        if found:
            raise ConfigError("\n       ".join(found))
        if hydra is None or not multirun:
            hydra = compose(name, overrides=jobs[0].words, return_hydra_config=True).hydra
        check_plugins(hydra)
        return Checked(configs, hydra, [job.name for job in jobs], multirun)


def _hydra_config(name: str, parsed: Sequence[Override]) -> DictConfig | None:
    """Hydra's part of the config, on which it depends whether and how a command sweeps; None where it has faults."""
    words = [
        o.input_line or "" for o in parsed if o.key_or_group in ("experiment", "local") or "hydra" in o.key_or_group
    ]
    try:
        hydra: DictConfig = compose(name, overrides=words, return_hydra_config=True).hydra
        OmegaConf.resolve(hydra.sweep)
        return hydra
    except (HydraException, OmegaConfBaseException):
        return None


@contextlib.contextmanager
def _yaml_errors() -> Iterator[None]:
    """ConfigError with file and line where a config file is no YAML."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(
            f"{mark.name if mark else 'a config file'}, line {mark.line + 1 if mark else '?'}: {error.problem}"
        ) from None


def _parse(name: str, word: str) -> Override:
    """One override; ConfigError that names it and the way out where it is none."""
    try:
        parsed: Override = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([word])[0]
        return parsed
    except HydraException:
        key, equals, value = word.partition("=")
        if equals and key.strip():
            quoted = value.strip("'\"").replace("'", "\\'")
            way_out = f"quote a value with special characters, \"{key.strip()}='{quoted}'\""
        else:
            meant = {"evaluate": "ckpt", "pack": "data.root"}.get(name)
            way_out = f"did you mean {meant}={word}?" if meant else f"give it a value, {word}=…"
        raise ConfigError(f"{word!r} is not of the form key=value: {way_out}") from None


def _hydra() -> Any:  # noqa: ANN401 (a context manager that hydra does not type)
    GlobalHydra.instance().clear()
    register()
    return initialize_config_dir(str(CONF), version_base="1.3")


def _check_job(name: str, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config of one job, and what is wrong with it; what is wrong is left out of the config."""
    words = {o.input_line or "": o for o in OverridesParser.create().parse_overrides(list(overrides))}
    choices = [word for word, o in words.items() if _is_group(o) or o.key_or_group.startswith("hydra")]
    faulty = {word: fault for word in choices if _is_group(words[word]) and (fault := _group_fault(words[word]))}
    try:
        base = compose(name, overrides=[word for word in choices if word not in faulty])
        faulty |= {
            word: fault for word, o in words.items() if word not in choices and (fault := _key_fault(name, base, o))
        }
        cfg = compose(name, overrides=[word for word in words if word not in faulty])
        if missing := OmegaConf.missing_keys(cfg):
            return {}, [*faulty.values(), *(f"{key}: must be given, {key}=…" for key in sorted(missing))]
        config = resolved(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        return {}, [*faulty.values(), _first_line(error)]
    return config, [*faulty.values(), *check(name, config)]


def groups() -> list[str]:
    """The config groups: the folders of conf/."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def options(group: str) -> list[str]:
    """The choices of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _has(group: str, option: str, path: str) -> bool:
    """Whether an option of a group has the dotted key."""
    parent, _, leaf = f".{path}".rpartition(".")
    cfg = OmegaConf.load(CONF / group / f"{option}.yaml")
    node = OmegaConf.select(cfg, parent.removeprefix(".")) if parent else cfg
    return isinstance(node, DictConfig) and leaf in list(node.keys())


def _is_group(override: Override) -> bool:
    return override.key_or_group in groups()


def _group_fault(override: Override) -> str | None:
    group, value = override.key_or_group, override.value()
    if value in options(group):
        return None
    if value is None:
        return f"{group}=null: no option. There are: {', '.join(options(group))}; to choose none, leave {group} out."
    if isinstance(value, dict):
        return f"{group}={{…}}: give its keys one by one, {group}.key=value."
    hint = did_you_mean(str(value), options(group))
    return f"{group}={value}: no such option.{hint} There are: {', '.join(options(group))}."


def _key_fault(name: str, base: DictConfig, override: Override) -> str | None:
    """Why a key can't be set: the config has none of that name; with the nearest that it has."""
    key = override.key_or_group
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    # A value still to be given, ???, counts as a key only in keys().
    if isinstance(node, DictConfig) and leaf in list(node.keys()):
        return None
    known = [k for k, _ in flat(unresolved(base)) if not k.endswith("_target_")]
    if isinstance(node, DictConfig) and parent:
        siblings = [str(k) for k in node if k != "_target_"]
        group, _, path = key.partition(".")
        choices = [] if group in OWN_SCHEMAS.get(name, {}) else options(group)
        if homes := [f"{group}={option}" for option in choices if _has(group, option, path)]:
            return f"{key}: not a key of the chosen {group}, but of {', '.join(homes)}."
        near = did_you_mean(leaf, siblings).replace("mean ", f"mean {parent}.")
        return f"{key}: no such key.{near} {parent} has: {', '.join(siblings) or 'no keys'}."
    # Perhaps the right name in the wrong place, such as lr for optim.lr.
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    hint = f" Did you mean {same[0]}?" if same and not parent else did_you_mean(key, [*known, *groups()])
    return f"{key or override.input_line}: no such key.{hint}"


def quoted(text: str | Path) -> str:
    """A text as hydra's grammar reads any text: as it is, or in quotes where it has special characters."""
    if re.fullmatch(r"[\w./-]+", str(text), re.ASCII):
        return str(text)
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The groups and keys that overrides name, in their order."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [o.key_or_group for o in parsed if not o.key_or_group.startswith("hydra")]


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).splitlines()[0])

"""Compose the config and check it at the door: keys, types, ranges and options, before anything is started or written."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghostnet.errors import ConfigError
from ghostnet.schema import (
    Fraction,
    NonNegative,
    Parameter,
    Positive,
    PositiveInt,
    did_you_mean,
    faults,
    fields,
    signature,
)

CONF = Path(__file__).parent.parent / "conf"
Config = dict[str, Any]


@dataclass
class TrainConfig:
    """The keys of conf/train.yaml."""

    model: dict
    data: dict
    optim: dict
    schedule: dict
    amp: dict
    device: dict
    logger: dict
    epochs: PositiveInt
    seed: int
    label_smoothing: Fraction
    clip_grad_norm: Positive | None
    accumulate: PositiveInt
    ema_decay: Fraction
    log_every: PositiveInt
    eval_every: PositiveInt
    save_every: PositiveInt | None
    resume: str | None


@dataclass
class EvaluateConfig:
    """The keys of conf/evaluate.yaml."""

    ckpt: str
    ema: bool | None
    model: dict
    data: dict
    amp: dict
    device: dict


@dataclass
class ModelExtras:
    """The keys of a model group that are not its constructor's."""

    num_classes: PositiveInt | None
    weights: str | None
    freeze: bool


@dataclass
class DataConfig:
    """The keys of a data group; dataset, preprocessing, augment and mix have constructors of their own."""

    root: str | None
    dataset: dict
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    workers: PositiveInt | None
    preprocessing: dict
    image_size: PositiveInt
    augment: dict
    mix: dict


@dataclass
class DeviceConfig:
    """The keys of a device group."""

    kind: Literal["auto", "cpu", "cuda", "npu"]
    count: PositiveInt
    ids: list[int] | None
    batch_size: PositiveInt


@dataclass
class LoggerConfig:
    """The keys of a logger group."""

    wandb: dict | None


SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig}
GROUP_SCHEMAS = {"data": DataConfig, "device": DeviceConfig, "logger": LoggerConfig}


def build(node: Config, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (whatever _target_ makes)
    """Call the node's _target_ with the node's keys; a value that it refuses is a ConfigError."""
    keys = {key: value for key, value in node.items() if key != "_target_"}
    try:
        return get_object(node["_target_"])(*args, **keys, **kwargs)
    except ValueError as error:
        raise ConfigError(f"{node['_target_']}: {error}") from None


def resolved(cfg: DictConfig) -> Config:
    """Plain dicts and lists with every interpolation replaced by its value."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flat(node: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of a nested config as (dotted key, value)."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Checked:
    """A command that passed the door."""

    jobs: list[Config]
    """The resolved config of each job, one unless it is a sweep."""
    hydra: DictConfig
    """Hydra's own config."""


def check_command(name: str, overrides: Sequence[str], multirun: bool) -> Checked:
    """Compose every job of a command and check it; one ConfigError lists all that is wrong, each with its way out."""
    with _hydra():
        try:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [list(overrides)]
        except HydraException as error:
            raise ConfigError(_first_line(error)) from None
        found: dict[str, None] = {}
        configs = []
        for job in jobs:
            config, wrong = _check_job(name, job)
            found |= dict.fromkeys(wrong)
            configs.append(config)
        if found:
            raise ConfigError("\n       ".join(found))
        cfg = compose(name, overrides=list(jobs[0]), return_hydra_config=True)
        return Checked(configs, cfg.hydra)


def _hydra() -> Any:  # noqa: ANN401 (a context manager that hydra does not type)
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(CONF), version_base="1.3")


def _check_job(name: str, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config of one job, and what is wrong with it; the config is empty where it can't be composed."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [o for o in parsed if not _is_group(o) and not o.key_or_group.startswith("hydra")]
    others = [o.input_line or "" for o in parsed if o not in values]
    found = [fault for o in parsed if _is_group(o) and (fault := _group_fault(o))]
    if found:
        return {}, found + _key_faults(name, [], values)
    found = _key_faults(name, others, values)
    if found:
        return {}, found
    try:
        config = resolved(compose(name, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        return {}, [_first_line(error)]
    return config, check(name, config)


def groups() -> list[str]:
    """The config groups: the folders of conf/."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def options(group: str) -> list[str]:
    """The choices of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _is_group(override: Override) -> bool:
    return override.key_or_group in groups()


def _group_fault(override: Override) -> str | None:
    group, value = override.key_or_group, override.value()
    if value is None or value in options(group):
        return None
    if isinstance(value, dict):
        return f"{group}={{…}}: give its keys one by one, {group}.key=value."
    hint = did_you_mean(str(value), options(group))
    return f"{group}={value}: no such option.{hint} There are: {', '.join(options(group))}."


def _key_faults(name: str, others: list[str], values: list[Override]) -> list[str]:
    """Overrides of keys that the config does not have, with the nearest that it has."""
    try:
        base = compose(name, overrides=others)
    except (HydraException, OmegaConfBaseException) as error:
        return [_first_line(error)]
    known = [key for key, _ in flat({str(k): v for k, v in OmegaConf.to_container(base, resolve=False).items()})]  # type: ignore[union-attr]
    known = [key for key in known if not key.endswith("_target_")]
    found = []
    for override in values:
        key = override.key_or_group
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(base, parent) if parent else base
        if isinstance(node, DictConfig) and leaf in node:
            continue
        siblings = [k for k in known if k.rpartition(".")[0] == parent]
        hint = did_you_mean(key, siblings) or did_you_mean(key, [*known, *groups()])
        if not hint:
            # The right name in the wrong place, such as lr for optim.lr.
            same = [k for k in known if k.rpartition(".")[2] == leaf]
            hint = f" Did you mean {same[0]}?" if same else ""
        inside = f" {parent} has: {', '.join(k.rpartition('.')[2] for k in siblings)}." if siblings and parent else ""
        found.append(f"{key}: no such key.{hint}{inside}")
    return found


def check(name: str, config: Config) -> list[str]:
    """What is wrong with a resolved config, a line each."""
    found = faults(config, fields(SCHEMAS[name]), "")
    for group, node in config.items():
        if not isinstance(node, dict):
            continue
        if group in GROUP_SCHEMAS:
            found += faults(node, fields(GROUP_SCHEMAS[group]), f"{group}.")
            for key, inner in node.items():
                if isinstance(inner, dict):
                    found += _target_faults(inner, f"{group}.{key}.", {})
        else:
            found += _target_faults(node, f"{group}.", fields(ModelExtras) if group == "model" else {})
    return found


def _target_faults(node: Config, prefix: str, extras: dict[str, Parameter]) -> list[str]:
    target = node.get("_target_")
    if not isinstance(target, str):
        return [f"{prefix}_target_: must be the dotted name of a function or class of this project."]
    try:
        return faults(node, signature(target) | extras, prefix)
    except ConfigError as error:
        return [f"{prefix}{error}"]


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).splitlines()[0])

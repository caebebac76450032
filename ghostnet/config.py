"""Compose the config and check keys, types, ranges and options at the door, before anything is started or written."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
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
    NonNegativeInt,
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

    model: Config
    data: Config
    optim: Config
    schedule: Config
    amp: Config
    device: Config
    logger: Config
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
    model: Config
    data: Config
    amp: Config
    device: Config


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
    dataset: Config
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    workers: PositiveInt | None
    preprocessing: Config
    image_size: PositiveInt
    augment: Config
    mix: Config


@dataclass
class DeviceConfig:
    """The keys of a device group."""

    kind: Literal["auto", "cpu", "cuda", "npu"]
    count: PositiveInt
    ids: list[NonNegativeInt] | None
    batch_size: PositiveInt


@dataclass
class LoggerConfig:
    """The keys of a logger group."""

    wandb: Config | None


SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig}
GROUP_SCHEMAS = {"data": DataConfig, "device": DeviceConfig, "logger": LoggerConfig}


def build(node: Config, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (whatever _target_ makes)
    """Call the node's _target_ with the node's keys; a value that it refuses is a ConfigError."""
    keys = {key: value for key, value in node.items() if key != "_target_"}
    try:
        return get_object(node["_target_"])(*args, **keys, **kwargs)
    except ValueError as error:
        raise ConfigError(f"{node['_target_'].rpartition('.')[2]}: {error}") from None


def resolved(cfg: DictConfig) -> Config:
    """Plain dicts and lists with every interpolation replaced by its value."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def unresolved(cfg: DictConfig) -> Config:
    """Plain dicts and lists with the interpolations as they were written."""
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The groups and keys that overrides name, in their order."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [o.key_or_group for o in parsed if not o.key_or_group.startswith("hydra")]


# What must stay the same within a run; the rest may change: epochs, learning rate, threads, where the data lie.
FIXED = (
    *("seed", "accumulate", "ema_decay", "amp._target_", "optim._target_", "schedule.cooldown_epochs"),
    *("model._target_", "model.width", "model.num_classes", "model.freeze"),
    *("data.dataset._target_", "data.batch_size", "data.image_size"),
)


def check_same_run(saved: Config, config: Config) -> None:
    """ConfigError with the differences where a checkpoint's config is of another run than the one to go on."""
    then, now = dict(flat(resolved(OmegaConf.create(saved)))), dict(flat(config))
    differ = [f"{key} was {then.get(key)}, is {now.get(key)}" for key in FIXED if then.get(key) != now.get(key)]
    if differ:
        raise ConfigError(
            f"resume: the checkpoint is of another run: {'; '.join(differ)}. Repeat its settings, or start a new run "
            "from its weights with model.weights=PATH."
        )


def changes(saved: Config, config: Config) -> list[str]:
    """What differs from a checkpoint's config, a line each: 'optim.lr was 0.4, is 0.2'."""
    then, now = dict(flat(resolved(OmegaConf.create(saved)))), dict(flat(config))
    keys = [key for key in now if then.get(key) != now[key] and key != "resume"]
    return [f"{key} was {then.get(key)}, is {now[key]}" for key in keys]


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
    with _hydra(), _yaml_errors():
        parsed = [_parse(name, word) for word in overrides]
        if swept := [] if multirun else [o.input_line for o in parsed if o.is_sweep_override()]:
            words = " ".join(word.replace("hydra.run.dir=", "hydra.sweep.dir=") for word in overrides)
            raise ConfigError(
                f"{swept[0]}: several values. A list is written [a,b], a value with a comma is quoted; to try each "
                f"value in a job of its own:\n  python train.py -m {words}"
            )
        try:
            jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [list(overrides)]
        except HydraException as error:
            raise ConfigError(_first_line(error)) from None
        if not jobs:
            raise ConfigError("this sweep has no job: one of its keys has no value.")
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
            way_out = f"did you mean ckpt={word}?" if name == "evaluate" else f"give it a value, {word}=…"
        raise ConfigError(f"{word!r} is not of the form key=value: {way_out}") from None


def _hydra() -> Any:  # noqa: ANN401 (a context manager that hydra does not type)
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(CONF), version_base="1.3")


def _check_job(name: str, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config of one job, and what is wrong with it; what is wrong is left out of the config."""
    words = {o.input_line or "": o for o in OverridesParser.create().parse_overrides(list(overrides))}
    choices = [word for word, o in words.items() if _is_group(o) or o.key_or_group.startswith("hydra")]
    faulty = {word: fault for word in choices if _is_group(words[word]) and (fault := _group_fault(words[word]))}
    try:
        base = compose(name, overrides=[word for word in choices if word not in faulty])
        faulty |= {word: fault for word, o in words.items() if word not in choices and (fault := _key_fault(base, o))}
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


def _key_fault(base: DictConfig, override: Override) -> str | None:
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
        if homes := [f"{group}={option}" for option in options(group) if _has(group, option, path)]:
            return f"{key}: not a key of the chosen {group}, but of {', '.join(homes)}."
        near = did_you_mean(leaf, siblings).replace("mean ", f"mean {parent}.")
        return f"{key}: no such key.{near} {parent} has: {', '.join(siblings) or 'no keys'}."
    # Perhaps the right name in the wrong place, such as lr for optim.lr.
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    hint = f" Did you mean {same[0]}?" if same and not parent else did_you_mean(key, [*known, *groups()])
    return f"{key or override.input_line}: no such key.{hint}"


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
    if "local" in config:
        found = ["conf/local/default.yaml: its first line must be '# @package _global_'."]
    values = dict(flat(config))
    size, same = values.get("data.image_size"), values.get("data.preprocessing.image_size")
    if size != same:
        found.append(f"data.preprocessing.image_size={same}: must equal data.image_size={size}; set that alone.")
    ids, count = values.get("device.ids"), values.get("device.count")
    if isinstance(ids, list) and len(ids) != count:
        found.append(f"device.ids={ids}: names {len(ids)} cards, but device.count is {count}.")
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

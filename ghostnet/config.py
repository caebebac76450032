"""The config: its keys beside those of constructors, what is wrong with one, what two of them differ in."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ghostnet.door.conflicts import conflicts
from ghostnet.door.groups import targets
from ghostnet.errors import ConfigError
from ghostnet.schema import (
    REQUIRED,
    Fault,
    Fraction,
    NonNegativeInt,
    Parameter,
    Positive,
    PositiveInt,
    Quality,
    faults,
    fields,
    signature,
    whole,
)

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
    compile: Config
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
    sync_bn: bool
    dist_bn: Literal["reduce", "broadcast"]
    baseline: str | None
    sweep: str | None = None
    rerun: str | None = None
    """Runs of version 0.2 had neither."""
    keep: PositiveInt = 2
    force: bool = False
    stall_timeout: Positive = 1800
    on_nan: Literal["stop", "skip", "rewind"] = "stop"
    """Nor had runs of version 0.3 these four."""


@dataclass
class EvaluateConfig:
    """The keys of conf/evaluate.yaml."""

    ckpt: str
    ema: bool | None
    model: Config
    data: Config
    amp: Config
    device: Config
    stall_timeout: Positive = 1800


@dataclass
class PackConfig:
    """The keys of conf/pack.yaml."""

    data: Config
    out: str
    size: PositiveInt | None
    quality: Quality
    shard_mb: PositiveInt
    on_error: Literal["raise", "skip"]
    workers: PositiveInt | None
    stall_timeout: Positive


@dataclass
class SourceConfig:
    """The keys of the folder that is packed."""

    root: str
    classes: str | None
    max_pixels: PositiveInt


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
    on_error: Literal["raise", "skip"] = "raise"
    cache_val: bool = False
    """Runs of version 0.2 had neither."""
    classes: str | None = None
    max_pixels: PositiveInt = 200_000_000
    """Nor had runs of version 0.4 these."""


@dataclass
class DeviceConfig:
    """The keys of a device group."""

    kind: Literal["auto", "cpu", "cuda", "npu"]
    count: PositiveInt
    ids: list[NonNegativeInt] | None
    batch_size: PositiveInt
    allow_hf32: bool | None = None
    """Only of NPUs."""


@dataclass
class CompileConfig:
    """The keys of compile; true stands for inductor, false for null."""

    backend: str | None


@dataclass
class LoggerConfig:
    """The keys of a logger group."""

    wandb: Config | None


SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig, "pack": PackConfig}
GROUP_SCHEMAS = {"data": DataConfig, "device": DeviceConfig, "logger": LoggerConfig, "compile": CompileConfig}
OWN_SCHEMAS = {"pack": {"data": SourceConfig}}
"""Of nodes that are no groups in one primary config."""


def build(node: Config, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (whatever _target_ makes)
    """Call the node's _target_ with the node's keys; a value that it refuses is a ConfigError."""
    keys = {key: value for key, value in node.items() if key != "_target_"}
    try:
        return get_object(node["_target_"])(*args, **keys, **kwargs)
    except ValueError as error:
        raise ConfigError(f"{node['_target_'].rpartition('.')[2]}: {error}") from None


def build_model(node: Config, num_classes: int) -> Any:  # noqa: ANN401 (whatever _target_ makes)
    """The model of a model group; its keys beside the constructor's are left to the caller."""
    extras = fields(ModelExtras)
    return build({key: value for key, value in node.items() if key not in extras}, num_classes=num_classes)


def resolved(cfg: DictConfig) -> Config:
    """Return plain dicts and lists with every interpolation replaced by its value.

    Of whole numbers 30 stands for 30.0, and what compile=VALUE stands for is written out.
    """
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    config = {str(key): value for key, value in container.items()}
    if "compile" in config and not isinstance(short := config["compile"], dict):
        config["compile"] = {"backend": {True: "inductor", False: None}.get(short, short)}
    nodes = [(config, {key: value for schema in SCHEMAS.values() for key, value in fields(schema).items()})]
    for group, node in config.items():
        if isinstance(node, dict):
            schema = GROUP_SCHEMAS.get(group)
            nodes.append((node, fields(schema) if schema else _constructor(node) | fields(ModelExtras)))
            nodes += [(inner, _constructor(inner)) for inner in node.values() if isinstance(inner, dict)]
    for node, parameters in nodes:
        for key in node.keys() & parameters.keys():
            node[key] = whole(node[key], parameters[key].type)
    return config


def _constructor(node: Config) -> dict[str, Parameter]:
    """Return the parameters of a node's _target_, none if it has none that is ours: that is told elsewhere."""
    with contextlib.suppress(ConfigError):
        return signature(str(node.get("_target_")))
    return {}


def unresolved(cfg: DictConfig) -> Config:
    """Plain dicts and lists with the interpolations as they were written."""
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


# What a checkpoint's content is made for.
BUILT = (
    *("amp._target_", "optim._target_", "model._target_", "model.width", "model.num_classes", "model.freeze"),
    *("sync_bn",),
)
# What must stay the same within a run too, with the global batch; the rest may change: epochs, learning rate, threads,
# devices, where the data lie.
FIXED = ("seed", "ema_decay", "schedule.cooldown_epochs", "data.dataset._target_", "data.image_size")


def check_same_run(saved: Config, config: Config) -> None:
    """ConfigError with the differences where a checkpoint's config is of another run than the one to go on.

    With force=true only where the checkpoint's content can't be that run's.
    """
    then, now = dict(flat(resolved(OmegaConf.create(saved)))), dict(flat(config))
    force = now.get("force")
    unfit = [f"{key} was {then.get(key)}, is {now.get(key)}" for key in BUILT if then.get(key) != now.get(key)]
    averages = [values.get("ema_decay") for values in (then, now)]
    if force and bool(averages[0]) != bool(averages[1]):
        unfit.append("ema_decay was {}, is {}".format(*averages))
    differ = [f"{key} was {then.get(key)}, is {now.get(key)}" for key in FIXED if then.get(key) != now.get(key)]
    batches = [each["data.batch_size"] * each["device.count"] * each["accumulate"] for each in (then, now)]
    if batches[0] != batches[1]:
        way_out = same_batch(batches[0], now["device.count"], now["accumulate"]).rstrip(".")
        factors = "data.batch_size × device.count × accumulate"
        differ.append(f"{factors} was {batches[0]}, is {batches[1]} ({way_out})")
    if unfit:
        differ = unfit if force else unfit + differ
        even = "The checkpoint's content is made for these, so force=true does not help. " if force else ""
    elif differ and not force:
        even = "Go on all the same with force=true. "
    else:
        return
    raise ConfigError(
        f"resume: the checkpoint is of another run: {'; '.join(differ)}. {even}Repeat its settings, or start a new run "
        "from its weights with model.weights=PATH."
    )


def same_batch(global_batch_size: int, ranks: int, accumulate: int) -> str:
    """How so many ranks keep a global batch, in a sentence."""
    size, rest = divmod(global_batch_size, ranks * accumulate)
    if rest or not size:
        parts = f"{ranks} ranks{f' × accumulate={accumulate}' if accumulate > 1 else ''}"
        return f"{global_batch_size} is not divisible by {parts}: give a device.count that divides it."
    return f"Give data.batch_size={size}, which keeps it."


UNTOLD = ("resume", "logger", "keep", "force", "stall_timeout")


def changes(saved: Config, config: Config) -> list[str]:
    """What differs from a checkpoint's config, a line each: 'optim.lr was 0.4, is 0.2'; loggers change no run."""
    then, now = dict(flat(resolved(OmegaConf.create(saved)))), dict(flat(config))
    for group, schema in GROUP_SCHEMAS.items():
        for key, field in fields(schema).items():
            if field.default is not REQUIRED:  # runs of older versions had none
                then.setdefault(f"{group}.{key}", field.default)
    keys = [key for key in now if then.get(key) != now[key] and key.partition(".")[0] not in UNTOLD]
    return [f"{key} was {then.get(key)}, is {now[key]}" for key in keys]


HARMLESS = (
    *("resume", "sweep", "rerun", "baseline", "log_every", "save_every", "logger.", "data.root", "data.dataset.root"),
    *("keep", "force", "stall_timeout"),
    *("data.workers", "data.cache_val", "data.eval_batch_size", "device.kind", "device.ids"),
)
"""What a run may be repeated with and stay the same experiment; a prefix ends with a dot."""


def same_experiment(saved: Config, config: Config) -> list[str]:
    """In what two runs are not the same experiment, a line each."""
    return [
        change
        for change in changes(saved, config)
        if not change.startswith(tuple(f"{key} " if key[-1] != "." else key for key in HARMLESS))
    ]


def flat(node: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of a nested config as (dotted key, value)."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(name: str, config: Config) -> list[Fault]:
    """What is wrong with a resolved config."""
    found = faults(config, fields(SCHEMAS[name]), "")
    schemas = GROUP_SCHEMAS | OWN_SCHEMAS.get(name, {})
    for group, node in config.items():
        if not isinstance(node, dict):
            continue
        if group in schemas:
            found += faults(node, fields(schemas[group]), f"{group}.")
            for key, inner in node.items():
                if isinstance(inner, dict):
                    found += _target_faults(inner, f"{group}.{key}.", {})
        else:
            found += _target_faults(node, f"{group}.", fields(ModelExtras) if group == "model" else {})
    return found + conflicts(dict(flat(config)))


def _target_faults(node: Config, prefix: str, extras: dict[str, Parameter]) -> list[Fault]:
    target, key = node.get("_target_"), f"{prefix}_target_"
    if not isinstance(target, str):
        return [Fault((key,), f"{key}: must be the dotted name of a function or class of this project.")]
    try:
        parameters = signature(target)
        if target not in (named := targets(key)):
            listed = f"those of {key} are {', '.join(named)}" if named else f"none names a {key}"
            return [Fault((key,), f"{key}: {target} is named by no file of conf/; {listed}.")]
        return faults(node, parameters | extras, prefix)
    except ConfigError as error:
        return [Fault((key,), f"{prefix}{error}")]

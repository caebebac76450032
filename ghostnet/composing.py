"""From the words of a job to its config: what is wrong with each word, and what is wrong with what they make."""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ghostnet.config import OWN_SCHEMAS, Config, check, flat, resolved, unresolved
from ghostnet.groups import CONF, groups, options
from ghostnet.origins import Origins, Source
from ghostnet.schema import Fault, did_you_mean

ERRORS = (HydraException, OmegaConfBaseException, yaml.MarkedYAMLError)
"""What composing raises for faults of a user."""
Look = Callable[[Config], list[Fault]]
"""What is wrong with a job beside its config: files that are not there."""
OPTIONAL = ("experiment", "local")
"""Groups that a config does without."""


@dataclass(frozen=True)
class Job:
    """One job of a command."""

    config: Config
    """Resolved, without what is wrong; empty where nothing could be composed."""
    faults: list[Fault]
    """With where each was set."""


@dataclass(frozen=True)
class _Base:
    """What the choices of a command compose, before its keys are set."""

    cfg: DictConfig | None
    hydra: DictConfig
    faults: list[Fault]
    choices: list[str]
    """Without those that are wrong."""


class Composer:
    """Jobs of one primary config; those of the same choices are composed once. Within an initialized Hydra."""

    def __init__(self, name: str, look: Look = lambda _: []) -> None:
        """look: finds what is wrong beside the config; it is asked of each job whose config could be composed."""
        self.name, self.look = name, look
        self.base = functools.cache(self._base)
        self.sources = functools.cache(self._sources)

    def job(self, words: Sequence[str]) -> Job:
        """Compose and check one job."""
        overrides = [parsed(word) for word in words]
        base = self.base(tuple(word for word, o in zip(words, overrides, strict=True) if is_choice(o)))
        faults, cfg = list(base.faults), copy.deepcopy(base.cfg)
        if cfg is not None:
            for override in overrides:
                if not is_choice(override) and (fault := self._set(cfg, base, override)):
                    faults.append(fault)
        config: Config = {}
        if cfg is not None:
            config, more = _plain(cfg)
            told = {key for fault in [*faults, *more] for key in fault.keys}
            checks = check(self.name, config) + self.look(config) if config else []
            more += [fault for fault in checks if not any(_within(key, told) for key in fault.keys)]
            faults += _without_echoes(cfg, more)
        if faults:
            origins = Origins(self.sources(tuple(base.choices)), (o.key_or_group for o in overrides))
            faults = [replace(f, text=f.text + origins.told(f.keys)) if f.has_place else f for f in faults]
        return Job(config, faults)

    def hydra(self, words: Sequence[str]) -> DictConfig:
        """Hydra's own config for the words of a faulty job, without what is wrong."""
        base = self.base(tuple(word for word in words if is_choice(parsed(word))))
        more = [word for word in words if parsed(word).key_or_group.startswith("hydra.")]
        try:
            return DictConfig(compose(self.name, overrides=[*base.choices, *more], return_hydra_config=True).hydra)
        except ERRORS:
            return base.hydra

    def _base(self, choices: tuple[str, ...]) -> _Base:
        """Compose the choices; where that fails, one after the other, to tell which are wrong."""
        faults = {word: fault for word in choices if (fault := _group_fault(self.name, parsed(word)))}
        good = [word for word in choices if word not in faults]
        try:
            cfg = compose(self.name, overrides=good, return_hydra_config=True)
        except ERRORS:
            cfg, tried, good = None, good, []
            for word in (None, *tried):
                try:
                    cfg = compose(self.name, overrides=[*good, word] if word else [], return_hydra_config=True)
                    good += [word] if word else []
                except ERRORS as error:
                    faults[word or ""] = _composing_fault(word, error)
                    if word is None:
                        return _Base(None, OmegaConf.create(), list(faults.values()), [])
        assert cfg is not None
        hydra = cfg.hydra
        with open_dict(cfg):
            del cfg["hydra"]
        return _Base(cfg, hydra, list(faults.values()), good)

    def _sources(self, choices: tuple[str, ...]) -> list[Source]:
        """The files of conf/ that are composed, in their order."""
        loader: Any = GlobalHydra.instance().config_loader()
        try:
            defaults = loader.compute_defaults_list(self.name, list(choices), RunMode.RUN).defaults
        except ERRORS:
            return []
        files = [Source(CONF / f"{default.config_path}.yaml", default.package or "") for default in defaults]
        return list(dict.fromkeys(source for source in files if source.path.is_file()))

    def _set(self, cfg: DictConfig, base: _Base, override: Override) -> Fault | None:
        """Give a key its value; what is wrong where it can't be given."""
        key, word = override.key_or_group, override.input_line or ""
        hydra = key == "hydra" or key.startswith("hydra.")
        root = OmegaConf.create({"hydra": base.hydra}) if hydra else base.cfg
        assert root is not None
        there = _has_key(root, key)
        if not there and not (hydra and override.is_add()):
            return _unknown(self.name, root, override)
        if there and override.is_add() and not override.is_force_add():
            return Fault((key,), f"{word}: {key} is there already. Leave the + out.")
        target = cfg
        if hydra:
            target = OmegaConf.create({"hydra": copy.deepcopy(base.hydra)})
            OmegaConf.set_struct(target, True)
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], target)
        except ERRORS as error:
            return Fault((key,), f"{word}: {first_line(error.__cause__ or error)}")
        return None


@functools.cache
def parsed(word: str) -> Override:
    """One override; HydraException where it is none."""
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([word])[0]


def is_choice(override: Override) -> bool:
    """Whether an override chooses an option of a group, or where to look for them."""
    key = override.key_or_group
    return key in groups() or key.startswith("hydra/") or key == "hydra.searchpath"


def _group_fault(name: str, override: Override) -> Fault | None:
    """What is wrong with a choice."""
    group, value = override.key_or_group, override.value()
    if group == "hydra.searchpath":
        return None
    known = _hydra_options(group) if group.startswith("hydra/") else options(group)
    listed = f"There are: {', '.join(known)}."
    if group in OWN_SCHEMAS.get(name, {}):
        return Fault((group,), f"{override.input_line}: no group of this program; give its keys, {group}.key=value.")
    if not known:
        there = [f"hydra/{each}" for each in _hydra_groups()]
        return Fault((group,), f"{group}: no such group.{did_you_mean(group, there)} There are: {', '.join(there)}.")
    if override.is_delete():
        needed = group not in OPTIONAL and not group.startswith("hydra/")
        return Fault((group,), f"{override.input_line}: {name} can't do without. {listed}") if needed else None
    if override.is_add():
        plain = (override.input_line or "").lstrip("+")
        return Fault((group,), f"{override.input_line}: leave the + out, {plain}.")
    if value is None:
        if group in OPTIONAL or group.startswith("hydra/"):
            return None
        return Fault((group,), f"{group}=null: no option. {listed} To choose none, leave {group} out.")
    if isinstance(value, dict):
        return Fault((group,), f"{group}={{…}}: give its keys one by one, {group}.key=value.")
    if isinstance(value, list) and group not in OPTIONAL:
        shown = ",".join(map(str, value))
        text = f"{group}=[{shown}]: one option at a time; each in a job of its own: -m {group}={shown}"
        return Fault((group,), f"{text}. {listed}")
    wrong = [str(item) for item in (value if isinstance(value, list) else [value]) if str(item) not in known]
    hints = "".join(did_you_mean(item, known) for item in wrong)
    return Fault((group,), f"{group}={','.join(wrong)}: no such option.{hints} {listed}") if wrong else None


def _hydra_groups() -> list[str]:
    loader: Any = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options("hydra", ObjectType.GROUP))


def _hydra_options(group: str) -> list[str]:
    loader: Any = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options(group)) if group.removeprefix("hydra/") in _hydra_groups() else []


def _composing_fault(word: str | None, error: Exception) -> Fault:
    """Why composing failed with one more choice, or with none."""
    keys = (parsed(word).key_or_group,) if word else ()
    said = f"{word}: " if word else ""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
        return Fault((), f"{where}: {error.problem}.")
    if isinstance(error, MissingConfigException) and (file := error.missing_cfg_file):
        group, _, option = str(file).rpartition("/")
        inside = re.match(r"In '([^']+)'", str(error))
        known = options(group) if group in groups() else []
        if inside and known:
            there = f"{did_you_mean(option, known)} There are: {', '.join(known)}."
            return Fault((), f"{group}={option}: no such option.{there} Set by conf/{inside[1]}.yaml.")
    return Fault(keys, f"{said}{first_line(error)}")


def _has_key(cfg: DictConfig, key: str) -> bool:
    """Whether a config has the dotted key; a value still to be given, ???, counts as one only in keys()."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and leaf in list(node.keys())


def _unknown(name: str, base: DictConfig, override: Override) -> Fault:
    """A key that the config hasn't, with the nearest that it has."""
    key = override.key_or_group
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    known = [k for k, _ in flat(unresolved(base)) if not k.endswith("_target_")]
    if isinstance(node, DictConfig) and parent:
        siblings = [str(k) for k in node if k != "_target_"]
        group, _, path = key.partition(".")
        choices = [] if group in OWN_SCHEMAS.get(name, {}) else options(group)
        if homes := [f"{group}={option}" for option in choices if _in_option(group, option, path)]:
            return Fault((key,), f"{key}: not a key of the chosen {group}, but of {', '.join(homes)}.")
        near = did_you_mean(leaf, siblings).replace("mean ", f"mean {parent}.")
        return Fault((key,), f"{key}: no such key.{near} {parent} has: {', '.join(siblings) or 'no keys'}.")
    # Perhaps the right name in the wrong place, such as lr for optim.lr.
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    hint = f" Did you mean {same[0]}?" if same and not parent else did_you_mean(key, [*known, *groups()])
    has = f" The config has: {', '.join(map(str, base))}; each is explained by --help." if not hint else ""
    return Fault((key,), f"{key or override.input_line}: no such key.{hint}{has}")


def _in_option(group: str, option: str, path: str) -> bool:
    """Whether an option of a group has the dotted key."""
    cfg = OmegaConf.load(CONF / group / f"{option}.yaml")
    return isinstance(cfg, DictConfig) and _has_key(cfg, path)


def _plain(cfg: DictConfig) -> tuple[Config, list[Fault]]:
    """The resolved config, and the values that are missing or can't be resolved, which are left out of it."""
    faults = [
        Fault((key,), f"{key}: must be given, {key}=…", has_place=False) for key in sorted(OmegaConf.missing_keys(cfg))
    ]
    for fault in faults:
        OmegaConf.update(cfg, fault.keys[0], None)
    try:
        return resolved(cfg), faults
    except OmegaConfBaseException:
        pass
    for key, value in list(flat(unresolved(cfg))):
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            faults.append(Fault((key,), f"{key}={value}: {first_line(error)}"))
            OmegaConf.update(cfg, key, None)
    try:
        return resolved(cfg), faults
    except OmegaConfBaseException as error:
        return {}, [*faults, Fault((), first_line(error))]


def _without_echoes(cfg: DictConfig, faults: list[Fault]) -> list[Fault]:
    """The faults without those of values that only repeat another faulty one, as ${device.batch_size} does."""
    if len(faults) < 2:
        return faults
    written, told = dict(flat(unresolved(cfg))), {fault.keys for fault in faults}

    def repeats(fault: Fault) -> bool:
        other = re.fullmatch(r"\$\{([\w.]+)\}", str(written.get(fault.keys[0]))) if len(fault.keys) == 1 else None
        return other is not None and (other[1],) in told

    return [fault for fault in faults if not repeats(fault)]


def _within(key: str, told: set[str]) -> bool:
    """Whether a key or a node that holds it is among those that were told."""
    parts = key.split(".")
    return any(".".join(parts[: count + 1]) in told for count in range(len(parts)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return re.sub(r"\s+", " ", str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)

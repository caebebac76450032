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
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ghostnet.config import Config, check, flat, resolved, unresolved
from ghostnet.door.groups import CONF, OPTIONAL, groups, lacks_header, options, unreadable
from ghostnet.door.origins import Origins, Source
from ghostnet.door.words import first_line, group_fault, has_key, is_choice, parsed, unknown_key
from ghostnet.schema import Fault, did_you_mean

ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError)
"""What composing raises for faults of a user; the last three for files that can't be read, or hold no keys, and for
numbers in the place of options."""
Look = Callable[[Config, DictConfig], list[Fault]]
"""What is wrong with a job beside its config, from that and Hydra's own: files that are not there."""


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

    def __init__(self, name: str, look: Look = lambda *_: []) -> None:
        """look: finds what is wrong beside the config; it is asked of each job whose config could be composed."""
        self.name, self.look = name, look
        self.composed = functools.cache(self._composed)
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
            checks = check(self.name, config) + self.look(config, base.hydra) if config else []
            checks = [fault for fault in checks if not any(_within(key, told) for key in fault.keys)]
            # What is not given might be, by the choice that is wrong.
            more += [fault for fault in checks if fault.has_place or not base.faults]
            faults += _without_echoes(cfg, more)
        if faults:
            choices = {o.key_or_group for o in overrides if is_choice(o)}
            origins = Origins(self.sources(tuple(base.choices)), choices, {o.key_or_group for o in overrides} - choices)
            faults = [replace(f, text=f.text + origins.told(f.keys)) if f.has_place else f for f in faults]
        return Job(config, faults)

    def hydra(self, words: Sequence[str]) -> DictConfig:
        """Hydra's own config for the words of a faulty job, without what is wrong."""
        base = self.base(tuple(word for word in words if is_choice(parsed(word))))
        more = [word for word in words if parsed(word).key_or_group.startswith("hydra.")]
        try:
            return DictConfig(self.composed((*base.choices, *more)).hydra)
        except ERRORS:
            return base.hydra

    def _composed(self, words: tuple[str, ...]) -> DictConfig:
        """What Hydra composes, its own config with it; not to be changed."""
        return compose(self.name, overrides=list(words), return_hydra_config=True)

    def _base(self, choices: tuple[str, ...]) -> _Base:
        """Compose the choices; where that fails, one after the other, to tell which are wrong."""
        faults = {word: fault for word in choices if (fault := group_fault(self.name, parsed(word)))}
        good = [word for word in choices if word not in faults]
        try:
            cfg = self.composed(tuple(good))
        except ERRORS:
            cfg, tried, good = None, good, []
            for word in (None, *tried):
                try:
                    cfg = self.composed((*good, word) if word else ())
                    good += [word] if word else []
                except ERRORS as error:
                    faults[word or ""] = _composing_fault(word, error)
                    if word is None:
                        return _Base(None, OmegaConf.create(), list(faults.values()), [])
        assert cfg is not None
        cfg = copy.deepcopy(cfg)
        hydra = cfg.hydra
        if set(OPTIONAL) & set(cfg):  # what their files set has landed there
            sources = [source for source in self.sources(tuple(good)) if source.package.partition(".")[0] in OPTIONAL]
            headless = [Fault((), lacks_header(source.path)) for source in sources]
            return _Base(None, hydra, [*faults.values(), *headless], good)
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
        there = has_key(root, key)
        if not there and not (hydra and override.is_add()):
            return unknown_key(self.name, root, override)
        if there and override.is_add() and not override.is_force_add():
            return Fault((key,), f"{word}: {key} is there already. Leave the + out.")
        if not hydra and not has_key(cfg, key):
            whole = key.rpartition(".")[0]
            return Fault((key,), f"{word}: the command sets or removes all of {whole} before. Give one of the two.")
        target = cfg
        if hydra:
            target = OmegaConf.create({"hydra": copy.deepcopy(base.hydra)})
            OmegaConf.set_struct(target, True)
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], target)
        except ERRORS as error:
            return Fault((key,), f"{word}: {first_line(error.__cause__ or error)}")
        return None


def _composing_fault(word: str | None, error: Exception) -> Fault:
    """Why composing failed with one more choice, or with none."""
    keys = (parsed(word).key_or_group,) if word else ()
    said = f"{word}: " if word else ""
    file = CONF / (f"{parsed(word).key_or_group}/{parsed(word).value()}.yaml" if word else "local/default.yaml")
    if fault := unreadable(error, file):
        return Fault((), fault)
    if isinstance(error, MissingConfigException) and (missing := error.missing_cfg_file):
        group, _, option = str(missing).partition("/")
        known = options(group) if group in groups() else []
        if known:
            chosen = parsed(word) if word else None
            by = f"{chosen.key_or_group}/{chosen.value()}" if chosen else "local/default"
            source = Source(CONF / f"{by}.yaml", "")
            place = Origins([source] if source.path.is_file() else [], (), ()).told((group,))
            there = f"{did_you_mean(option, known)} There are: {', '.join(known)}.{place}"
            return Fault((group,), f"{group}={option}: no such option.{there}", has_place=False)
    return Fault(keys, f"{said}{first_line(error)}")


def _plain(cfg: DictConfig) -> tuple[Config, list[Fault]]:
    """The resolved config, and the values that are missing or can't be resolved, which are left out of it."""
    missing = [key for key, value in flat(unresolved(cfg)) if value == "???"]
    faults = [Fault((key,), f"{key}: must be given, {key}=…", has_place=False) for key in missing]
    for fault in faults:
        OmegaConf.update(cfg, fault.keys[0], None)
    try:
        return resolved(cfg), faults
    except OmegaConfBaseException:
        plain = unresolved(cfg)
    for key, value in list(flat(plain)):
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            faults.append(Fault((key,), f"{key}={value}: {first_line(error)}."))
            *path, leaf = key.split(".")
            functools.reduce(lambda node, name: node[name], path, plain)[leaf] = None
    try:
        return resolved(OmegaConf.create(plain)), _without_echoes(cfg, faults)
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

"""One word of a command: what it chooses or sets, and what is wrong with it by itself."""

import functools
import re
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import OWN_SCHEMAS, flat, unresolved
from ghostnet.door.groups import CONF, OPTIONAL, groups, options, readable
from ghostnet.schema import Fault, did_you_mean


@functools.cache
def parsed(word: str) -> Override:
    """One override; HydraException where it is none."""
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([word])[0]


def is_choice(override: Override) -> bool:
    """Whether an override chooses an option of a group, or where to look for them."""
    key = override.key_or_group
    return key in groups() or key.startswith("hydra/") or key == "hydra.searchpath"


def group_fault(name: str, override: Override) -> Fault | None:
    """What is wrong with a choice."""
    group, value = override.key_or_group, override.value()
    if group == "hydra.searchpath":
        text = "hydra.searchpath: this program reads its own conf/ alone. Put the files there, in conf/experiment/ …"
        return Fault((group,), text)
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


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether a config has the dotted key; a value still to be given, ???, counts as one only in keys()."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and leaf in list(node.keys())


def unknown_key(name: str, base: DictConfig, override: Override) -> Fault:
    """A key that the config hasn't, with the nearest that it has."""
    key = override.key_or_group
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    if isinstance(node, DictConfig) and parent:
        siblings = [str(k) for k in node if k != "_target_"]
        group, _, path = key.partition(".")
        choices = [] if group in OWN_SCHEMAS.get(name, {}) else options(group)
        homes = [f"{group}={option}" for option in choices if path in readable(CONF / group / f"{option}.yaml")]
        if homes:
            return Fault((key,), f"{key}: not a key of the chosen {group}, but of {', '.join(homes)}.")
        near = did_you_mean(leaf, siblings).replace("mean ", f"mean {parent}.")
        return Fault((key,), f"{key}: no such key.{near} {parent} has: {', '.join(siblings) or 'no keys'}.")
    known = [k for k, _ in flat(unresolved(base)) if not k.endswith("_target_")]
    # Perhaps the right name in the wrong place, such as lr for optim.lr.
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    hint = f" Did you mean {same[0]}?" if same and not parent else did_you_mean(key, [*known, *groups()])
    has = f" The config has: {', '.join(map(str, base))}; each is explained by --help." if not hint else ""
    return Fault((key,), f"{key or override.input_line}: no such key.{hint}{has}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return re.sub(r"\s+", " ", str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


def quoted(text: str | Path) -> str:
    """A text as hydra's grammar reads any text: as it is, or in quotes where it has special characters."""
    if re.fullmatch(r"[\w./-]+", str(text), re.ASCII):
        return str(text)
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

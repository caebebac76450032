"""Whether what a job names is there: files, data, and what this machine must have for it."""

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig

from ghostnet.config import Config, flat
from ghostnet.door.conflicts import lacks
from ghostnet.door.groups import targets
from ghostnet.errors import ConfigError, UserError
from ghostnet.experiments.folders import baseline
from ghostnet.schema import Fault
from ghostnet.wandb.artifact import SCHEME, located

HERE = ("hydra._internal.core_plugins.basic_launcher.", "hydra_plugins.hydra_joblib_launcher.")
"""The launchers whose jobs run on this machine."""


@dataclass(frozen=True)
class Presence:
    """What is wrong with a job beside its config: what it names is not there, or this machine hasn't it."""

    trains: bool

    def __call__(self, cfg: Config, hydra: DictConfig) -> list[Fault]:
        """Asked before torch is loaded. Values of a wrong type are told elsewhere."""
        values = dict(flat(cfg))
        kinds = {"model.weights": "", "resume": " or a run folder"} if self.trains else {"ckpt": " or a run folder"}
        found = []
        for key, more in kinds.items():
            path = values.get(key)
            if path and isinstance(path, str) and path.startswith(SCHEME):
                try:
                    located(path)
                except UserError as error:
                    found.append(Fault((key,), f"{key}={error}"))
            elif path and isinstance(path, str) and path != "auto" and not Path(path).expanduser().exists():
                text = f"{key}={path}: {path} does not exist. Give a checkpoint file{more}."
                found.append(Fault((key,), text))
        if isinstance(path := values.get("data.classes"), str) and not Path(path).expanduser().is_file():
            text = f"data.classes={path}: {path} is no file. Give one with the names of all classes, one a line."
            found.append(Fault(("data.classes",), text))
        target = values.get("data.dataset._target_")
        allowed = target in targets("data.dataset._target_")  # else its module is not even imported
        if self.trains and allowed and (text := _no_data(target, values.get("data.dataset.root"))):
            found.append(Fault(("data.root",), text, has_place=values["data.dataset.root"] is not None))
        if self.trains and isinstance(path := values.get("baseline"), str):
            try:
                baseline(path)
            except ConfigError as error:
                found.append(Fault(("baseline",), str(error)))
        # A cluster's or another machine's cards are not these.
        here = str(hydra.launcher.get("_target_")).startswith(HERE)
        if here and self.trains and values.get("logger.wandb._target_"):
            found += _no_wandb(values.get("logger.wandb.project"), values.get("logger.wandb.mode"))
        return found + (lacks(values) if here else [])


def _no_wandb(project: Any, mode: Any) -> list[Fault]:  # noqa: ANN401 (values of any config)
    """Return why Weights & Biases would refuse to record, as far as that can be told without it."""
    from ghostnet.wandb import logger  # only here: rich takes a while

    try:
        own = project if isinstance(project, str) else os.environ.get("WANDB_PROJECT")
        logger.check(own, logger.in_force(mode))
    except ConfigError as error:
        return [Fault(("logger.wandb.project",), str(error), has_place=str(error).startswith("logger.wandb.project"))]
    return []


@functools.cache
def _no_data(target: Any, root: Any) -> str:  # noqa: ANN401 (values of any config)
    """Why a data set can't be found, '' where it can, or where that can't be told yet."""
    with contextlib.suppress(ImportError, ValueError, TypeError):  # the config's faults name such a target
        find = getattr(get_object(target), "find", None)
        if find and isinstance(root, str | None):
            try:
                for split in ("train", "val"):
                    find(split, root)
            except UserError as error:
                return str(error)
    return ""

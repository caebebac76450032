"""Sweeps: their jobs, each named by what differs; what is done already is not done again; trials of a search."""

import contextlib
import importlib.util
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ghostnet.door.groups import CONF
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError
from ghostnet.experiments import record, workers
from ghostnet.experiments.grid import OPTUNA, SweepJob, grid, words_of
from ghostnet.schema import Fault, NonNegativeInt, PositiveInt, fields, signature
from ghostnet.schema import faults as schema_faults

JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass
class Joblib:
    """The keys of joblib's launcher that have a type here."""

    n_jobs: PositiveInt | None
    verbose: NonNegativeInt


def register() -> None:
    """Have Hydra sweep with the classes below, and launch as conf/hydra says instead of the plugins' own configs."""
    Plugins.instance().class_name_to_class |= {BASIC: Grid, OPTUNA: Search}
    stored = ConfigStore.instance().repo.get("hydra", {})
    for file in CONF.glob("hydra/*/*.yaml"):
        stored.get(file.parent.name, {}).pop(file.name, None)


def plugin_faults(hydra: DictConfig) -> list[str]:
    """Which launcher or sweeper that a command names is not installed, and how it is."""
    faults = _values(hydra)
    for key in ("launcher", "sweeper"):
        target = str((hydra.get(key) or {}).get("_target_", BASIC))
        module = "optuna" if target == OPTUNA else ".".join(target.split(".")[:2])
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            file = "requirements-ray.txt" if "ray" in module else "requirements-sweeps.txt"
            faults.append(f"hydra/{key}: {module} is not installed: pip install -r {file}")
    return faults


def _values(hydra: DictConfig) -> list[str]:
    """What is wrong with the values of our sweepers, and of joblib's launcher; others check their own."""
    known = {
        BASIC: ("sweeper", signature("ghostnet.experiments.sweeps.Grid")),
        OPTUNA: ("sweeper", signature("ghostnet.experiments.sweeps.Search")),
        JOBLIB: ("launcher", fields(Joblib)),
    }
    found: list[Fault] = []
    for key in ("sweeper", "launcher"):
        node = OmegaConf.to_container(hydra[key]) if hydra.get(key) else {}
        assert isinstance(node, dict)
        where, parameters = known.get(str(node.get("_target_")), ("", {}))
        if where == key:
            # Interpolations such as ${seed} are the config's.
            given = {str(k): v for k, v in node.items() if k in parameters and "${" not in str(v)}
            there = {name: parameter for name, parameter in parameters.items() if name in given}
            found += schema_faults(given, there, f"hydra.{key}.")
    return [fault.text for fault in found]


class _Sweep(Sweeper):
    """What both ways to sweep share."""

    launcher: Launcher
    config: DictConfig
    hydra_context: HydraContext
    params: dict[str, Any]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.config.hydra.sweep.dir)

    def parsed(self, arguments: list[str]) -> list[Override]:
        """The words of hydra.sweeper.params and of the command."""
        parser = OverridesParser.create(self.hydra_context.config_loader)
        return list(parser.parse_overrides([*words_of(self.params), *arguments]))

    def launch(self, jobs: Sequence[SweepJob]) -> None:
        """Run jobs, each in its folder, by the launcher that the command names, and come back when they ended."""
        words = [[*job.words, f"hydra.sweep.subdir={quoted(job.name)}"] for job in jobs]
        choice = self.config.hydra.runtime.choices["hydra/launcher"]
        if choice != "basic":
            print(f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} in {self.folder}", flush=True)
        with workers.passed_on() if workers.is_joblib(self.config.hydra) else contextlib.nullcontext():
            try:
                returned = self.launcher.launch(words, initial_job_idx=0)
            except (OSError, RuntimeError) as error:  # no cluster, no Slurm, a worker that was killed
                raise ConfigError(f"hydra/launcher={choice}: {' '.join(str(error).split())}") from None
            except (SystemExit, KeyboardInterrupt):
                if choice not in ("basic", "joblib"):
                    print(f"What was handed to {choice} may go on without this command.", file=sys.stderr, flush=True)
                raise
        for job in returned:
            _ = job.return_value  # raises what no job catches

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra, which would print a traceback of whatever is raised."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        try:
            with record.locked(self.folder):
                self.run(self.parsed(arguments))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    @abstractmethod
    def run(self, parsed: list[Override]) -> None:
        """Run what is not done."""


class Grid(_Sweep):
    """Hydra's basic sweeper with folders that are named by what differs; jobs that are done are not done again."""

    def __init__(self, max_batch_size: PositiveInt | None = None, params: dict[str, str] | None = None) -> None:
        """max_batch_size: jobs that are handed to the launcher at a time; null: all."""
        self.max_batch_size, self.params = max_batch_size, dict(params or {})

    def run(self, parsed: list[Override]) -> None:
        """Run what is not done of all jobs."""
        jobs = grid(parsed)
        todo = [job for job in jobs if not record.is_done(self.folder / job.name)]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} jobs are done already.", flush=True)
        size = self.max_batch_size or max(1, len(todo))
        for start in range(0, len(todo), size):
            self.launch(todo[start : start + size])


class Search(_Sweep):
    """hydra/sweeper=optuna: n_trials trials in all, over restarts; their state lies in the sweep's folder."""

    def __init__(
        self,
        n_trials: PositiveInt,
        n_jobs: PositiveInt,
        startup_trials: NonNegativeInt,
        prune: bool,
        seed: int,
        storage: str | None,
        params: dict[str, str] | None = None,
    ) -> None:
        self.n_trials, self.n_jobs, self.startup_trials = n_trials, n_jobs, startup_trials
        self.prune, self.seed, self.storage, self.params = prune, seed, storage, dict(params or {})

    def run(self, parsed: list[Override]) -> None:
        """Go on with the study until it has its trials."""
        from ghostnet.experiments.search import search

        search(self, parsed)

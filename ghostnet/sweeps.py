"""Sweeps: their jobs, each named by what differs; what is done already is not done again; trials of a search."""

import contextlib
import hashlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
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

from ghostnet import record, workers
from ghostnet.errors import ConfigError

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
OPTUNA = "hydra_plugins.ghostnet.Optuna"
"""What conf/hydra/sweeper/optuna.yaml calls the search: Hydra takes sweepers of such names alone."""
CONF = Path(__file__).parent.parent / "conf"
NAME_LENGTH = 120
"""Characters of a job's folder name; file systems allow 255 bytes."""


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep."""

    name: str
    """Its folder in the sweep's: what differs between the jobs."""
    words: list[str]
    """Its overrides."""


def register() -> None:
    """Have Hydra sweep with the classes below, and launch as conf/hydra says instead of the plugins' own configs."""
    Plugins.instance().class_name_to_class |= {BASIC: Grid, OPTUNA: Search}
    stored = ConfigStore.instance().repo.get("hydra", {})
    for file in CONF.glob("hydra/*/*.yaml"):
        stored.get(file.parent.name, {}).pop(file.name, None)


def grid(parsed: Iterable[Override]) -> list[SweepJob]:
    """Every combination of the values that are swept, in order; a key that is given twice has its last values."""
    values: dict[str, list[str]] = {}
    swept: set[str] = set()
    for override in parsed:
        key = override.get_key_element()
        if override.is_interval_sweep():
            raise ConfigError(
                f"{override.input_line}: an interval is searched, not swept. Give hydra/sweeper=optuna too."
            )
        several = override.is_sweep_override()
        values[key] = (
            [str(value) for value in override.sweep_string_iterator()]
            if several
            else [override.get_value_element_as_str()]
        )
        (swept.add if several else swept.discard)(key)
    jobs = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    return [
        SweepJob(job_name({k: v for k, v in job.items() if k in swept}), [f"{k}={v}" for k, v in job.items()])
        for job in jobs
    ]


def job_name(differs: dict[str, str]) -> str:
    """A folder name that tells what differs; where it can't be told in full, a hash keeps it apart from others."""
    text = ",".join(f"{key.lstrip('+')}={value}" for key, value in differs.items())
    name = re.sub(r"[^\w.,=+\[\]-]", "_", text, flags=re.ASCII)[:NAME_LENGTH]
    return (name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}") or "job"


def check_plugins(hydra: DictConfig) -> None:
    """ConfigError where the launcher or the sweeper that a command names is not installed."""
    modules = {"hydra/launcher": hydra.launcher._target_, "hydra/sweeper": hydra.sweeper._target_}
    for key, target in modules.items():
        module = "optuna" if target == OPTUNA else ".".join(target.split(".")[:2])
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            raise ConfigError(
                f"{key}={hydra.runtime.choices[key]}: {module} is not installed: pip install -r requirements-sweeps.txt"
            )


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
        from ghostnet.overrides import quoted

        words = [[*job.words, f"hydra.sweep.subdir={quoted(job.name)}"] for job in jobs]
        if self.launcher.__class__.__name__ != "BasicLauncher":
            print(f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} in {self.folder}", flush=True)
        with workers.passed_on() if workers.is_joblib(self.config.hydra) else contextlib.nullcontext():
            try:
                returned = self.launcher.launch(words, initial_job_idx=0)
            except (OSError, RuntimeError) as error:  # no cluster, no Slurm
                choice = self.config.hydra.runtime.choices["hydra/launcher"]
                raise ConfigError(f"hydra/launcher={choice}: {' '.join(str(error).split())}") from None
        for job in returned:
            _ = job.return_value  # raises what no job catches

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra, which would print a traceback of whatever is raised."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        try:
            self.run(self.parsed(arguments))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    def run(self, parsed: list[Override]) -> None:
        """Run what is not done."""
        raise NotImplementedError


def words_of(params: DictConfig | dict[str, Any] | None) -> list[str]:
    """The words of hydra.sweeper.params."""
    return [f"{key!s}={value}" for key, value in (params or {}).items()]


class Grid(_Sweep):
    """Hydra's basic sweeper with folders that are named by what differs; jobs that are done are not done again."""

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        """max_batch_size: jobs that are handed to the launcher at a time; null: all."""
        self.max_batch_size, self.params = max_batch_size, dict(params or {})

    def run(self, parsed: list[Override]) -> None:
        """Run what is not done of all jobs."""
        jobs = grid(parsed)
        todo = [job for job in jobs if not is_done(self.folder / job.name)]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} jobs are done already.", flush=True)
        size = self.max_batch_size or max(1, len(todo))
        for start in range(0, len(todo), size):
            self.launch(todo[start : start + size])


def is_done(folder: Path) -> bool:
    """Whether a job came to its end, by itself or by being pruned."""
    return record.result(folder).get("status") in ("completed", "pruned")


def jobs_at_the_door(parsed: Sequence[Override], hydra: DictConfig | None) -> list[SweepJob]:
    """The jobs of a sweep as far as they are known before it; of a search, those at the corners of its space."""
    if hydra is None or hydra.sweeper._target_ != OPTUNA:
        return grid(parsed)
    fixed, spaces = space_of(parsed)
    if not spaces:
        raise ConfigError(
            "hydra/sweeper=optuna: nothing to search. Give a space, such as "
            "'optim.lr=tag(log, interval(0.1, 1.6))', or an experiment with one: experiment=search_optuna."
        )
    ends = {key: list(_ends(override)) for key, override in spaces.items()}
    first = {key: f"{key}={values[0]}" for key, values in ends.items()}
    same = [f"{key}={value}" for key, value in fixed.items()]
    others = [first | {key: f"{key}={value}"} for key, values in ends.items() for value in values]
    corners = dict.fromkeys((*same, *corner.values()) for corner in others)
    return [SweepJob("", list(words)) for words in corners]


def space_of(parsed: Sequence[Override]) -> tuple[dict[str, str], dict[str, Override]]:
    """The keys of a search with one value, and those that are searched; the last counts of a key given twice."""
    last = {override.get_key_element(): override for override in parsed}
    fixed = {key: o.get_value_element_as_str() for key, o in last.items() if not o.is_sweep_override()}
    return fixed, {key: override for key, override in last.items() if key not in fixed}


def _ends(override: Override) -> Iterator[Any]:
    value: Any = override.value()
    if override.is_interval_sweep():
        yield from (value.start, value.end)
    else:
        yield from map(str, override.sweep_string_iterator())


class Search(_Sweep):
    """hydra/sweeper=optuna: n_trials trials in all, over restarts; their state lies in the sweep's folder."""

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        startup_trials: int,
        prune: bool,
        seed: int,
        storage: str | None,
        params: dict[str, str] | None = None,
    ) -> None:
        self.n_trials, self.n_jobs, self.startup_trials = n_trials, n_jobs, startup_trials
        self.prune, self.seed, self.storage, self.params = prune, seed, storage, dict(params or {})

    def run(self, parsed: list[Override]) -> None:
        """Go on with the study until it has its trials."""
        from ghostnet.search import search

        search(self, parsed)

"""Searches by Optuna: a study in a journal file, trials that go on after a kill, hopeless ones cut short."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import optuna
from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from ghostnet.errors import ConfigError, UserError
from ghostnet.experiments import record
from ghostnet.experiments.grid import SweepJob, job_name, space_of

PATIENCE = 60.0
"""Seconds for the journal, which others hold for the time of a line."""
STUDY = "ghostnet"
JOURNAL = "optuna.journal"
TRIAL = "trial.json"
AGAIN = "again"
"""The attribute of a trial that stands for a failed one, which was tried again."""
STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


class Sweep(Protocol):
    """What a search is told, and what runs its jobs: see conf/hydra/sweeper/optuna.yaml."""

    n_trials: int
    n_jobs: int
    startup_trials: int
    prune: bool
    seed: int
    storage: str | None

    @property
    def folder(self) -> Path:
        """The sweep's folder."""

    def launch(self, jobs: Sequence[SweepJob]) -> None:
        """Run jobs and come back when they ended."""


def search(sweep: Sweep, parsed: Sequence[Override]) -> None:
    """Run batches of n_jobs trials until the study has n_trials, earlier ones counted; failed ones are tried again."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fixed, searched = space_of(parsed)
    space = {key: distribution(override) for key, override in searched.items()}
    study = open_study(where(sweep), sweep.startup_trials, create=True)
    told = {key: repr(value) for key, value in space.items()}
    if study.user_attrs.setdefault("space", told) != told:
        raise ConfigError(f"{sweep.folder} holds a search of another space. Give this one another sweep=NAME.")
    study.set_user_attr("space", told)
    again(sweep, study, fixed)
    while batch := next_batch(sweep, study, space):
        jobs = [job_of(sweep, trial, fixed) for trial in batch]
        run(sweep, jobs)
        for trial, job in zip(batch, jobs, strict=True):
            state = STATES.get(record.status(sweep.folder / job.name), TrialState.FAIL)
            top1 = record.result(sweep.folder / job.name)["top1"] if state == TrialState.COMPLETE else None
            study.tell(trial, top1, state=state)
        print_progress(study, sweep.n_trials)


def where(sweep: Sweep) -> str:
    """The study's storage, whatever folder a process that opens it is in."""
    return sweep.storage or str((sweep.folder / JOURNAL).absolute())


def next_batch(sweep: Sweep, study: optuna.Study, space: dict[str, BaseDistribution]) -> list[Trial]:
    """Trials of a command that was cut off, then new ones, up to n_jobs; none where the study has its n_trials."""
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.params.keys() != space.keys():
            study.tell(trial.number, state=TrialState.FAIL)  # killed while it was proposed
    whole = [trial for trial in trials if trial.params.keys() == space.keys()]
    begun = [Trial(study, trial._trial_id) for trial in whole if trial.state == TrialState.RUNNING]
    ended = sum(trial.state.is_finished() and not trial.user_attrs.get(AGAIN) for trial in whole)
    count = min(sweep.n_jobs, sweep.n_trials - ended)
    batch = begun[: max(1, count)]
    while len(batch) < count:
        # Each proposal is a function of the seed, its number and the trials before, whatever was restarted.
        number = ended + len(batch)
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=sweep.startup_trials, seed=1_000_003 * sweep.seed + number, constant_liar=True
        )
        batch.append(study.ask(space))
    return batch


def job_of(sweep: Sweep, trial: Trial | optuna.trial.FrozenTrial, fixed: dict[str, str]) -> SweepJob:
    """A trial's job, whose folder knows it for pruning."""
    short = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in trial.params.items()}
    name = job_name({"trial": str(trial.number)} | short)
    folder = sweep.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if sweep.prune:
        it = {"storage": where(sweep), "number": trial.number, "startup_trials": sweep.startup_trials}
        (folder / TRIAL).write_text(json.dumps(it) + "\n", encoding="utf-8")
    return SweepJob(name, [f"{key}={value}" for key, value in (fixed | trial.params).items()])


def run(sweep: Sweep, jobs: Sequence[SweepJob]) -> None:
    """Run the jobs that are not done; those that still run, of a command that was killed, are waited for."""
    for job in jobs:
        if record.is_locked(sweep.folder / job.name):
            print(f"{job.name} still runs, of an earlier command: waiting for its end", flush=True)
        while record.is_locked(sweep.folder / job.name):
            time.sleep(1)
    if todo := [job for job in jobs if not record.is_done(sweep.folder / job.name)]:
        sweep.launch(todo)


def again(sweep: Sweep, study: optuna.Study, fixed: dict[str, str]) -> None:
    """Try the failed trials once more; one that comes to its end is added to the study."""
    failed = [trial for trial in study.get_trials(states=(TrialState.FAIL,)) if not trial.user_attrs.get(AGAIN)]
    jobs = {trial.number: job_of(sweep, trial, fixed) for trial in failed if trial.params}
    run(sweep, list(jobs.values()))
    for trial in failed:
        folder = sweep.folder / jobs[trial.number].name if trial.params else sweep.folder
        if trial.params and record.is_done(folder):
            done = optuna.trial.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=record.result(folder)["top1"],
                user_attrs={AGAIN: trial.number},
            )
            study.add_trial(done)


def print_progress(study: optuna.Study, n_trials: int) -> None:
    """One line: how far, and the best so far."""
    trials = study.get_trials(deepcopy=False)
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    ended = sum(
        trial.state.is_finished() and bool(trial.params) and not trial.user_attrs.get(AGAIN) for trial in trials
    )
    best = ""
    if counts[TrialState.COMPLETE]:
        words = " ".join(f"{key}={value}" for key, value in study.best_trial.params.items())
        best = f"; best so far: Acc@1 {study.best_value:.3f} of trial {study.best_trial.number}, {words}"
    ends = f"{counts[TrialState.PRUNED]} pruned, {counts[TrialState.FAIL]} failed"
    print(f"\nsearch: {ended} of {n_trials} trials, {ends}{best}", flush=True)


def distribution(override: Override) -> BaseDistribution:
    """What a word of Hydra's grammar searches: a choice, a range, or an interval, with tag(log, …) by its logarithm."""
    value: Any = override.value()
    if override.is_choice_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    log = "log" in value.tags
    low, high, step = (
        (value.start, value.end, None) if override.is_interval_sweep() else (value.start, value.stop, value.step)
    )
    whole = all(isinstance(end, int) for end in (low, high)) and isinstance(step, int | None)
    try:
        if override.is_interval_sweep():
            return IntDistribution(low, high, log=log) if whole else FloatDistribution(low, high, log=log)
        # Hydra's range() ends before its stop.
        if whole and step:
            return IntDistribution(low, low + (high - 1 - low) // step * step, step=step)
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {error}") from None


def open_study(storage: str, startup_trials: int, create: bool = False) -> optuna.Study:
    """The study of a journal file or a URL that Optuna knows; create: where there is none yet."""
    lock: Any = _Lock(storage)
    where: Any = storage if "://" in storage else JournalStorage(JournalFileBackend(storage, lock))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=startup_trials, n_warmup_steps=1)
    if not create:
        return optuna.load_study(storage=where, study_name=STUDY, pruner=pruner)
    return optuna.create_study(
        storage=where, study_name=STUDY, direction="maximize", pruner=pruner, load_if_exists=True
    )


class _Lock:
    """A lock that ends with its process: Optuna's own outlive a process that is killed."""

    def __init__(self, path: str) -> None:
        self.path, self.file = f"{path}.lock", -1

    def acquire(self) -> bool:
        """Wait for it; UserError where another process holds it for longer than writing a line takes."""
        self.file, until = os.open(self.path, os.O_CREAT | os.O_RDWR), time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.01)
        raise UserError(f"{self.path}: held by another process for {PATIENCE:.0f} s. Is one of the search's stopped?")

    def release(self) -> None:
        """Let others have it."""
        os.close(self.file)


def hopeless(folder: Path, epoch: int, top1: float) -> bool:
    """Report a trial's Acc@1 of an epoch -> whether it lies below the median of the earlier trials at that epoch."""
    if not (folder / TRIAL).exists():
        return False
    where = json.loads((folder / TRIAL).read_text(encoding="utf-8"))
    study = open_study(where["storage"], where["startup_trials"])
    trial = study.get_trials(deepcopy=False)[where["number"]]
    if trial.state != TrialState.RUNNING:
        return False
    live = Trial(study, trial._trial_id)
    if epoch not in trial.intermediate_values:
        live.report(top1, epoch)
    return bool(live.should_prune())

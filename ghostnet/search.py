"""Searches by Optuna: a study in a journal file, trials that go on after a kill, hopeless ones cut short."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import optuna
from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from ghostnet import record
from ghostnet.errors import ConfigError
from ghostnet.grid import SweepJob, job_name, space_of

STUDY = "ghostnet"
JOURNAL = "optuna.journal"
TRIAL = "trial.json"


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
    """Run batches of n_jobs trials until the study has n_trials that came to an end, earlier ones counted."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fixed, searched = space_of(parsed)
    space = {key: distribution(override) for key, override in searched.items()}
    study = open_study(sweep.storage or str(sweep.folder / JOURNAL), sweep.startup_trials, create=True)
    told = {key: repr(value) for key, value in space.items()}
    if study.user_attrs.setdefault("space", told) != told:
        raise ConfigError(f"{sweep.folder} holds a search of another space. Give this one another sweep=NAME.")
    study.set_user_attr("space", told)
    failures = 0
    while True:
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        # Those of a command that was killed go on.
        batch = [Trial(study, frozen._trial_id) for frozen in study.get_trials(states=(TrialState.RUNNING,))]
        count = min(sweep.n_jobs, sweep.n_trials - len(ended) - failures)
        batch = batch[: max(1, count)]
        while len(batch) < count:
            # Each trial's proposal is a function of the seed, its number and the trials before, whatever was restarted.
            number = len(study.get_trials(deepcopy=False))
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=sweep.startup_trials, seed=1_000_003 * sweep.seed + number, constant_liar=True
            )
            batch.append(study.ask(space))
        if not batch:
            break
        jobs = []
        for trial in batch:
            short = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in trial.params.items()}
            job = SweepJob(
                job_name({"trial": str(trial.number)} | short),
                [f"{k}={v}" for k, v in (fixed | trial.params).items()],
            )
            folder = sweep.folder / job.name
            folder.mkdir(parents=True, exist_ok=True)
            if sweep.prune:
                where = {"storage": sweep.storage or str((sweep.folder / JOURNAL).absolute()), "number": trial.number}
                (folder / TRIAL).write_text(json.dumps(where | {"startup_trials": sweep.startup_trials}) + "\n")
            jobs.append(job)
        if todo := [
            job for job in jobs if record.result(sweep.folder / job.name).get("status") not in ("completed", "pruned")
        ]:
            sweep.launch(todo)
        for trial, job in zip(batch, jobs, strict=True):
            result = record.result(sweep.folder / job.name)
            states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
            state = states.get(result.get("status", ""), TrialState.FAIL)
            study.tell(trial, result["top1"] if state == TrialState.COMPLETE else None, state=state)
            failures += state == TrialState.FAIL
        print_progress(study, sweep.n_trials)


def print_progress(study: optuna.Study, n_trials: int) -> None:
    """One line: how far, and the best so far."""
    trials = study.get_trials(deepcopy=False)
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    ended = counts[TrialState.COMPLETE] + counts[TrialState.PRUNED]
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
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    where: Any = storage if "://" in storage else JournalStorage(JournalFileBackend(storage))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=startup_trials, n_warmup_steps=1)
    if create:
        return optuna.create_study(
            storage=where, study_name=STUDY, direction="maximize", pruner=pruner, load_if_exists=True
        )
    return optuna.load_study(storage=where, study_name=STUDY, pruner=pruner)


def hopeless(folder: Path, epoch: int, top1: float) -> bool:
    """Report a trial's Acc@1 of an epoch -> whether it lies below the median of the earlier trials at that epoch."""
    if not (folder / TRIAL).exists():
        return False
    where = json.loads((folder / TRIAL).read_text())
    study = open_study(where["storage"], where["startup_trials"])
    trial = study.get_trials(deepcopy=False)[where["number"]]
    if trial.state != TrialState.RUNNING:
        return False
    live = Trial(study, trial._trial_id)
    if epoch not in trial.intermediate_values:
        live.report(top1, epoch)
    return bool(live.should_prune())

"""One job in its process: its folder, its record, the ranks it runs on, what becomes of its errors."""

import contextlib
import logging
import logging.config
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ghostnet import output, secrets, watchdog
from ghostnet.config import Config, resolved, unresolved
from ghostnet.disk import writing
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError, SampleError, StorageError, UserError, explain
from ghostnet.experiments import record, workers
from ghostnet.experiments.folders import check_resume, leave_no_empty_run
from ghostnet.experiments.rerun import note as rerun_note
from ghostnet.experiments.rerun import own_words

if TYPE_CHECKING:
    from ghostnet.distributed import Ranks

log = logging.getLogger("ghostnet")

failed: list[Path] = []
"""The folders of the jobs that failed in this process."""
entered: list[bool] = []
"""Whether this is the process of the command; else it is one that a launcher made for its jobs."""

there: list["Ranks"] = []
"""What torchrun or srun made of this process: one of several ranks."""

Run = Callable[[Any, "Ranks"], dict[str, Any]]
"""What a program does with one job, on every rank; the main rank's result counts."""


@dataclass(frozen=True)
class Job:
    """What one run is told."""

    cfg: Config
    """Every value, resolved."""
    raw: Config
    """The same with its interpolations, as a checkpoint keeps it."""
    folder: Path
    """The run folder."""
    command: str
    """What the user typed."""
    logging: dict[str, Any]
    """Of the main rank, as logging.config.dictConfig takes it."""
    prefix: str = ""
    """Of what is printed, where other jobs print beside this one."""


def say(text: str) -> None:
    """One message to the user, beside the program's results."""
    print(secrets.without(text), file=sys.stderr, flush=True)


def command_line(words: list[str]) -> str:
    """The words as they would be typed again."""
    return shlex.join(["python", workers.typed()[0], *words])


def guard(cfg: DictConfig, run: Run) -> float | None:
    """Run a job; its faults end in one message. In a sweep they are noted and the next job goes on. -> Acc@1."""
    hydra = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    logs: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
    job = Job(resolved(cfg), unresolved(cfg), folder, command_line(workers.typed()[1:]), logs)
    if entered:
        if sweep:
            print(f"\njob {folder.name} -> {folder}", flush=True)
        return _guarded(job, run, sweep)
    if workers.stopped:
        return None
    output.show_any_text()
    with workers.job_signals(child=workers.is_joblib(hydra)):
        if workers.is_joblib(hydra):
            workers.take_share(folder.parent, job.cfg["device"], hydra.launcher.n_jobs)
        return _guarded(replace(job, prefix=f"[{folder.name}] "), run, sweep)


def _guarded(job: Job, run: Run, sweep: bool) -> float | None:
    from ghostnet.signals import Interrupted

    folder = job.folder
    try:
        with record.locked(folder):
            if sweep and record.is_done(folder):  # by another command meanwhile
                return float(record.result(folder)["top1"])
            return _recorded(job, run, sweep)
    except Interrupted as stop:
        kept = f"{folder / 'last.pt'} is saved" if (folder / "last.pt").exists() else "it had not begun to train"
        say(f"{job.prefix}{stop}: {kept}. To go on:\n  {going_on(folder)}")
        if entered:
            raise SystemExit(128 + stop.signum) from None
        workers.stopped.append(stop.signum)
        if stop.signum == signal.SIGUSR2:
            signal.raise_signal(stop.signum)  # submitit's: it puts the job back into the queue
        return None
    except (ConfigError, StorageError) as error:
        # Of the lock: what is in the folder is another's.
        say(f"error: {job.prefix}{error}")
        failed.append(folder)
        if not sweep:
            leave_no_empty_run(folder)
        return None


def _recorded(job: Job, run: Run, sweep: bool) -> float | None:
    """Run a job and leave in its folder what reproduces it, and of a job of a sweep what went wrong."""
    from ghostnet.signals import Interrupted

    folder = job.folder
    try:
        check_resume(folder, job.cfg)
        with writing(folder / "config.yaml"):
            OmegaConf.save(OmegaConf.create(job.cfg), folder / "config.yaml")
        record.write(folder, _provenance(job, sweep))
        if lack := record.code()[2]:
            say(f"note    {job.prefix}the commit of the code is not recorded: {lack}")
        if difference := rerun_note(job.cfg["rerun"]):
            say(f"note    {job.prefix}rerun: {difference}")
        return float(on_ranks(run, job, job.cfg["device"])["top1"])
    except Interrupted:
        raise
    except Exception as error:
        log.exception("failed")
        message = explain(error)
        if message is None and not sweep:
            raise
        say(f"error: {job.prefix}{message or f'{type(error).__name__}: {error}'}")
        if isinstance(error, SampleError | StorageError) and (folder / "last.pt").exists():
            saved = "What was trained so far" if isinstance(error, SampleError) else "The last checkpoint"
            say(f"{saved} is saved. To go on once that is mended:\n  {going_on(folder)}")
        failed.append(folder)
        if there:
            raise SystemExit(1) from None  # the other ranks have ended, or wait for a step that won't come
        if sweep:
            with contextlib.suppress(UserError):
                record.write_json(folder / "result.json", {"status": "failed", "error": message or repr(error)})
        else:
            leave_no_empty_run(folder)
        return None


def _provenance(job: Job, sweep: bool) -> dict[str, Any]:
    """What run.json tells of the command."""
    hydra = HydraConfig.get()
    words = own_words(list(hydra.overrides.task))
    flags = ["hydra.mode=RUN"] if sweep and "-m" not in workers.typed() and "--multirun" not in workers.typed() else []
    return {
        "command": job.command,
        "rerun": command_line([*words, *flags]),
        "overrides": words,
        "sweep": str(Path(hydra.sweep.dir).absolute()) if sweep else None,
        "name": job.folder.name if sweep else None,
        "seed": job.cfg["seed"],
        "started": time.time(),
    }


def on_ranks(run: Run, job: Any, device: Config) -> dict[str, Any]:  # noqa: ANN401 (for run)
    """Run a job on this process, on the ranks it is one of, or on as many as the device group wants -> its result.

    UserError where the cards are not all there, before anything is started.
    """
    from ghostnet import elastic
    from ghostnet.device import cards, check_cards, choose, set_environment
    from ghostnet.distributed import ALONE
    from ghostnet.signals import Interrupted

    kind, _ = choose(device["kind"])
    if not (there and there[0].starter == "srun" and cards(kind) == 1):
        check_cards(kind, device["count"], device["ids"])
    set_environment(kind)
    if there:
        return watched(run, there[0].share(job), there[0])
    if device["count"] == 1:
        return watched(run, job, ALONE)
    try:
        result, signum = elastic.launch(_in_rank, (run, job), device["count"])
    except elastic.RankStopped as stop:
        if stop.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        terminated(stop.signum, None)
    if isinstance(result, int):
        raise Interrupted(signum or result)
    return result


def _in_rank(what: tuple[Run, Any], ranks: "Ranks") -> dict[str, Any] | int:
    """One launched rank -> the result, or the signal that ended it."""
    from ghostnet.signals import Interrupted

    run, job = what
    if isinstance(job, Job):
        output.outlast("train.log has what it says.")
    else:
        output.end_with_reader()
    if ranks.is_main and isinstance(job, Job):
        logging.config.dictConfig(job.logging)
    try:
        return watched(run, job, ranks)
    except Interrupted as stop:
        return stop.signum


def watched(run: Run, job: Any, ranks: "Ranks") -> dict[str, Any]:  # noqa: ANN401 (for run)
    """Run a job on this rank, and end it where it or another hangs. Every rank calls it."""
    from ghostnet import elastic

    limit = (job.cfg if isinstance(job, Job) else job[0])["stall_timeout"]
    with watchdog.Watch(limit, elastic.report, ranks.rank, ranks.world_size, ranks.board()):
        return run(job, ranks)


def going_on(folder: Path) -> str:
    """The command that goes on with this run, or with the sweep that it is a job of."""
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    key, place = ("hydra.sweep.dir", hydra.sweep.dir) if sweep else ("hydra.run.dir", folder)
    words = workers.typed()[1:]
    if any(word.startswith("sweep=") for word in words):
        return command_line(words)
    again = [word for word in words if not word.startswith(("resume=", f"{key}="))]
    return command_line([*again, f"{key}={quoted(os.path.relpath(place))}", "resume=auto"])


def terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal outside the loop, which has a way of its own to end."""
    say(f"{signal.Signals(signum).name}: stopped outside of training, nothing was saved.")
    raise SystemExit(128 + signum)

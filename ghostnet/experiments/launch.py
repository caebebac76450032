"""From a command line to jobs: the door, the ranks that somebody started, the table of a sweep."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ghostnet import interrupts, output, starters
from ghostnet.config import flat
from ghostnet.door import manual
from ghostnet.door.composing import Look
from ghostnet.door.flags import arguments
from ghostnet.door.overrides import Checked, examine, refuse
from ghostnet.door.presence import Presence
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError, PeerFailed, UserError, explain
from ghostnet.experiments import record, workers
from ghostnet.experiments.folders import Place, claim, settle
from ghostnet.experiments.grid import OPTUNA, plain
from ghostnet.experiments.jobs import Run, command_line, entered, failed, say, terminated, there, watched
from ghostnet.experiments.rerun import expanded
from ghostnet.secrets import NAME, found_in

if TYPE_CHECKING:
    from ghostnet.distributed import Ranks


def enter(name: str, main: Callable[[], Any], run: Run, trains: bool) -> None:
    """Check the whole command, settle its folder, and run main(); exits with 1 where anything failed.

    name: the primary config. trains: whether its jobs leave run folders behind; others run one job, without a folder.
    Of ranks that torchrun or srun started, the main one does so; the others take their jobs from it.
    """
    interrupts.insist()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Hydra's own parser wants flags before the words, or after all of them.
    words = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    sys.argv[1:] = words
    args = arguments(name)
    if args.help:
        output.end_with_reader()
        try:
            print(manual.page(name, sys.modules["__main__"].__doc__ or "", args.overrides))
        except ConfigError as error:  # a file that is chosen can't be read
            say(f"error: {error}")
            sys.exit(1)
        return
    asks = args.hydra_help or args.shell_completion or args.info or args.cfg
    if trains and not asks:
        output.outlast("train.log has what it says.")
    else:
        output.end_with_reader()
    signal.signal(signal.SIGTERM, terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup wants it
        signal.signal(signal.SIGHUP, terminated)
    signal.signal(signal.SIGUSR1, terminated)  # how Slurm warns of a time limit, where it is asked to
    try:
        ranks = _join()
        if ranks is not None and not ranks.is_main:
            sys.exit(_serve(ranks, run))
    except KeyboardInterrupt:
        say("stopped at once, as asked.")
        sys.exit(130)
    entered.append(True)
    workers.tell_workers(Path(sys.argv[0]).name, words)
    folder, code = None, 0
    try:
        if not (args.hydra_help or args.shell_completion):
            overrides = [plain(word) for word in args.overrides]
            overrides = expanded(overrides, args.multirun) if trains else overrides
            sys.argv[1:] = [word for word in words if word not in args.overrides] + overrides
            look: Look = Presence(trains) if not asks else lambda *_: []
            checked = examine(name, overrides, args.multirun, look)
            place = pass_door(checked, ranks, words, trains and not asks)
            if place is not None:
                folder = claim(place)
                sys.argv.append(f"{place.key}={quoted(folder)}")
                if checked.multirun:
                    sys.argv += _of_sweep(checked)
            elif args.multirun and not trains:
                raise ConfigError(f"-m is for train.py: {name}.py takes one command at a time.")
        main()
    except UserError as error:
        say(f"error: {error}")
        code = 1
    except KeyboardInterrupt:
        say("stopped at once, as asked.")
        sys.exit(130)
    finally:
        if folder is not None and checked.multirun:
            print_table(folder)
            code = code or tell_unfinished(folder, checked)
    if ranks is not None and not failed:
        ranks.share(None)
        ranks.leave()
    if code or failed:
        sys.exit(1)


def tell_unfinished(folder: Path, checked: Checked) -> int:
    """Say which jobs of a sweep are not done, and how they are -> 1 if there are any."""
    named = [name for name in checked.names if name]
    names = named or [path.parent.name for path in folder.glob("*/config.yaml")]
    left = [name for name in names if not record.is_done(folder / name)]
    if not left:
        return 0
    words = workers.typed()[1:]
    if not checked.jobs[0]["sweep"]:
        others = [word for word in words if not word.startswith(("resume=", "hydra.sweep.dir="))]
        words = [*others, f"hydra.sweep.dir={quoted(folder)}", "resume=auto"]
    shown = ", ".join(f"{name} ({record.status(folder / name)})" for name in left[:5])
    say(
        f"{len(left)} of {len(names)} jobs are not done: {shown}{', …' if len(left) > 5 else ''}. To go on:\n"
        f"  {command_line(words)}"
    )
    return 1


def _of_sweep(checked: Checked) -> list[str]:
    """Words that a sweep is given besides: that it goes on, and how many jobs run at once."""
    added = ["resume=auto"] if checked.jobs[0]["sweep"] else []
    launcher = checked.hydra.launcher
    if workers.is_joblib(checked.hydra):
        n_jobs = min(workers.jobs_at_once(job["device"], launcher.n_jobs) for job in checked.jobs)
        added.append(f"hydra.launcher.n_jobs={n_jobs}")
        if checked.hydra.sweeper._target_ == OPTUNA and "hydra.sweeper.n_jobs" not in " ".join(sys.argv):
            added.append(f"hydra.sweeper.n_jobs={n_jobs}")
    return added


def _join() -> "Ranks | None":
    """Meet the other ranks, where somebody started this process as one of several."""
    try:
        starter, note = starters.started_by()
        if note and os.environ.get("RANK", "0") == "0":
            say(f"note: {note}")
        if not starter:
            return None
        from ghostnet import distributed

        there.append(distributed.join(starter, say))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(1)
    return there[0]


def _serve(ranks: "Ranks", run: Run) -> int:
    """Take part in the main rank's jobs, one after the other -> exit code."""
    from ghostnet.elastic import LATE
    from ghostnet.signals import Interrupted

    try:
        while (job := ranks.share(None)) is not None:
            watched(run, job, ranks)
        ranks.leave()
    except Interrupted as stop:
        return 128 + stop.signum
    except Exception as error:
        # Where all fail alike, the main rank says so, and whoever started the ranks ends this one meanwhile.
        time.sleep(LATE)
        if not isinstance(error, PeerFailed):
            say(f"error: rank {ranks.rank}: {explain(error) or f'{type(error).__name__}: {error}'}")
        return 1
    return 0


def pass_door(checked: Checked, ranks: "Ranks | None", words: list[str], settles: bool) -> Place | None:
    """One ConfigError with all that is wrong with a command -> where it leaves its files, if it settles at all."""
    faults, place = list(checked.faults), None
    try:
        _check_ranks(checked, ranks)
    except ConfigError as error:
        faults.append(str(error))
    if settles:
        faults += _secrets(checked, words)
        try:
            place = settle(checked, words)
        except ConfigError as error:
            faults += [str(error)] if not any(fault.startswith(str(error)) for fault in faults) else []
        except Exception:
            if not faults:  # else it had faulty values to read
                raise
    refuse(faults)
    return place


def _secrets(checked: Checked, words: list[str]) -> list[str]:
    """What a command would write of the environment's keys and tokens into the run folder, each with the way out."""
    texts = [*words, *(str(value) for job in checked.jobs for _, value in flat(job))]
    way_out = "Leave it in the environment: programs that need it read it there."
    faults = [f"{name}: the command holds this secret, and the run folder would. {way_out}" for name in found_in(texts)]
    given = OmegaConf.select(checked.hydra, "job.env_set", default={}) or {}
    faults += [f"hydra.job.env_set.{key}: the run folder would hold it. {way_out}" for key in given if NAME.search(key)]
    return faults


def _check_ranks(checked: Checked, ranks: "Ranks | None") -> None:
    """ConfigError where the ranks that were started are not those that the command asks for."""
    counts = {job["device"]["count"] for job in checked.jobs if job} - {ranks.local_size if ranks else 0}
    if ranks is not None and counts:
        raise ConfigError(
            f"device.count={counts.pop()}, but {ranks.starter} started {ranks.local_size} on this machine. "
            f"Give device.count={ranks.local_size}, or start as many as that."
        )


def print_table(folder: Path) -> None:
    """All jobs of a sweep folder, best first, with the settings in which they differ; then those over seeds as one."""
    from ghostnet.experiments import results

    runs = results.collect([folder])
    for grouped, title in ((False, "best first"), (True, "over seeds, with 95 % confidence")):
        rows = results.best_first(results.rows(runs, grouped))
        if rows and (len(rows) < len(runs) or not grouped):
            results.show(rows, results.columns(runs, grouped), list(results.HEADINGS), title)
    if runs:
        print(f"sweep folder: {folder}", flush=True)

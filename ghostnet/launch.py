"""From a command line to jobs: the door, ranks, what becomes of a job's errors, the table of a sweep."""

import contextlib
import logging
import logging.config
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Config, resolved, unresolved
from ghostnet.errors import ConfigError, PeerFailed, SampleError, UserError, explain
from ghostnet.folders import check_resume, claim, leave_no_empty_run, settle, write_json
from ghostnet.overrides import Checked, check_command, quoted

if TYPE_CHECKING:
    from ghostnet.distributed import Ranks

log = logging.getLogger("ghostnet")

typed: list[str] = sys.argv[1:]
"""The command line as the user typed it."""
failed: list[Path] = []
"""The folders of the jobs that failed in this process."""

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


def say(text: str) -> None:
    """One message to the user, beside the program's results."""
    print(text, file=sys.stderr, flush=True)


def command_line(words: list[str]) -> str:
    """The words as they would be typed again."""
    return shlex.join(["python", Path(sys.argv[0]).name, *words])


def enter(name: str, main: Callable[[], Any], run: Run, trains: bool) -> None:
    """Check the whole command, settle its folder, and run main(); exits with 1 where anything failed.

    name: the primary config. trains: whether its jobs leave run folders behind; others run one job, without a folder.
    Of ranks that torchrun or srun started, the main one does so; the others take their jobs from it.
    """
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGUSR1, _terminated)  # how Slurm warns of a time limit, where it is asked to
    ranks = _join()
    if ranks is not None and not ranks.is_main:
        sys.exit(_serve(ranks, run))
    args = get_args_parser().parse_args()
    asks = args.help or args.hydra_help or args.shell_completion or args.info or args.cfg
    folder, code = None, 0
    try:
        if not (args.help or args.hydra_help or args.shell_completion):
            checked = check_command(args.config_name or name, args.overrides, args.multirun)
            _check_ranks(checked, ranks)
            if not asks:
                for job in checked.jobs:
                    check_paths(job, trains)
            if trains and not asks:
                place = settle(checked, typed, args.multirun)
                folder = claim(place)
                sys.argv.append(f"{place.key}={quoted(folder)}")
            elif args.multirun:
                raise ConfigError(f"-m is for train.py: {name}.py takes one command at a time.")
        main()
    except ConfigError as error:
        say(f"error: {error}")
        code = 1
    except KeyboardInterrupt:
        say("stopped at once, as asked.")
        sys.exit(130)
    finally:
        if folder is not None and args.multirun:
            print_table(folder)
    if ranks is not None and not failed:
        ranks.share(None)
        ranks.leave()
    if code or failed:
        sys.exit(1)


there: list["Ranks"] = []
"""What torchrun or srun made of this process: one of several ranks."""


def _join() -> "Ranks | None":
    """Meet the other ranks, where torchrun or srun started this process as one of several."""
    if not {"RANK", "SLURM_STEP_NUM_TASKS"} & set(os.environ):
        return None
    from ghostnet import distributed

    if not (starter := distributed.started_by()):
        return None
    try:
        there.append(distributed.join(starter))
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
            run(job, ranks)
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


def _check_ranks(checked: Checked, ranks: "Ranks | None") -> None:
    """ConfigError where the ranks that were started are not those that the command asks for."""
    counts = {job["device"]["count"] for job in checked.jobs} - {ranks.local_size if ranks else 0}
    if ranks is not None and counts:
        raise ConfigError(
            f"device.count={counts.pop()}, but {ranks.starter} started {ranks.local_size} on this machine. "
            f"Give device.count={ranks.local_size}, or start as many as that."
        )


def check_paths(cfg: Config, trains: bool) -> None:
    """ConfigError where a file or folder that a job names is not there, before torch is loaded for it."""
    files = [cfg["model"]["weights"]] if trains else [cfg["ckpt"]]
    for path in filter(None, files):
        if not Path(path).expanduser().exists():
            raise ConfigError(f"{path} does not exist: give a checkpoint file{'' if trains else ' or a run folder'}.")
    node = cfg["data"]["dataset"]
    if trains and (find := getattr(get_object(node["_target_"]), "find", None)):
        try:
            for split in ("train", "val"):
                find(split, node["root"])
        except UserError as error:
            raise ConfigError(str(error)) from None


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
        return run(there[0].share(job), there[0])
    if device["count"] == 1:
        return run(job, ALONE)
    try:
        result, signum = elastic.launch(_in_rank, (run, job), device["count"])
    except elastic.RankStopped as stop:
        if stop.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        _terminated(stop.signum, None)
    if isinstance(result, int):
        raise Interrupted(signum or result)
    return result


def _in_rank(what: tuple[Run, Any], ranks: "Ranks") -> dict[str, Any] | int:
    """One launched rank -> the result, or the signal that ended it."""
    from ghostnet.signals import Interrupted

    run, job = what
    if ranks.is_main and isinstance(job, Job):
        logging.config.dictConfig(job.logging)
    try:
        return run(job, ranks)
    except Interrupted as stop:
        return stop.signum


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal outside the loop, which has a way of its own to end."""
    say(f"{signal.Signals(signum).name}: stopped outside of training, nothing was saved.")
    raise SystemExit(128 + signum)


def guard(cfg: DictConfig, run: Run) -> float | None:
    """Run a job; its faults end in one message. In a sweep they are noted and the next job goes on. -> Acc@1."""
    from ghostnet.signals import Interrupted

    hydra = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    logs: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
    job = Job(resolved(cfg), unresolved(cfg), folder, command_line(typed), logs)
    if sweep:
        print(f"\njob {hydra.job.num}: {' '.join(hydra.overrides.task)} -> {folder}", flush=True)
    try:
        check_resume(folder, job.cfg)
        OmegaConf.save(OmegaConf.create(job.cfg), folder / "config.yaml")
        return float(on_ranks(run, job, job.cfg["device"])["top1"])
    except Interrupted as stop:
        say(f"{stop}: {folder / 'last.pt'} is saved. To go on:\n  {going_on(folder)}")
        raise SystemExit(128 + stop.signum) from None
    except Exception as error:
        log.exception("failed")
        message = explain(error)
        if message is None and not sweep:
            raise
        say(f"error: {message or f'{type(error).__name__}: {error}'}")
        if isinstance(error, SampleError) and (folder / "last.pt").exists():
            say(f"What was trained so far is saved. To go on once that is mended:\n  {going_on(folder)}")
        failed.append(folder)
        if there:
            raise SystemExit(1) from None  # the other ranks have ended, or wait for a step that won't come
        if sweep:
            with contextlib.suppress(UserError):
                write_json(folder / "result.json", {"status": "failed", "error": message or repr(error)})
        else:
            leave_no_empty_run(folder)
        return None


def going_on(folder: Path) -> str:
    """The command that goes on with this run, or with the sweep that it is a job of."""
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    key, place = ("hydra.sweep.dir", hydra.sweep.dir) if sweep else ("hydra.run.dir", folder)
    again = [word for word in typed if not word.startswith(("resume=", f"{key}="))]
    return command_line([*again, f"{key}={quoted(os.path.relpath(place))}", "resume=auto"])


def print_table(folder: Path) -> None:
    """All jobs of a sweep folder, best first, with the settings in which they differ; then those over seeds as one."""
    from ghostnet import results

    runs = results.collect([folder])
    for grouped, title in ((False, "best first"), (True, "over seeds, with 95 % confidence")):
        rows = results.best_first(results.rows(runs, grouped))
        if rows and (len(rows) < len(runs) or not grouped):
            results.show(rows, results.columns(runs, grouped), list(results.HEADINGS), title)
    if runs:
        print(f"sweep folder: {folder}", flush=True)

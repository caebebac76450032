"""Jobs of a sweep in processes of their own (joblib, submitit, Ray): their signals, life, and share of the machine."""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ghostnet.errors import ConfigError

COMMAND, LAUNCHER = "GHOSTNET_COMMAND", "GHOSTNET_LAUNCHER"
"""Of the environment: what the user typed, and the process that started this one."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

stopped: list[int] = []
"""The signals that asked this process to end: it takes no further jobs."""
slot: list[int] = []
"""Which of the jobs that run at once this process is, for its life."""


def tell_workers(program: str, words: list[str]) -> None:
    """Have processes that this one starts know the command."""
    os.environ[COMMAND] = json.dumps([program, *words])
    os.environ[LAUNCHER] = str(os.getpid())
    # They import this project from wherever the command was given.
    root = str(Path(__file__).parent.parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, *paths]))


def typed() -> list[str]:
    """The program and the words that the user typed, whichever process this is; not known on other machines of Ray."""
    return [str(word) for word in json.loads(os.environ.get(COMMAND, '["train.py"]'))]


def is_joblib(hydra: Any) -> bool:  # noqa: ANN401 (Hydra's config, typed or not)
    """Whether a command's jobs run several at a time on this machine, by this launcher."""
    return str(hydra.launcher._target_).endswith(".JoblibLauncher")


def stops() -> list[signal.Signals]:
    """The signals that ask a process to end; not SIGHUP where it is ignored, as by nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signum for signum in STOPS if signum != signal.SIGHUP or not ignored]


@contextlib.contextmanager
def job_signals(child: bool) -> Iterator[None]:
    """In a worker: a signal ends the job, by Interrupted where none is trained yet, and keeps further ones away.

    child: of the launcher's process, with which it is to end.
    """
    from ghostnet.signals import Interrupted

    def ask(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)
        raise Interrupted(signum)

    launcher = int(os.environ.get(LAUNCHER, "0"))
    if child and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # the kernel asks too, where the launcher is killed
    for signum in stops():
        signal.signal(signum, ask)
    try:
        if child and os.getppid() != launcher:
            os._exit(1)
        yield
    finally:
        for signum in stops():
            signal.signal(signum, lambda signum, frame: stopped.append(signum))
        if child and os.getppid() != launcher:
            os._exit(1)  # nobody is left to hand out jobs


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """In the launcher's process: signals go to its workers, which save; then SystemExit. A second Ctrl-C: at once."""
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)
        if not (started := children()):
            raise SystemExit(128 + signum)
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    previous = {signum: signal.signal(signum, ask) for signum in stops()}
    try:
        yield
    except Exception:
        if not asked:
            raise  # else of a worker that was ended before it could take a job
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if asked:
        raise SystemExit(128 + asked[0])


def children() -> list[int]:
    """The processes that this one started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text(encoding="utf-8").split()]
    return found


def jobs_at_once(device: dict[str, Any], asked: int | None) -> int:
    """n_jobs of joblib: what is asked for, else as many as there are cards for, on CPUs one for two of them.

    ConfigError where there are not so many cards.
    """
    from ghostnet.device import cards, choose, cpu_count

    kind, _ = choose(device["kind"])
    if kind == "cpu":
        return asked or max(1, cpu_count() // 2)
    there = len(device["ids"]) if device["ids"] else cards(kind)
    most = there // device["count"]
    if (asked or 1) > most:
        raise ConfigError(
            f"hydra.launcher.n_jobs={asked or 1}: jobs of {device['count']} cards at once, but there are {there}"
        )
    return asked or most


def take_share(folder: Path, device: dict[str, Any], n_jobs: int) -> None:
    """Give this worker cards and CPUs that no other one of the sweep has: in `device`, and by its affinity."""
    from ghostnet.device import cards, choose, cpus

    if not slot:
        slot.append(_free_slot(folder, n_jobs))
        mine = sorted(cpus())
        each = max(1, len(mine) // n_jobs)
        first = slot[0] * each % len(mine)
        os.sched_setaffinity(0, mine[first : first + each])
    kind, _ = choose(device["kind"])
    if kind != "cpu":
        ids = list(range(cards(kind)))
        first = slot[0] * device["count"]
        device["ids"] = ids[first : first + device["count"]]


def _free_slot(folder: Path, n_jobs: int) -> int:
    (folder / ".slots").mkdir(parents=True, exist_ok=True)
    for number in range(n_jobs):
        # Stays open, and so locked, until the process ends.
        file = os.open(folder / ".slots" / str(number), os.O_CREAT | os.O_RDWR)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
        os.close(file)
    raise ConfigError(f"{folder}: another command runs jobs of this sweep. Wait until it ends.")

"""Ranks that a command launches itself, by torch's elastic launcher: they meet at a free port and end together."""

import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from ghostnet import watchdog
from ghostnet.distributed import STOP, Ranks, join
from ghostnet.errors import DataError, SampleError, StorageError, UserError, explain, lost_peer

T = TypeVar("T")

POLL = 0.1
"""Seconds between two looks at the ranks."""
LATE = 2.0
"""Seconds for which a rank that only lost the others keeps quiet, so that the one which failed is heard first."""


class RankStopped(Exception):  # noqa: N818 (it is no error)
    """The launcher was asked to end, and its ranks ended before they could save."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def launch(function: Callable[[Any, Ranks], T], argument: Any, count: int) -> tuple[T, int]:  # noqa: ANN401
    """Run function(argument, ranks) in `count` processes of this machine -> (rank 0's, the signal that came or 0).

    All three must be picklable. SIGINT and SIGTERM are passed on as STOP, once; a second Ctrl-C kills. Where a rank
    fails all end, and its UserError or SampleError is raised here; RuntimeError with its traceback for a bug.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    for noisy in ("torch.distributed.elastic", "torch.multiprocessing", "torch.multiprocessing.spawn"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    folder = Path(tempfile.mkdtemp(prefix="ghostnet_ranks_"))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    asked: list[int] = []
    for signum in (signal.SIGINT, signal.SIGHUP):  # the ranks inherit it: what a terminal sends is for this process
        signal.signal(signum, signal.SIG_IGN)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # no more: else they would inherit its defaults
    try:
        context = start_processes(
            "ghostnet",
            _rank,
            dict.fromkeys(range(count), (function, argument, folder)),
            {rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            DefaultLogsSpecs(log_dir=str(folder)),
            start_method="spawn",
        )

        def ask(signum: int, frame: FrameType | None) -> None:
            if asked and signum == signal.SIGINT:
                raise KeyboardInterrupt
            if not asked:
                for pid in context.pids().values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, STOP)
            asked.append(signum)

        for signum in (signal.SIGINT, signal.SIGTERM, STOP):
            signal.signal(signum, ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if handlers[signal.SIGHUP] == signal.SIG_IGN else ask)  # by nohup
        signal.signal(signal.SIGQUIT, handlers[signal.SIGQUIT])
        try:
            while (done := context.wait(0)) is None:
                if not multiprocessing.active_children() and context.wait(0) is None:
                    raise UserError("all ranks ended without a result.")  # torch waits for one that never comes
                time.sleep(POLL)
        except BaseException:
            context.close(signal.SIGKILL, timeout=5)
            raise
        if not done.is_failed():
            return done.return_values[0], asked[0] if asked else 0
        (rank, failure), *_ = done.failures.items()
        if asked and failure.exitcode in (-STOP, -signal.SIGTERM):  # the latter where it came to all processes
            raise RankStopped(asked[0])
        raise _failure(rank, failure.exitcode, folder / f"failed_{rank}.json")
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        shutil.rmtree(folder, ignore_errors=True)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, STOP)
"""Those that torch's launcher or this one takes over."""


HANGS = "hangs"
"""The file of what the watchdogs of the ranks have found out."""
told_to: list[Path] = []
"""In a launched rank: the folder of what it tells the launcher."""


def report(message: str) -> None:
    """Tell the user why a watchdog ends this process: by the launcher, where it is one of several."""
    if not told_to:
        watchdog.tell(message)
        return
    with contextlib.suppress(OSError):
        temporary = told_to[0] / f"{HANGS}.{os.getpid()}"
        temporary.write_text(message, encoding="utf-8", errors="surrogateescape")
        temporary.replace(told_to[0] / HANGS)
    watchdog.log.error(message)


def _failure(rank: int, exitcode: int, report: Path) -> Exception:
    """The error of a rank, in this process."""
    who = f"rank {rank}: " if rank else ""
    with contextlib.suppress(OSError):
        return UserError((report.parent / HANGS).read_text(encoding="utf-8", errors="surrogateescape"))
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
        out_of_memory = " The kernel does that where memory runs out: see dmesg." if exitcode == -signal.SIGKILL else ""
        return UserError(f"rank {rank} {how}, and all others were ended.{out_of_memory}")
    if told["message"] is None:
        return RuntimeError(f"rank {rank} failed:\n{told['traceback']}")
    kinds = {kind.__name__: kind for kind in (DataError, SampleError, StorageError)}
    return kinds.get(told["kind"], UserError)(f"{who}{told['message']}")


def _rank(function: Callable[[Any, Ranks], T], argument: Any, folder: Path) -> T:  # noqa: ANN401 (for the function)
    """One launched process."""
    if sys.platform == "linux":
        # No orphans: the kernel ends this process with the launcher, however that ended.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where an older torch has set its own handler before
    rank = int(os.environ["RANK"])
    told_to.append(folder)
    try:
        ranks = join("launch", lambda text: None)  # the launcher sees a rank that ends
        result = function(argument, ranks)
        ranks.leave()
        return result
    except Exception as error:
        message = explain(error)
        # Where all fail alike, the main rank speaks; where this one only lost a peer, the peer does.
        time.sleep(LATE if message is None or lost_peer(error) else LATE / 2 if rank else 0)
        told = {"message": message, "kind": type(error).__name__, "traceback": traceback.format_exc()}
        (folder / f"failed_{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        # At once: a thread that waits for a peer, or a device that hangs, would keep the process from ending.
        os._exit(1)

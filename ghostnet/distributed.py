"""Ranks, the processes that train together: launch them (torch elastic), join those there are (torchrun, srun), reduce.

Two roads: gradients go over the devices (hccl, nccl, gloo); words, counts and agreements over the hosts (gloo).
"""

import contextlib
import ctypes
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostnet.device import BACKENDS, Mark, cpus, cpus_near, mark, pinned_by_user
from ghostnet.errors import SampleError, UserError, explain

T = TypeVar("T")

STOP = signal.SIGUSR1
"""What the launcher asks its ranks to end with, as a terminal's Ctrl-C reaches them all by itself."""
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others."""
POLL = 0.1
"""Seconds between two looks at the ranks."""
BUFFERS = "forward_sync_buffers"
"""DistributedDataParallel's name for whether the main rank's buffers go to all in every step."""
if BUFFERS not in inspect.signature(DistributedDataParallel).parameters:  # torch < 2.14
    BUFFERS = "broadcast_buffers"
LATE = 2.0
"""Seconds for which a rank that only lost the others keeps quiet, so that the one which failed is heard first."""


class RankStopped(Exception):  # noqa: N818 (it is no error)
    """The launcher was asked to end, and its ranks ended before they could save."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, of how many, and what they do together. Alone, each of it is trivial."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1
    starter: str = ""
    """torchrun, srun, or launch: our own launcher."""
    store: Any = None
    """Where the ranks met, before there are roads between them."""
    turn: Iterator[int] = field(default_factory=itertools.count)
    """Of what the main rank shares, and of the jobs."""
    reduction: "Reduction | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes, prints and decides."""
        return self.rank == 0

    def __str__(self) -> str:
        """How many there are, in words."""
        machines = self.world_size // self.local_size
        return f"{self.world_size} ranks" + (f" on {machines} machines" if machines > 1 else "")

    def card(self, ids: list[int] | None, visible: int) -> int:
        """The card of this rank, of the given ones or of all; visible: how many this process sees."""
        if self.starter == "srun" and visible == 1:
            return 0  # srun --gpus-per-task shows each rank its own alone
        return ids[self.local_rank] if ids else self.local_rank

    def share(self, job: T | None) -> T | None:
        """What the main rank gives, on all of them, without a device."""
        key = f"share {next(self.turn)}"
        if self.is_main:
            self.store.set(key, pickle.dumps(job))
            return job
        self.store.wait([key], TIMEOUT)
        received: T | None = pickle.loads(self.store.get(key))
        return received

    def on(self, device: torch.device) -> "Ranks":
        """The same with roads between the hosts and between the devices, for one job. Every rank calls it."""
        if self.world_size == 1:
            return self
        self.leave()
        backend = BACKENDS[device.type]
        dist.init_process_group(
            backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}",
            store=dist.PrefixStore(f"job {next(self.turn)}", self.store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.world_size,
            timeout=TIMEOUT,
        )
        return replace(self, reduction=Reduction(device, self.world_size))

    def largest(self, value: int) -> int:
        """The largest value of all ranks, by the hosts: no device is waited for."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: T) -> list[T]:
        """What each rank has, in their order, by the hosts."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What make() gives on the main rank, on all of them; it is not called on the others."""
        if self.world_size == 1:
            return make()
        box: list[Any] = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        value: T = box[0]
        return value

    def mean_(self, tensor: Tensor) -> None:
        """Replace a tensor on the device by its mean over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank passes first, such as to download a file, then the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward pass averages the gradients over the ranks, in the weights' own precision."""
        if self.reduction is None:
            return model
        # Each rank keeps its own BatchNorm statistics: to broadcast them in every step costs more than to agree later.
        settings: dict[str, Any] = {BUFFERS: False}
        wrapped = DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device.index],
            **settings,
        )
        wrapped.register_comm_hook(None, self.reduction.reduce)
        return wrapped

    def leave(self) -> None:
        """Take the roads down."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


def synchronized(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with BatchNorm over the global batch; its parameters stay the same objects."""
    if ranks.world_size == 1:
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def local_gradients(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """For all but the last forward and backward pass of a step: gradients are added up, not yet reduced."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


class Reduction:
    """Averages a bucket of gradients over the ranks: divided first, then summed, since half precision overflows.

    Remembers when the last bucket was ready: what the step waits after that is the share that backward doesn't hide.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device, self.world_size = device, world_size
        self.ready: Mark = mark(device)

    def reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """DistributedDataParallel's communication hook."""
        buffer = bucket.buffer().div_(self.world_size)
        self.ready = mark(self.device)
        work = dist.all_reduce(buffer, async_op=True)
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future


# Joining


def started_by() -> str:
    """Who started this process as one of several ranks: torchrun, srun, launch; '' where nobody did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        return "torchrun"
    # Only srun sets it; a batch script that starts one process has the job's SLURM_NTASKS too.
    return "srun" if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else ""


def join(starter: str) -> Ranks:
    """Meet the other ranks; UserError where they don't come together."""
    if starter == "srun":
        _slurm_environment()
    env = os.environ
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise UserError(
            f"the ranks can't meet at {env.get('MASTER_ADDR', '?')}:{env.get('MASTER_PORT', '?')}: "
            f"{str(error).splitlines()[0]} Check that the host and the port can be reached from all machines, "
            "or choose another MASTER_PORT."
        ) from None
    local_rank, local_size = int(env["LOCAL_RANK"]), int(env.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(rank, world_size, local_rank, local_size, starter, store)


def _slurm_environment() -> None:
    """What torchrun would have set, from what srun sets."""
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    # '4(x2),3': four tasks on each of two machines, three on the third.
    counts: list[int] = []
    for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    env["LOCAL_WORLD_SIZE"] = str(counts[int(env.get("SLURM_NODEID", "0"))])
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    # Two steps of one job, or two jobs on one machine, must not meet.
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault("MASTER_PORT", str(20000 + (job * 64 + step % 64) % 40000))


def _first_host(nodes: str) -> str:
    if nodes and not set(nodes) & set("[,"):
        return nodes
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"srun: the first host of {nodes!r} can't be told without scontrol. Set MASTER_ADDR to the host of rank 0."
        ) from None


def pin(ranks: Ranks, device: torch.device) -> str:
    """Give each rank of a machine CPUs of its own near its card -> what was done, in words.

    Nothing where somebody did so before (the user, srun, torch_npu), or where there are fewer CPUs than ranks.
    """
    own, host = cpus(), socket.gethostname()
    here = [who for who in ranks.gather((host, ranks.rank, own, cpus_near(device))) if who[0] == host]
    if pinned_by_user(device.type):
        return "CPUs by CPU_AFFINITY_CONF"
    if len(here) == 1 or any(may != own for _, _, may, _ in here):
        return f"{len(own)} CPUs a rank, as they were given"
    mine = next(near for _, rank, _, near in here if rank == ranks.rank)
    sharing = [rank for _, rank, _, near in here if near == mine]
    share, place = len(mine) // len(sharing), sharing.index(ranks.rank)
    if not share:
        return f"{len(mine)} CPU{'s' if len(mine) > 1 else ''} for {len(sharing)} of them"
    os.sched_setaffinity(0, sorted(mine)[place * share : (place + 1) * share])
    if "OMP_NUM_THREADS" not in os.environ or ranks.starter == "torchrun":  # which sets it to 1
        torch.set_num_threads(share)
    return f"{share} CPU{'s' if share > 1 else ''} a rank"


# Launching


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the ranks inherit it: a terminal's Ctrl-C is for this process
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

        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)
        signal.signal(STOP, ask)
        for signum in (signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, handlers[signum])
        try:
            while (done := context.wait(0)) is None:
                time.sleep(POLL)
        except BaseException:
            context.close(signal.SIGKILL, timeout=5)
            raise
        if not done.is_failed():
            return done.return_values[0], asked[0] if asked else 0
        (rank, failure), *_ = done.failures.items()
        if asked and failure.exitcode == -STOP:
            raise RankStopped(asked[0])
        raise _failure(rank, failure.exitcode, folder / f"failed_{rank}.json")
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        shutil.rmtree(folder, ignore_errors=True)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, STOP)
"""Those that torch's launcher or this one takes over."""


def _failure(rank: int, exitcode: int, report: Path) -> Exception:
    """The error of a rank, in this process."""
    who = f"rank {rank}: " if rank else ""
    try:
        told = json.loads(report.read_text())
    except (OSError, ValueError):
        how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
        out_of_memory = " The kernel does that where memory runs out: see dmesg." if exitcode == -signal.SIGKILL else ""
        return UserError(f"rank {rank} {how}, and all others were ended.{out_of_memory}")
    if told["message"] is None:
        return RuntimeError(f"rank {rank} failed:\n{told['traceback']}")
    return (SampleError if told["sample"] else UserError)(f"{who}{told['message']}")


def _rank(function: Callable[[Any, Ranks], T], argument: Any, folder: Path) -> T:  # noqa: ANN401 (for the function)
    """One launched process."""
    if sys.platform == "linux":
        # No orphans: the kernel ends this process with the launcher, however that ended.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)
    rank = int(os.environ["RANK"])
    try:
        ranks = join("launch")
        result = function(argument, ranks)
        ranks.leave()
        return result
    except Exception as error:
        message = explain(error)
        # Where all fail alike, the main rank speaks; where this one only lost a peer, the peer does.
        time.sleep(LATE if message is None else LATE / 2 if rank else 0)
        told = {"message": message, "sample": isinstance(error, SampleError), "traceback": traceback.format_exc()}
        (folder / f"failed_{rank}.json").write_text(json.dumps(told))
        # At once: a thread that waits for a peer, or a device that hangs, would keep the process from ending.
        os._exit(1)

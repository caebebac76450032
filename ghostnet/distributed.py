"""Ranks, the processes that train together: join those there are (torchrun, srun, ours), agree, reduce.

Two roads: gradients go over the devices (hccl, nccl, gloo); words, counts and agreements over the hosts (gloo).
"""

import contextlib
import inspect
import io
import itertools
import os
import pickle
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostnet.device import (
    BACKENDS,
    Kind,
    Mark,
    cards,
    choices,
    choose,
    cpus,
    cpus_near,
    describe,
    mark,
    pinned_by_user,
    resolve,
)
from ghostnet.errors import UserError
from ghostnet.watchdog import LONG, waiting

T = TypeVar("T")

STOP = signal.SIGUSR1
"""What the launcher asks its ranks to end with, as a terminal's Ctrl-C reaches them all by itself."""
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others to come, and for its job."""
ROADS = timedelta(seconds=2 * LONG)
"""How long a collective waits, where no watchdog ends it before."""
ANSWER = timedelta(seconds=10)
"""How long the place where the ranks met may take to answer the watchdog."""
BUFFERS = "forward_sync_buffers"
"""DistributedDataParallel's name for whether the main rank's buffers go to all in every step."""
if BUFFERS not in inspect.signature(DistributedDataParallel).parameters:  # torch < 2.14
    BUFFERS = "broadcast_buffers"


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
            timeout=ROADS,
        )
        return replace(self, reduction=Reduction(device, self.world_size))

    def largest(self, value: int, what: str = "the other ranks, to agree") -> int:
        """The largest value of all ranks, by the hosts: no device is waited for. what: a name for this wait."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        with waiting(what, others=True):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: T) -> list[T]:
        """What each rank has, in their order, by the hosts."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with waiting("what the other ranks tell", others=True):
            dist.all_gather_object(values, _packed(value))
        return [_unpacked(packed) for packed in values]

    def from_main(self, make: Callable[[], T]) -> T:
        """What make() gives on the main rank, on all of them; it is not called on the others."""
        if self.world_size == 1:
            return make()
        box: list[Any] = [None]
        if self.is_main:
            with waiting("what the main rank does for all", LONG):
                made = make()
                box = [_packed(made)]
        with waiting("what the main rank tells", others=True):
            dist.broadcast_object_list(box, src=0)
        return made if self.is_main else cast(T, _unpacked(box[0]))

    def mean_(self, tensor: Tensor) -> None:
        """Replace a tensor on the device by its mean over the ranks."""
        if self.world_size > 1:
            with waiting("the mean over the ranks", others=True):
                dist.all_reduce(tensor)
            tensor /= self.world_size

    def any(self, flag: Tensor) -> Tensor:
        """A flag on the device that is true where it is on any rank; no host waits."""
        if self.world_size == 1:
            return flag
        found = flag.to(torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool()

    def from_main_(self, tensor: Tensor) -> None:
        """Replace a tensor on the device by the main rank's."""
        if self.world_size > 1:
            with waiting("the main rank's numbers", others=True):
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0, "every rank to come here")

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank passes first, such as to download a file, then the others."""
        if not self.is_main:
            self.largest(0, "the main rank, which passes first")
        with waiting("the data to be found", LONG):
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

    def board(self) -> Any:  # noqa: ANN401 (torch's Store)
        """A connection of its own to where the ranks met, which a thread may use; None for one alone. All call it."""
        if self.world_size == 1:
            return None
        place, attempt = os.environ["MASTER_ADDR"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(  # type: ignore[attr-defined]
            place, int(os.environ["MASTER_PORT"]), None, False, timeout=ANSWER, wait_for_workers=False
        )
        return dist.PrefixStore(f"watch {attempt}.{next(self.turn)}", store)  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Take the roads down."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _packed(value: object) -> bytes:
    """What ranks send each other of a value that may hold tensors, which come out in the host's memory.

    pickle, which torch's object collectives use, would write a tensor in a format of old, against which torch_npu
    warns whatever the tensor's device.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:  # noqa: ANN401 (whatever was packed)
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)


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
    """Who started this process as one of several ranks: torchrun or srun; '' where nobody did."""
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
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"the ranks can't meet at {env.get('MASTER_ADDR', '?')}:{env.get('MASTER_PORT', '?')}: {reason}. "
            "Check that the host and the port can be reached from all machines, "
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
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
        return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
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


def settle(
    ranks: Ranks, kind: Kind, ids: list[int] | None, allow_hf32: bool | None = None
) -> tuple[Ranks, torch.device, str]:
    """Set up this rank's device, roads to the others', CPUs of its own.

    Returns the ranks, the device, and all of that in words. allow_hf32: as resolve() takes it.
    """
    chosen, why = choose(kind)
    device = resolve(chosen, ranks.card(ids, cards(chosen)), allow_hf32)
    ranks = ranks.on(device)
    many = f"; {ranks}, {pin(ranks, device)}" if ranks.world_size > 1 else ""
    return (
        ranks,
        device,
        f"{device}: {describe(device)}, {choices(device)}{many}{f' ({why})' if kind == 'auto' else ''}",
    )

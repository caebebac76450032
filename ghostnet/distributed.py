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
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostnet import interrupts, starters
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
    """One of starters.started_by(), or launch: our own launcher."""
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
        _interruptible(lambda: self.store.wait([key], TIMEOUT))
        received: T | None = pickle.loads(self.store.get(key))
        return received

    def on(self, device: torch.device) -> "Ranks":
        """The same with roads between the hosts and between the devices, for one job. Every rank calls it."""
        if self.world_size == 1:
            return self
        self.leave()
        backend = BACKENDS[device.type]
        with interrupts.at_once(), waiting("the other ranks, to connect with each of them", others=True):
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


def join(starter: str, say: Callable[[str], None]) -> Ranks:
    """Meet the other ranks, and say who has not come after a few seconds; UserError where they don't come together."""
    meeting, due, began = Meeting(), FIRST_NOTE, time.monotonic()

    def meanwhile() -> None:
        nonlocal due
        waited = time.monotonic() - began
        if waited > TIMEOUT.total_seconds():
            raise UserError(f"the ranks can't meet: {meeting}, for {waited / 60:.0f} minutes. {REACH}")
        if waited > due and meeting.missing:
            say(f"{meeting}, for {waited:.0f} s so far. Ctrl-C ends it.")
            due *= 2

    try:
        store = _interruptible(meeting.meet, meanwhile)
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"the ranks can't meet at {starters.place()}: {reason}. {REACH}") from None
    local_rank, local_size = starters.number("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(meeting.rank, meeting.world_size, local_rank, local_size, starter, store)


REACH = "Check that the host and the port can be reached from all machines, or choose another MASTER_PORT."
FIRST_NOTE = 5.0
"""Seconds after which a rank that waits for others says so; then after twice as many, and so on."""


class Meeting:
    """How far the ranks have come together, at MASTER_ADDR:MASTER_PORT; its string says who is waited for."""

    def __init__(self) -> None:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"the ranks can't meet: {name} is not set. Set it to where rank 0 is to be found.")
        self.rank, self.world_size = starters.number("RANK"), starters.number("WORLD_SIZE")
        self.host, self.port = os.environ["MASTER_ADDR"], starters.number("MASTER_PORT")
        self.missing = [0]
        """The ranks that this one has to miss: the main one knows of all, each other only of the main one."""
        self.refusal = ""
        """Why the place where they meet can't be reached."""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.missing[:SHOWN])) + (", …" if len(self.missing) > SHOWN else "")
        ranks = f"rank{'s' if len(self.missing) > 1 else ''} {shown} of {self.world_size}"
        at = f"{self.host}:{self.port}"
        if self.refusal:
            return f"rank {self.rank} waits for {ranks}: no answer at {at} ({self.refusal})"
        return f"rank {self.rank} waits for {ranks} to come to {at}"

    def meet(self) -> Any:  # noqa: ANN401 (torch's Store)
        """Wait until all ranks are here; for ever, in a thread that nobody waits for. -> The store they share."""
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not serves and not self._answers():
            time.sleep(LOOK)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            self.host, self.port, None, serves, timeout=TIMEOUT, wait_for_workers=False, multi_tenant=serves
        )
        self.refusal = ""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        here = dist.PrefixStore(f"here {attempt}", store)  # type: ignore[attr-defined]
        here.set(str(self.rank), "")
        wanted = range(self.world_size) if self.rank == 0 else [0]
        while missing := [rank for rank in wanted if not here.check([str(rank)])]:
            self.missing = wanted = missing
            time.sleep(LOOK)
        self.missing = []
        if self.rank == 0:
            here.set("all", "")
        else:
            here.wait(["all"], TIMEOUT)
        return store

    def _answers(self) -> bool:
        """Whether somebody is there; torch's own attempts warn about each one that fails."""
        try:
            socket.create_connection((self.host, self.port), timeout=FIRST_NOTE / 2).close()
        except OSError as error:
            self.refusal = error.strerror or str(error)
            return False
        self.refusal = "something listens there, but not as rank 0 does"
        return True


SHOWN = 16
"""Ranks that are named of those that have not come."""
LOOK = 0.2
"""Seconds between two looks at who has come."""


def _interruptible(wait: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
    """Call wait() in a thread, so that signals are heard though it waits in C; meanwhile() is called now and then."""
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(wait())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK)
        meanwhile()
    if errors:
        raise errors[0]
    return results[0]


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
